"""Post-training quantization in one call."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hqod_ops.quant import QATConfig, export_onnx
from hqod_ops.quant.tuning import quantize
from python_tests.quant.tuning.nets import error, images, quantized, trained

CONFIG = QATConfig(3, 8, per_channel=True)


def test_each_step_is_reported_and_the_error_sinks() -> None:
    model = trained()
    batches = iter(images())  # a generator is read once
    made, report = quantize(
        copy.deepcopy(model), batches, CONFIG, learn={"steps": 40}, progress=False
    )
    steps = [step.step for step in report.steps]
    assert steps == ["calibrate", "re-estimate", "learn rounding", "correct bias"]
    assert report.steps[-1].snr > report.steps[0].snr + 2
    assert error(made, model) < error(quantized(model, 3), model)
    assert report.size_mb < report.float_size_mb and len(report.parts) == 4
    text = str(report)
    assert "3 batch normalisations" in text and "W3-8 A8" in text and not made.training


def test_steps_can_be_left_out() -> None:
    made, report = quantize(
        trained(), images(), CONFIG, reestimate=False, correct=False, progress=False
    )
    assert [step.step for step in report.steps] == ["calibrate"]
    assert torch.equal(made.norm.running_mean, trained().norm.running_mean)


class Boxes(nn.Module):
    """A detector of which only some outputs are left, as after non-maximum suppression."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).flatten()
        return y[y > 0]


def test_outputs_that_cannot_be_compared_are_left_blank(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _, report = quantize(Boxes(), images(), "hqod_w2a2", first=(), prediction=(), progress=False)
    assert math.isnan(report.steps[0].snr)
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["steps"][0]["step"] == "calibrate"


def test_a_step_that_makes_it_worse_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(model: nn.Module, *args: object, **options: object) -> None:
        model.head.bias = nn.Parameter(torch.full((8,), 9.0))  # type: ignore[union-attr]
        model.logits.bias.data.add_(1.0)  # type: ignore[union-attr, operator]

    monkeypatch.setattr("hqod_ops.quant.tuning.post_training.correct_bias", spoil)
    made, report = quantize(trained(), images(), CONFIG, progress=False)
    assert "taken back" in report.steps[-1].did
    assert report.steps[-1].snr == report.steps[-2].snr
    assert made.head.bias is None and torch.equal(made.logits.bias, trained().logits.bias)


def test_no_batches() -> None:
    model = trained()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="at least one batch"):
        quantize(model, [], CONFIG, progress=False)
    assert [type(module) for module in model.modules()] == kinds  # it is as it was


@pytest.mark.require("onnx", "onnxruntime", "onnxscript")
def test_the_export_is_that_of_the_model(tmp_path: Path) -> None:
    made, _ = quantize(trained(), images(), CONFIG, learn={"steps": 5}, progress=False)
    export_onnx(made, images()[0][:1], tmp_path / "model.onnx")  # it compares the outputs itself
    assert (tmp_path / "model.onnx").stat().st_size > 0
