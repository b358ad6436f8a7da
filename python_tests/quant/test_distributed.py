"""Calibration and training of a QAT model on two processes, which see different data."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hqod_ops.quant import OBSERVERS, QATConfig, Rule, calibrate, parameter_groups, prepare_qat
from python_tests.ranks import run_ranks

KINDS = [name for name in OBSERVERS if not name.startswith("power")]


class Net(nn.Module):
    """A batch norm, a head shared by two levels, and one layer for every observer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 4, 3, padding=1)
        self.observed = nn.ModuleDict({name: nn.Linear(4, 2) for name in KINDS})
        self.spare = nn.Linear(4, 2)
        self.use_spare = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        levels = [self.head(x.relu()), self.head(nn.functional.max_pool2d(x, 2))]
        means = torch.stack([level.mean(dim=(2, 3)) for level in levels]).sum(dim=0)
        outputs = [layer(means) for layer in self.observed.values()]
        return torch.cat([*outputs, self.spare(means)] if self.use_spare else outputs, dim=1)


CONFIG = QATConfig(
    4,
    4,
    first="stem",
    prediction=(),
    overrides=[Rule(f"observed.{name}", act_init=name) for name in KINDS],
)


def made(seed: int, foreach: bool = False) -> Net:
    torch.manual_seed(seed)
    return prepare_qat(Net(), CONFIG, foreach=foreach)


def batches(rank: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(10 + rank)
    return [(1 + 4 * rank) * torch.randn(2, 3, 8, 8, generator=generator) for _ in range(count)]


def error_of(function: Any, *args: Any) -> str:
    with pytest.raises((ValueError, RuntimeError)) as error:
        function(*args)
    return f"{type(error.value).__name__}: {error.value}"


def work(rank: int) -> dict[str, Any]:
    results: dict[str, Any] = {}

    # Weights that differ as well, as before DistributedDataParallel makes them the same.
    model = calibrate(made(seed=rank), batches(rank, 2), progress=False)
    results["both"] = model.state_dict()
    same = calibrate(made(seed=0), batches(rank, 2), progress=False)
    results["same weights"] = same.state_dict()
    idle = calibrate(made(seed=0), batches(rank, 2 * rank), progress=False)
    results["one idle"] = idle.state_dict()
    alone = calibrate(made(seed=0), batches(rank, 2), progress=False, distributed=False)
    results["alone"] = alone.state_dict()

    results["no data"] = error_of(lambda: calibrate(made(0), [], progress=False))
    broken = [torch.full((1, 3, 8, 8), torch.nan)] if rank else batches(0, 1)
    results["broken"] = error_of(lambda: calibrate(made(0), broken, progress=False))
    wrapped = nn.parallel.DistributedDataParallel(made(0))
    results["wrapped"] = error_of(lambda: calibrate(wrapped, batches(0, 1), progress=False))

    start = calibrate(made(seed=0), batches(0, 2), progress=False).state_dict()
    for foreach in (False, True):
        results[f"trained {foreach}"] = train(start, rank, foreach)
    return results


def train(start: dict[str, Tensor], rank: int, foreach: bool) -> dict[str, Tensor]:
    """Three steps under DistributedDataParallel, in the last of which a layer is left out."""
    model = made(seed=1, foreach=foreach)
    model.load_state_dict(start)
    ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(parameter_groups(ddp, weight_decay=1e-4), lr=0.02, momentum=0.9)
    average = copy.deepcopy(model)
    for index, x in enumerate(batches(rank, 3)):
        model.use_spare = index < 2
        optimizer.zero_grad()
        ddp(x).square().mean().backward()
        optimizer.step()
        average = copy.deepcopy(model)
    return average.state_dict()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(work, tmp_path_factory.mktemp("ranks"))


def scales(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if "_quantizer." in name}


@pytest.mark.parametrize("case", ["both", "one idle"])
def test_calibrated_scales_are_the_same_to_the_bit(ranks: list[dict[str, Any]], case: str) -> None:
    first, second = (scales(rank[case]) for rank in ranks)
    assert first.keys() == second.keys() and len(first) >= 2 * (2 * len(KINDS) + 6)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_what_all_saw_counts(ranks: list[dict[str, Any]]) -> None:
    whole = calibrate(made(0), [*batches(0, 2), *batches(1, 2)], progress=False).state_dict()
    alone, same = ranks[0]["alone"], ranks[0]["same weights"]
    for kind in ("minmax", "lsq"):  # statistics that do not depend on the order of batches
        name = f"observed.{kind}.input_quantizer.scale"
        torch.testing.assert_close(same[name], whole[name])
        assert (alone[name] - whole[name]).abs() > 0.01 * whole[name]
    assert same["head.input_quantizer.code_range"].tolist() == [[0, 15], [-8, 7]]


def test_a_process_without_data_takes_part(ranks: list[dict[str, Any]]) -> None:
    idle, alone = ranks[0]["one idle"], ranks[1]["alone"]
    assert all(torch.equal(value, alone[name]) for name, value in scales(idle).items())


def test_weights_take_the_scale_of_the_first(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        scale = rank["both"]["head.weight_quantizer.scale"].item()
        expected = ranks[0]["both"]["head.weight"].abs().max().item() / 7.5
        assert scale == pytest.approx(expected)


def test_an_error_in_one_process_reaches_all(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["no data"].startswith("ValueError: batches: expected") for rank in ranks)
    assert "RuntimeError: calibration failed in process 1" in ranks[0]["broken"]
    assert all("stem.input_quantizer" in rank["broken"] for rank in ranks)
    assert all("DistributedDataParallel" in rank["wrapped"] for rank in ranks)


@pytest.mark.parametrize("foreach", [False, True])
def test_training_keeps_the_processes_together(ranks: list[dict[str, Any]], foreach: bool) -> None:
    first, second = (rank[f"trained {foreach}"] for rank in ranks)
    for name, value in first.items():
        if "running" not in name:  # batch norm statistics are those of each process
            assert torch.equal(value, second[name]), name
    moved = scales(ranks[0]["one idle"])
    assert any(not torch.equal(value, first[name]) for name, value in moved.items())


def test_foreach_trains_the_same(ranks: list[dict[str, Any]]) -> None:
    one, together = (ranks[0][f"trained {foreach}"] for foreach in (False, True))
    for name, value in one.items():
        torch.testing.assert_close(together[name], value, msg=name)
