"""Export of what cannot be exported: each one clear error, and nothing written."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hqod_ops.quant import LSQ, QATConfig, calibrate, prepare_qat
from hqod_ops.quant.export import NMS, detection_network, export_onnx
from hqod_ops.quant.quantizers.base import Quantizer
from hqod_ops.quant.quantizers.lsq_plus import LSQPlus

pytestmark = pytest.mark.require("onnx", "onnxruntime", "onnxscript")

EXAMPLE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def calibrated(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model = prepare_qat(model, QATConfig(8, 8, **settings))
    return calibrate(model, [EXAMPLE], progress=False)


def replace_input(model: nn.Module, quantizer: Quantizer, **scale: Any) -> nn.Module:
    quantizer.set_scale(**scale)
    model.get_submodule("2").input_quantizer = quantizer  # type: ignore[assignment]
    return model


class Halves(LSQPlus):
    """Its zero points are not whole."""

    def effective_zero_point(self, level: int = 0) -> Tensor:
        return super().effective_zero_point(level) + 0.5


class Wide(LSQPlus):
    """Its zero point is no code."""

    def effective_zero_point(self, level: int = 0) -> Tensor:
        return super().effective_zero_point(level) + 300


class Cubes(LSQ):
    """Its grid has no constant step."""

    def _quantize(self, x: Tensor, level: int) -> Tensor:
        return super()._quantize(x, level) ** 3


@pytest.mark.parametrize(
    ("quantizer", "message"),
    [
        (Halves(8), "2.input_quantizer: ONNX needs whole zero points, got .*3.5"),
        (Wide(8), r"2.input_quantizer: ONNX stores codes and zero point in one integer type"),
        (Cubes(8), "2.input_quantizer: ONNX cannot express this quantizer"),
    ],
    ids=["halves", "wide", "cubes"],
)
def test_quantizer_that_onnx_cannot_express(
    quantizer: Quantizer, message: str, tmp_path: Path
) -> None:
    zero = None if quantizer.symmetric else torch.tensor([3.0])
    model = replace_input(
        calibrated(), quantizer, scale=torch.tensor([0.01]), signed=False, zero_point=zero
    )
    with pytest.raises(ValueError, match=message):
        export_onnx(model, EXAMPLE, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_weight_that_onnx_cannot_express(tmp_path: Path) -> None:
    model = calibrated()
    quantizer = Cubes(8, signed=True)
    quantizer.set_scale(torch.tensor([0.01]), signed=True)
    model.get_submodule("0").weight_quantizer = quantizer  # type: ignore[assignment]
    message = "0.weight_quantizer: ONNX cannot express a Cubes whose values are not"
    with pytest.raises(ValueError, match=message):
        export_onnx(model, EXAMPLE, tmp_path / "m.onnx")


def test_model_that_is_not_ready(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match="expected a model from prepare_qat"):
        export_onnx(model, EXAMPLE, path)
    prepare_qat(model, "w8a8")
    message = r"0\.input_quantizer, 0\.weight_quantizer never were; run hqod_ops\.quant\.calibrate"
    with pytest.raises(ValueError, match=message):
        export_onnx(model, EXAMPLE, path)


def test_other_precisions_are_not_taken_silently(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(TypeError, match=r"0\.weight: expected float32, got torch\.float16"):
        export_onnx(calibrated().half(), EXAMPLE, path)
    with pytest.raises(TypeError, match=r"expected float32, got torch\.float64"):
        export_onnx(calibrated().double(), EXAMPLE.double(), path)
    with pytest.raises(TypeError, match=r"example\[0\]: expected float32, got torch\.bfloat16"):
        export_onnx(calibrated(), EXAMPLE.bfloat16(), path)


def test_opset(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="opset: expected at least 18, got 17"):
        export_onnx(calibrated(), EXAMPLE, tmp_path / "m.onnx", opset=17)
    with pytest.raises(TypeError, match="opset: expected an int, got the str '21'"):
        export_onnx(calibrated(), EXAMPLE, tmp_path / "m.onnx", opset="21")  # type: ignore[arg-type]


def test_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="path: there is no directory '.*none'"):
        export_onnx(calibrated(), EXAMPLE, tmp_path / "none" / "m.onnx")


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else self.conv(-x)


def test_control_flow_on_data(tmp_path: Path) -> None:
    model = calibrate(prepare_qat(Branch(), "w8a8"), [EXAMPLE], progress=False)
    with pytest.raises(RuntimeError, match="torch cannot export Branch to ONNX: .*data-dependent"):
        export_onnx(model, EXAMPLE, tmp_path / "m.onnx")


@pytest.mark.parametrize("missing", ["onnx", "onnx_ir", "onnxscript", "onnxruntime"])
def test_missing_package_names_the_extra(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name.partition(".")[0] == missing:
            raise ImportError(f"No module named {name!r}")
        return original(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(
        ImportError, match=rf'{missing} is needed .*pip install "hqod_ops\[export\]'
    ):
        export_onnx(calibrated(), EXAMPLE, tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": 1.5}, r"score: expected a value in \[0, 1\], got 1.5"),
        ({"iou": -0.1}, r"iou: expected a value in \[0, 1\], got -0.1"),
        ({"per_class": 0}, "per_class: expected at least 1, got 0"),
    ],
)
def test_settings_of_nms(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NMS(**settings)


def test_nms_needs_boxes_and_scores(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"nms: expected .* got outputs of shape \[\[1, 2, 6, 6\]\]"
    ):
        export_onnx(calibrated(), EXAMPLE, tmp_path / "m.onnx", nms=NMS())
    assert not list(tmp_path.iterdir())


def test_detection_network_of_something_else() -> None:
    with pytest.raises(TypeError, match="expected torchvision's RetinaNet, .* got Sequential"):
        detection_network(nn.Sequential())
    with pytest.raises(ValueError, match="outputs: expected one of raw, boxes, got 'masks'"):
        detection_network(nn.Sequential(), "masks")


def test_official_ties_are_named(tmp_path: Path) -> None:
    quantizers = {"act_quantizer": "tqt_frozen", "act_options": {"official_ties": True}}
    with pytest.raises(ValueError, match=r"0\.input_quantizer: .*cannot express official_ties"):
        export_onnx(calibrated(**quantizers), EXAMPLE, tmp_path / "m.onnx")
