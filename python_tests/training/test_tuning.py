"""From a trained run to a quantized one without training, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("pycocotools")

from hqod_ops.cli import main
from hqod_ops.training.build import load_detector

TINY = [
    *("--set", "data.size=64"),
    *("--set", "data.train_images=16"),
    *("--set", "data.test_images=3"),
    *("--set", "model.stem=8"),
    *("--set", "model.widths=[8, 8, 16]"),
    *("--set", "model.channels=8"),
    *("--set", "model.head_depth=1"),
    *("--batch-size", "4", "--epochs", "1", "--device", "cpu", "--threads", "1"),
]
QUIET = ["--quiet", "--threads", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a float run."""
    folder = tmp_path_factory.mktemp("runs")
    options = ["--data", "digits", "--runs", str(folder), "--name", "fp32", *TINY]
    assert main(["train", *options]) == 0
    return folder


def test_from_a_float_run_to_a_file(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--runs", str(runs), "--images", "8", *QUIET]
    capsys.readouterr()
    assert main(["quantize", str(runs / "fp32"), "--name", "w4", "--bits", "4", *where]) == 0
    printed = capsys.readouterr().out
    assert "| 4-bit LSQ, post-training |" in printed and "calibrate" in printed
    assert "| FP32 |" in printed and "| score shift |" in printed
    settings = json.loads((runs / "w4" / "config.json").read_text())
    assert settings["tuning"] == {"post_training": True, "learn_rounding": False}
    model, config, _ = load_detector(runs / "w4")
    assert config.quantized and any("quantizer" in name for name in model.state_dict())
    assert main(["eval", str(runs / "w4"), "--quiet"]) == 0
    assert main(["quantize", str(runs / "fp32"), "--name", "w4", "--bits", "4", *where]) == 2
    assert "holds a run already" in capsys.readouterr().err


@pytest.mark.require("onnx", "onnxruntime", "onnxscript")
def test_a_quantized_run_exports(runs: Path, tmp_path: Path) -> None:
    options = ["--runs", str(runs), "--images", "8", "--learn-rounding", *QUIET]
    assert main(["quantize", str(runs / "fp32"), "--name", "w8", "--bits", "8", *options]) == 0
    assert main(["export", str(runs / "w8"), "--out", str(tmp_path / "w8.onnx")]) == 0


def test_bits_by_sensitivity(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, recipe = tmp_path / "sensitivity.json", tmp_path / "bits.toml"
    options = ["--bits", "2", "4", "8", "--images", "4", "--output", str(found), *QUIET]
    assert main(["sensitivity", str(runs / "fp32"), *options]) == 0
    assert found.is_file() and found.with_suffix(".png").is_file()
    assert main(["search", str(found), "--average-bits", "4.5", "--output", str(recipe)]) == 0
    where = ["--runs", str(runs), "--images", "4", *QUIET]
    options = ["--name", "mixed", "--recipe", str(recipe)]
    assert main(["quantize", str(runs / "fp32"), *options, *where]) == 0
    settings = json.loads((runs / "mixed" / "config.json").read_text())
    widths = {rule["weight_bits"] for rule in settings["quant"]["overrides"]}
    assert widths <= {2, 4, 8} and len(widths) > 1
    capsys.readouterr()
    assert main(["search", str(found), "--average-bits", "1"]) == 2
    assert "the least that can is 2" in capsys.readouterr().err


def test_what_cannot_be_quantized(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--runs", str(runs), *QUIET]
    assert main(["quantize", str(runs / "fp32"), "--name", "x", *where]) == 2
    assert "expected --bits, or --recipe with a table [quant]" in capsys.readouterr().err
    assert main(["quantize", str(runs / "no"), "--name", "x", "--bits", "4", *where]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    if (runs / "w4").is_dir():
        assert main(["quantize", str(runs / "w4"), "--name", "y", "--bits", "4", *where]) == 2
        assert "expected a run in float" in capsys.readouterr().err
