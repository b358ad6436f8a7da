"""Scores that keep their meaning."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hqod_ops.quant import QATConfig, calibrate, prepare_qat
from hqod_ops.quant.tuning import calibrate_scores
from python_tests.quant.tuning.nets import error, images, quantized, trained, unquantized
from python_tests.ranks import run_ranks


@torch.no_grad()
def shift(model: nn.Module, reference: nn.Module) -> float:
    """The mean score shift of all classes and places."""
    found = [
        (z.sigmoid() - y.sigmoid()).mean(dim=(0, 2, 3)).abs().mean().item()
        for x in images(seed=9)
        for y, z in zip(reference(x), model(x), strict=True)
    ]
    return sum(found) / len(found)


@pytest.mark.parametrize("bits", [2, 3])
def test_scores_are_closer_to_those_in_float(bits: int) -> None:
    model = trained()
    made = quantized(model, bits, act_bits=4)
    before, noise = shift(made, model), error(made, model)
    codes = made.logits.quantized_weight() / made.logits.weight_quantizer.scale[:, None, None, None]
    assert calibrate_scores(made, model, images()) is made
    assert shift(made, model) < 0.5 * before and error(made, model) < noise
    scale = made.logits.weight_quantizer.scale[:, None, None, None]
    # The codes of the weight are those of before: what is stored and exported is as good.
    torch.testing.assert_close(made.logits.quantized_weight() / scale, codes, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"per_channel": False}, {"weight_quantizer": "tqt_frozen"}, {"weight_quantizer": "dorefa"}],
)
def test_offsets_alone_where_scales_cannot_change(options: dict[str, object]) -> None:
    model = trained()
    config = QATConfig(
        3, 4, **{"per_channel": options.get("weight_quantizer") == "tqt_frozen"} | options
    )  # type: ignore[arg-type]
    made = calibrate(prepare_qat(copy.deepcopy(model), config), images(), progress=False)
    before, weight = shift(made, model), made.logits.weight.clone()
    calibrate_scores(made, model, images())
    assert shift(made, model) < before
    assert torch.equal(made.logits.weight, weight)


def test_batch_norm_behind_the_prediction_layer_takes_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))
    model.eval()
    config = QATConfig(2, 4, first="0", prediction="2")
    made = calibrate(prepare_qat(copy.deepcopy(model), config), images(), progress=False)
    made[0].weight.data.mul_(1.2)
    calibrate_scores(made, model, images(), layers="2")
    assert torch.equal(made[2].bias, model[2].bias)
    assert not torch.equal(made[3].weight, model[3].weight)
    assert error(nn.Sequential(made, Listed()), nn.Sequential(model, Listed())) < 0.2


class Listed(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [x]


def test_without_quantization_nothing_changes() -> None:
    model = trained()
    made = quantized(model)
    unquantized(made)
    calibrate_scores(made, model, images())
    # Sums in float64, a bias in float32.
    torch.testing.assert_close(made.logits.weight, model.logits.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made.logits.bias, model.logits.bias, rtol=1e-5, atol=1e-5)


def test_bad_input() -> None:
    model = trained()
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate_scores(quantized(model), model, [])
    with pytest.raises(ValueError, match="layers: no module fits 'cls'"):
        calibrate_scores(quantized(model), model, images(), layers="cls")
    with pytest.raises(ValueError, match="float_model: .* no 'logits'"):
        calibrate_scores(quantized(model), nn.Sequential(), images())
    plain = calibrate(prepare_qat(nn.Sequential(nn.Conv2d(3, 2, 1)), "w8a8"), images())
    with pytest.raises(ValueError, match="prediction layers of a Sequential are not known"):
        calibrate_scores(plain, plain, images())


def _work(rank: int) -> dict[str, Tensor]:
    model, batches = trained(), images(3)
    share = batches[:1] if rank else batches[1:]
    return calibrate_scores(quantized(model), model, share).state_dict()


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    first, second = run_ranks(_work, tmp_path)
    alone = calibrate_scores(quantized(trained()), trained(), images(3)).state_dict()
    for name, value in first.items():
        assert torch.equal(value, second[name])
        torch.testing.assert_close(value, alone[name], rtol=1e-5, atol=1e-6)
