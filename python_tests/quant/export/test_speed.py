"""Speed of files beside each other: what is measured, counted and refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from hqod_ops.cli import main
from hqod_ops.quant import calibrate, prepare_qat
from hqod_ops.quant.export import bench_export, export_onnx, speed_table

pytestmark = pytest.mark.require("onnx", "onnxruntime", "onnxscript")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of a float model and of the same one in 8 bits."""
    folder = tmp_path_factory.mktemp("speed")
    torch.manual_seed(0)
    x = torch.randn(1, 3, 16, 16)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)]
    model = nn.Sequential(*layers).eval()
    torch.onnx.export(model, (x,), folder / "float.onnx", dynamo=True, verbose=False)
    calibrate(prepare_qat(model, "w8a8", first="0", prediction="4"), [x], progress=False)
    export_onnx(model, x, folder / "w8a8.onnx")
    return [folder / "float.onnx", folder / "w8a8.onnx"]


def test_onnxruntime(files: list[Path]) -> None:
    ticks = itertools.count()
    float_, quantized = bench_export(
        files, runtimes=["onnxruntime"], rounds=3, clock=lambda: next(ticks) / 1000
    )
    assert float_.integer == 0 and sum(float_.float_left.values()) == 3
    assert quantized.integer == 2 and sum(quantized.float_left.values()) == 1
    assert quantized.milliseconds == pytest.approx(1) and quantized.ratio == pytest.approx(1)
    assert float_.runtime.startswith("onnxruntime ") and float_.file == "float.onnx"


@pytest.mark.require("openvino")
def test_openvino(files: list[Path]) -> None:
    float_, quantized = bench_export(files, runtimes=["openvino"], rounds=1)
    assert (float_.integer, quantized.integer) == (0, 3) and not quantized.float_left
    assert quantized.ratio > 0


def test_command(files: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--runtime", "onnxruntime", "--rounds", "1", "--json"]
    assert main(["bench-export", *map(str, files), *options]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["file"] for row in rows] == ["float.onnx", "w8a8.onnx"]
    assert main(["bench-export", str(files[0].with_name("no.onnx")), *options]) == 2
    assert "there is no file" in capsys.readouterr().err


def test_a_file_that_does_not_run(files: list[Path]) -> None:
    broken = files[0].with_name("broken.onnx")
    import onnx

    model = onnx.load(files[1])
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, broken)
    found = bench_export([files[1], broken], runtimes=["onnxruntime"], rounds=1)
    assert not found[0].problem and "NoSuchOperator" in found[1].problem
    assert found[1].problem in speed_table(found)


def test_bad_arguments(files: list[Path]) -> None:
    with pytest.raises(ValueError, match="files: expected at least one, got none"):
        bench_export([])
    with pytest.raises(
        ValueError, match="runtimes: expected some of onnxruntime, openvino, got 'x'"
    ):
        bench_export(files, runtimes=["x"])
    with pytest.raises(ValueError, match="rounds"):
        bench_export(files, rounds=0)
