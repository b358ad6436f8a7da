"""Learned rounding, by layers and by blocks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hqod_ops.quant import QATConfig, calibrate, prepare_qat
from hqod_ops.quant.tuning import learn_rounding, reestimate_batch_norm
from python_tests.quant.tuning.nets import error, images, quantized, trained, unquantized
from python_tests.ranks import run_ranks

QUICK: dict[str, Any] = {"steps": 40, "batch_size": 8, "progress": False}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: m.weight for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


@pytest.mark.parametrize("blocks", [None, "auto", "block"])
def test_it_lowers_the_error(blocks: str | None) -> None:
    model = trained()
    made = reestimate_batch_norm(quantized(model, 2), images())
    before, modes = error(made, model), [m.training for m in made.modules()]
    state = copy.deepcopy(made.state_dict())
    assert learn_rounding(made, model, images(), blocks=blocks, **QUICK) is made
    assert error(made, model) < 0.9 * before
    assert [m.training for m in made.modules()] == modes
    after = made.state_dict()
    assert state.keys() == after.keys()
    assert all(p.grad is None for p in made.parameters())
    # Running statistics and the scales of weights are those of before.
    for name, value in state.items():
        if "running" in name or "weight_quantizer" in name:
            assert torch.equal(value, after[name]), name


def test_what_is_learned_is_in_the_weights() -> None:
    model = trained()
    made = reestimate_batch_norm(quantized(model, 3), images())
    learn_rounding(made, model, images(), tune=0.0, **QUICK)
    changed = 0
    for name, weight in weights(made).items():
        original = weights(model)[name]
        moved = weight != original
        changed += int(moved.sum())
        # A weight that moved is on the grid, one code from where it would have been rounded to.
        quantized_weight = made.get_submodule(name).quantized_weight()
        torch.testing.assert_close(weight[moved], quantized_weight[moved], rtol=1e-5, atol=1e-7)
        scale = made.get_submodule(name).weight_quantizer.effective_scale().view(-1, 1, 1, 1)
        assert ((weight - original).abs() <= 1.0001 * scale).all()
    assert changed > 0
    fresh = quantized(model, 3)
    fresh.load_state_dict(made.state_dict())
    assert error(fresh, made) == 0
    assert error(copy.deepcopy(made), made) == 0


def test_it_is_deterministic() -> None:
    model = trained()
    first, second = (
        learn_rounding(quantized(model, 3), model, images(), **QUICK).state_dict() for _ in range(2)
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_cache_is_bounded() -> None:
    model = trained()
    made = learn_rounding(quantized(model), model, images(), cache_mb=0.0, **QUICK)
    one = learn_rounding(quantized(model), model, images()[:1], **QUICK)
    assert error(made, one) == 0  # no more than one batch was held


def test_without_quantization_nothing_changes() -> None:
    model = trained()
    made = quantized(model, 8)
    with torch.no_grad():
        for name, weight in weights(made).items():
            layer = made.get_submodule(name)
            weight.copy_(layer.quantized_weight())
            weights(model)[name].copy_(weight)
    unquantized(made)
    before = copy.deepcopy(made.state_dict())
    learn_rounding(made, model, images(), **QUICK)
    assert all(torch.equal(v, before[n]) for n, v in made.state_dict().items())


@pytest.mark.parametrize("name", ["tqt_frozen", "lsq_plus", "minmax"])
def test_other_quantizers(name: str) -> None:
    model = trained()
    made = reestimate_batch_norm(quantized(model, 3, weight_quantizer=name), images())
    before = error(made, model)
    learn_rounding(made, model, images(), **QUICK)
    assert error(made, model) < before


def test_quantizers_of_a_function_of_the_weight_are_named() -> None:
    model = trained()
    config = QATConfig(2, 8, weight_quantizer="dorefa")
    made = calibrate(prepare_qat(copy.deepcopy(model), config), images(), progress=False)
    with pytest.warns(UserWarning, match="their rounding stays: stem, block.0"):
        learn_rounding(made, model, images(), **QUICK)


def test_weights_quantized_together() -> None:
    model = trained()
    made = reestimate_batch_norm(quantized(model, 3, foreach=True), images())
    one_by_one = reestimate_batch_norm(quantized(model, 3), images())
    learn_rounding(made, model, images(), **QUICK)
    learn_rounding(one_by_one, model, images(), **QUICK)
    assert error(made, one_by_one) < 1e-9


def test_bad_input() -> None:
    model = trained()
    made = quantized(model)
    with pytest.raises(ValueError, match="'blok.*' fits none"):
        learn_rounding(made, model, images(), blocks="blok.*", **QUICK)
    with pytest.raises(ValueError, match="has no 'stem'"):
        learn_rounding(made, nn.Sequential(), images(), **QUICK)
    with pytest.raises(ValueError, match="at least one batch"):
        learn_rounding(made, model, [], **QUICK)
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        learn_rounding(made, model, images(), steps=0)
    with pytest.raises(ValueError, match="drop: expected a probability"):
        learn_rounding(made, model, images(), drop=2.0)


def _work(rank: int) -> dict[str, Tensor]:
    model = trained()
    batches = images(2, seed=rank)
    return learn_rounding(quantized(model, 3), model, batches, **QUICK).state_dict()


def test_two_processes_agree(tmp_path: Path) -> None:
    first, second = run_ranks(_work, tmp_path)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    start = quantized(trained(), 3).state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in first.items())
