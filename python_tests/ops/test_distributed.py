"""DistributedDataParallel over two processes, one of which has no positive sample."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from hqod_ops import FakeQuant, hqod_loss
from python_tests.ranks import run_ranks


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 5)
        self.quantizer = FakeQuant(-8, 7, scale=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.quantizer(self.linear(x))


def gradients(head: nn.Module, samples: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    out = head(torch.randn(samples, 8, generator=generator))
    target = torch.rand(samples, 2, generator=generator).repeat(1, 2)
    target = target + torch.tensor([0.0, 0.0, 1.0, 1.0])
    hqod_loss(target + out[:, :4], target, out[:, 4], logits=True).backward()
    return [parameter.grad for parameter in head.parameters()]


def work(rank: int) -> list[Tensor]:
    torch.manual_seed(0)
    head = nn.parallel.DistributedDataParallel(Head())
    return gradients(head, samples=0 if rank else 16)


def test_a_rank_without_positives(tmp_path: Path) -> None:
    first, second = run_ranks(work, tmp_path)
    torch.manual_seed(0)
    alone = gradients(Head(), samples=16)
    for got, same, whole in zip(first, second, alone, strict=True):
        assert torch.equal(got, same)
        torch.testing.assert_close(got, whole / 2)  # the mean over ranks, of which one gives 0
        assert whole.abs().sum() > 0
