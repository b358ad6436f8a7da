"""What a file is for each target: types, fused nodes, and the same values."""

from __future__ import annotations

import collections
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hqod_ops.quant import QATConfig, Rule, calibrate, prepare_qat
from hqod_ops.quant.export import export_onnx
from hqod_ops.quant.export.targets import TARGETS
from hqod_ops.quant.nn import QATLayer
from python_tests.onnx_run import run

pytestmark = pytest.mark.require("onnx", "onnxruntime", "onnxscript")

EXAMPLE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Frozen(nn.Module):
    """A normalisation as multiplication and addition, with a channel that is off."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        factor = torch.linspace(-1, 1, channels)
        factor[1] = 0
        self.register_buffer("factor", factor[:, None, None])
        self.register_buffer("offset", torch.linspace(-1, 1, channels)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.offset


def norm(channels: int) -> nn.BatchNorm2d:
    """As training leaves one: factors of both signs."""
    made = nn.BatchNorm2d(channels)
    nn.init.uniform_(made.weight, -2, 2)
    nn.init.normal_(made.bias)
    nn.init.normal_(made.running_mean)
    nn.init.uniform_(made.running_var, 0.5, 2)
    return made


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, bias=False, groups=2), norm(8), nn.ReLU6()),
        *(nn.ConvTranspose2d(8, 6, 2, stride=2), norm(6), nn.SiLU()),
        *(nn.Conv2d(6, 8, 3), Frozen(8), nn.ReLU()),
        nn.Conv2d(8, 4, 1),
    )


def prepared(bits: int, model: nn.Module | None = None, **settings: Any) -> nn.Module:
    settings = {"edge_bits": bits, **settings}
    model = prepare_qat(model or network(), QATConfig(bits, bits, **settings))
    calibrate(model.eval(), [EXAMPLE], progress=False)
    for module in model.modules():
        if isinstance(module, QATLayer) and module.weight_quantizer is not None:
            with torch.no_grad():  # no code is -128, which has no opposite
                module.weight_quantizer.get_parameter("scale").mul_(1.02)
    return model


def operators(path: Path) -> collections.Counter[str]:
    import onnx

    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


def optimized(path: Path) -> collections.Counter[str]:
    """The operators that ONNX Runtime makes of a file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return operators(path.with_suffix(".optimized.onnx"))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("target", list(TARGETS))
def test_every_target_gives_the_outputs_of_the_model(
    target: str, bits: int, tmp_path: Path
) -> None:
    settings = {"act_options": {"signed": True}} if target == "tensorrt" else {}
    model = prepared(bits, per_channel=bits == 4, **settings)
    report = export_onnx(model, EXAMPLE, tmp_path / "m.onnx", target=target)
    assert report.steps <= 1
    wide = 3 * EXAMPLE  # beyond the ranges that calibration saw
    with torch.no_grad():
        expected = model(wide).numpy()
    (output,) = run(report.path, wide)
    # A code that lies between two others may be either, which few values show at 8 bits.
    difference = np.linalg.norm(output - expected) / np.linalg.norm(expected)
    assert difference < {2: 0.2, 4: 0.05, 8: 0.01}[bits]
    found = operators(report.path)
    if target == "smallest":
        assert found["BatchNormalization"] == 3
    else:
        assert report.opset == 18 and set(report.storage) <= {"INT8", "UINT8"}
        assert not found["BatchNormalization"]
        # Of the normalisation that is no batch norm; SiLU multiplies too.
        assert found["Mul"] == 1 and not found["Add"]
        assert ("INT8" in report.storage) and ("UINT8" in report.storage) == (target != "tensorrt")
        limited = 5 if bits < 8 and target != "tensorrt" else 0
        assert found["Clip"] == 1 + limited  # one is ReLU6


def test_convolutions_and_what_quantizes_their_outputs_are_fused(tmp_path: Path) -> None:
    layers = [nn.Conv2d(3, 8, 3), norm(8), nn.ReLU()], [nn.Conv2d(8, 8, 3), norm(8), nn.ReLU()]
    model = nn.Sequential(*layers[0], *layers[1], nn.Conv2d(8, 4, 1))
    for bits in (4, 8):
        export_onnx(prepared(bits, model), EXAMPLE, tmp_path / f"{bits}.onnx")
        assert optimized(tmp_path / f"{bits}.onnx")["QLinearConv"] == 2
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.running_var)
        model = nn.Sequential(*network()[:6], nn.Conv2d(8, 4, 1))


def test_a_code_without_an_opposite_stays_behind_its_norm(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm(8))
    nn.init.constant_(model.get_parameter("1.weight"), -1.0)
    prepare_qat(model, QATConfig(8, 8))
    calibrate(model.eval(), [EXAMPLE], progress=False)
    with torch.no_grad():
        model.get_parameter("0.weight").view(-1)[0] = -100  # the code -128
    report = export_onnx(model, EXAMPLE, tmp_path / "m.onnx")
    assert operators(report.path)["BatchNormalization"] == 1 and report.steps <= 1


class Levels(nn.Module):
    """One convolution with a norm for each level."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norms = nn.ModuleList([norm(8), norm(8)])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(norm(self.conv(x * 2**i)) for i, norm in enumerate(self.norms))


def test_a_shared_weight_gets_the_scales_of_every_norm(tmp_path: Path) -> None:
    import onnx

    model = prepared(8, Levels())
    report = export_onnx(model, EXAMPLE, tmp_path / "m.onnx")
    assert not operators(report.path)["BatchNormalization"]
    file = onnx.load(report.path)
    weights = [entry for entry in file.graph.initializer if entry.name.endswith(".scale")]
    assert sum("weight" in entry.name for entry in weights) == 2
    with torch.no_grad():
        for ours, theirs in zip(run(report.path, EXAMPLE), model(EXAMPLE), strict=True):
            assert np.linalg.norm(ours - theirs.numpy()) < 0.01 * np.linalg.norm(ours)


OVERLAPPING = """
import os, signal
from hqod_ops.quant.export.evaluate import OpenVINO

signal.signal(signal.SIGCHLD, lambda *_: None)
first, second = OpenVINO({path!r}), OpenVINO({path!r})
del first
del second
os.kill(os.getpid(), signal.SIGCHLD)
"""
"""Two files in OpenVINO, of which the first goes before the second: a signal after it is survived
only where they share a core."""


@pytest.mark.require("openvino")
def test_openvino_checks_its_files(tmp_path: Path) -> None:
    report = export_onnx(prepared(4), EXAMPLE, tmp_path / "m.onnx", target="openvino")
    assert report.evaluator.startswith("openvino ") and report.steps <= 1
    code = OVERLAPPING.format(path=str(report.path))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_what_tensorrt_cannot_express(tmp_path: Path) -> None:
    model = prepared(8)
    message = r"3\.input_quantizer: target 'tensorrt' knows signed types .*codes are in \[0, 255\]"
    with pytest.raises(ValueError, match=message):
        export_onnx(model, EXAMPLE, tmp_path / "m.onnx", target="tensorrt")
    rule = [Rule("*", act_quantizer="lsq_plus")]
    with pytest.raises(ValueError, match=r"zero points in"):
        export_onnx(prepared(4, overrides=rule), EXAMPLE, tmp_path / "m.onnx", target="tensorrt")
    assert not list(tmp_path.iterdir())


def test_a_target_that_there_is_not(tmp_path: Path) -> None:
    message = "target: expected one of onnxruntime, openvino, tensorrt, smallest, got 'tflite'"
    with pytest.raises(ValueError, match=message):
        export_onnx(prepared(8), EXAMPLE, tmp_path / "m.onnx", target="tflite")
