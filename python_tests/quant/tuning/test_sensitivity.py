"""Sensitivity of layers, and the bits that follow from it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from hqod_ops.quant import QATConfig, plan_qat, prepare_qat
from hqod_ops.quant.tuning import (
    LayerSensitivity,
    Sensitivity,
    quantize,
    search_bits,
    sensitivity,
)
from hqod_ops.quant.tuning.bits import average
from python_tests.quant.tuning.nets import error, images, trained

LAYERS = ["stem", "block.0", "block.3", "head", "logits"]


@pytest.fixture(scope="module")
def found() -> Sensitivity:
    return sensitivity(trained(), images(2), bits=(2, 3, 4, 8), progress=False)


def test_more_bits_less_noise(found: Sensitivity) -> None:
    assert list(found.weights) == LAYERS and len(found.rows) == 5 * 2 * 4
    for kind in ("weight", "act"):
        for name, cells in found.of(kind).items():
            noise = [cells[bits].noise for bits in (2, 4, 8)]
            assert noise == sorted(noise, reverse=True), (name, kind)
            assert noise[-1] > 0
    assert "block.3" in str(found) and "A8" in str(found) and found.other_mb > 0


def test_the_model_stays_and_the_result_is_the_same_again() -> None:
    model = trained()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    one, two = (sensitivity(model, images(1), bits=(3,), progress=False) for _ in range(2))
    assert one == two
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in state.items())
    assert [m.training for m in model.modules()] == modes


def test_a_metric_of_the_user() -> None:
    model = trained()

    def closeness(other: nn.Module) -> float:
        return -error(other, model)

    found = sensitivity(
        model, images(1), bits=(2, 8), kinds=("weight",), metric=closeness, progress=False
    )
    assert found.metric == 0
    for cells in found.of("weight").values():
        assert (cells[2].drop or 0) > (cells[8].drop or 0) >= 0
    config = search_bits(found, max_drop=10.0)
    assert {rule.weight_bits for rule in config.overrides} == {2}
    kept = search_bits(found, max_drop=0.1, method="greedy")
    assert 8 in {rule.weight_bits for rule in kept.overrides}
    with pytest.raises(ValueError, match="max_drop: cannot be met, the least that can is"):
        search_bits(found, max_drop=1e-9)


def test_saved_and_drawn(found: Sensitivity, tmp_path: Path) -> None:
    found.save(tmp_path / "found.json")
    assert Sensitivity.load(tmp_path / "found.json") == found
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "found.png")
    assert (tmp_path / "found.png").stat().st_size > 0


@pytest.mark.parametrize("method", ["greedy", "auto"])
def test_bits_within_a_budget(found: Sensitivity, method: str) -> None:
    config = search_bits(found, average_bits=3.5, method=method)
    assert average(config, found.weights) <= 3.5
    plan = plan_qat(trained(), config)
    assert {p.act_bits for p in plan.values()} == {8}
    assert len({p.weight_bits for p in plan.values()}) > 1
    size = found.other_mb + 3 * sum(found.weights.values()) / 8e6
    by_size = search_bits(found, size_mb=size, method=method)
    # Bias correction makes a bias that the budget does not know of.
    _, report = quantize(trained(), images(1), by_size, correct=False, progress=False)
    assert report.size_mb <= size


@pytest.mark.require("scipy")
def test_integer_programming_is_no_worse(found: Sensitivity) -> None:
    table = found.of("weight")
    for budget in (2.5, 3.0, 4.5, 6.0):
        noise = []
        for method in ("milp", "greedy"):
            rules = search_bits(found, average_bits=budget, method=method).overrides
            noise.append(sum(table[str(r.pattern)][r.weight_bits or 0].noise for r in rules))
        assert noise[0] <= noise[1] * (1 + 1e-6)


def test_rules_come_after_those_of_the_configuration(found: Sensitivity) -> None:
    base = QATConfig(8, 4, first="stem", prediction="logits", per_channel=True)
    plan = plan_qat(trained(), search_bits(found, average_bits=3, config=base))
    assert (plan["stem"].act_bits, plan["head"].act_bits) == (8, 4)


def test_bad_input(found: Sensitivity) -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        sensitivity(trained(), [])
    with pytest.raises(ValueError, match="expected a float model"):
        sensitivity(prepare_qat(trained(), first=(), prediction=()), images(1))
    with pytest.raises(ValueError, match="kinds: expected weight or act, got 'bias'"):
        sensitivity(trained(), images(1), kinds=("bias",))
    with pytest.raises(ValueError, match="exactly one of"):
        search_bits(found)
    with pytest.raises(ValueError, match="average_bits: cannot be met, the least that can is 2"):
        search_bits(found, average_bits=1.5)
    with pytest.raises(ValueError, match="size_mb: cannot be met"):
        search_bits(found, size_mb=1e-6)
    with pytest.raises(ValueError, match="without a metric"):
        search_bits(found, max_drop=1.0)
    with pytest.raises(ValueError, match="method"):
        search_bits(found, average_bits=4, method="best")
    with pytest.raises(ValueError, match="expected that of weights"):
        search_bits(Sensitivity((LayerSensitivity("a", "act", 2, 0.1),), {"a": 1}), average_bits=4)
