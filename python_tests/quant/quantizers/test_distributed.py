"""Quantizers and observers over two processes, one of which may have seen nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hqod_ops.quant.observers import OBSERVERS, Observer
from hqod_ops.quant.quantizers.registry import QUANTIZERS
from python_tests.ranks import RANKS, run_ranks


def data(rank: int) -> Tensor:
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(rank)) * (rank + 1)


class Layer(nn.Module):
    """A quantizer between something to train and the loss."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 6)
        self.quantizer = QUANTIZERS[name](4)
        self.quantizer.set_scale(torch.tensor([0.1]), True)

    def forward(self, x: Tensor) -> Tensor:
        return self.quantizer(self.linear(x))


def gradients(layer: nn.Module, rank: int) -> list[Tensor]:
    layer(data(rank)).square().sum().backward()
    return [p.grad for p in layer.parameters()]  # type: ignore[misc]


def observed(name: str, ranks: list[int], batches: int = 2) -> Observer:
    observer = OBSERVERS[name](4)
    for rank in ranks:
        for index in range(batches):
            observer.observe(data(rank) + index)
    return observer


def work(rank: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name in QUANTIZERS:
        layer = nn.parallel.DistributedDataParallel(Layer(name))
        results[name] = gradients(layer, rank)
    for name in OBSERVERS:
        for case, ranks in (("both", [rank]), ("one", [0] if rank == 0 else [])):
            observer = observed(name, ranks)
            observer.all_reduce()
            results[f"{name}, {case}"] = [observer.scale(), observer.count, observer.signed]
    return results


def test_two_processes(tmp_path: Path) -> None:
    first, second = run_ranks(work, tmp_path)
    for name in QUANTIZERS:
        alone = [gradients(Layer(name), rank) for rank in range(RANKS)]
        for got, same, one, other in zip(first[name], second[name], *alone, strict=True):
            assert torch.equal(got, same), name
            torch.testing.assert_close(got, (one + other) / 2)
    for name in OBSERVERS:
        for case, ranks in (("both", [0, 1]), ("one", [0])):
            (scale, count, signed), other = first[f"{name}, {case}"], second[f"{name}, {case}"]
            assert torch.equal(scale, other[0]) and [count, signed] == other[1:], name
            assert (count, signed) == (2 * len(ranks), True)
            whole = observed(name, ranks)
            if case == "one":
                assert torch.equal(scale, whole.scale())
            elif not name.startswith("ema_"):  # a moving average depends on the order
                torch.testing.assert_close(scale, whole.scale())


def test_alone_there_is_nothing_to_exchange() -> None:
    for name in OBSERVERS:
        observer = observed(name, [0])
        scale = observer.scale()
        observer.all_reduce()
        assert torch.equal(observer.scale(), scale)
