"""Modules replaced after quantizers were placed on producers: followed, or an error."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hqod_ops.quant import (
    QATConfig,
    calibrate,
    export_onnx,
    place_on_producers,
    placement,
    prepare_qat,
)
from python_tests.quant.dataflow.test_producers import Block, images, made


class Split(nn.Module):
    """A batch normalisation read by two layers, beside an addition in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.last, self.other = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        y = self.left(x) + self.right(x)
        return self.last(y) * self.other(y)


@pytest.mark.parametrize("compiled", ["", "at once", "afterwards"])
def test_a_conversion_to_synchronized_norms_is_followed(compiled: str) -> None:
    model, report = made(Split())
    assert [entry.producers for entry in report.placed] == [("norm",), ("Split:add",)]
    expected = model.eval()(images())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    if compiled:
        torch._dynamo.reset()
        if compiled == "afterwards":
            converted(images())
        run = torch.compile(converted, backend="aot_eager", fullgraph=compiled == "afterwards")
        torch.testing.assert_close(run(images()), expected)
    assert torch.equal(converted(images()), expected)
    assert torch.equal(copy.deepcopy(converted)(images()), expected)


@pytest.mark.parametrize("batch_norm", ["train", "freeze"])
@pytest.mark.parametrize("place", ["by prepare_qat", "by itself", ""])
@pytest.mark.parametrize("when", ["first", "before placement", "before calibration", "last"])
def test_a_conversion_to_synchronized_norms_at_any_time(
    when: str, place: str, batch_norm: str
) -> None:
    def run(when: str) -> tuple[torch.Tensor, nn.Module]:
        def convert(moment: str) -> None:
            if moment == when:
                nn.SyncBatchNorm.convert_sync_batchnorm(model)

        torch.manual_seed(0)
        model: nn.Module = Split()
        convert("first")
        where = "producers" if place == "by prepare_qat" else "inputs"
        config = QATConfig(4, 4, first=(), prediction=(), batch_norm=batch_norm, placement=where)
        prepare_qat(model, config)
        convert("before placement")
        if place == "by itself":
            place_on_producers(model)
        convert("before calibration")
        calibrate(model, [images(1)], progress=False)
        convert("last")
        return model.eval()(images()), model

    expected, _ = run("never")
    got, model = run(when)
    assert isinstance(model.norm, nn.SyncBatchNorm)
    assert torch.equal(got, expected)
    assert placement(model).placed or not place
    before = model.norm.running_mean.clone()  # type: ignore[union-attr]
    model.train()(images())
    assert torch.equal(before, model.norm.running_mean) is (batch_norm == "freeze")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "module"),
    [("block1.relu", nn.ReLU()), ("lateral", nn.Conv2d(6, 6, 1)), ("block1", Block(4, 6))],
)
def test_another_module_is_an_error(name: str, module: nn.Module) -> None:
    model, _ = made()
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, module)
    torch._dynamo.reset()
    for run in (model, model, torch.compile(model, backend="eager")):
        with pytest.raises(RuntimeError, match=f"{name}.*replace modules before place_on_prod"):
            run(images())


def test_a_wrapped_module_is_still_there() -> None:
    model, _ = made()
    expected = model.eval()(images())
    model.block1 = torch.compile(model.block1, backend="eager")
    torch.testing.assert_close(model(images()), expected)


@pytest.mark.require("onnx", "onnxruntime", "onnxscript")
def test_export_of_a_part_says_so(tmp_path: Path) -> None:
    model, _ = made(Split())
    part = nn.Sequential(model.norm, model.left).eval()
    part[0] = nn.Identity()
    with pytest.raises(RuntimeError, match="left: expected an input from norm"):
        export_onnx(part, torch.randn(1, 8, 4, 4), tmp_path / "m.onnx")
