"""Files as earlier versions wrote them: recipes, settings and checkpoints with six quant fields.

``before/`` was written by the version in which ``[quant]`` held bits, edge_bits, weight_init,
calibration_images, scale_lr and scale_decay: ``fp32`` is a finished run, ``w2`` one that was
stopped in its second epoch, with the log that the same version left when it went on.
"""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("pycocotools")

from hqod_ops.cli import main
from hqod_ops.quant import QATConfig
from hqod_ops.quant.config import FLOAT_BITS
from hqod_ops.training.build import load_detector
from hqod_ops.training.files import read_checkpoint, read_result
from hqod_ops.training.reading import from_dict, read

BEFORE = Path(__file__).parent / "before"
W2 = QATConfig(2, 2, 6, weight_init="lsq")
CLOSE = 1e-3
"""The same machine gives the same bits; another's kernels sum in another order, and a code at a tie
may go the other way."""


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    shutil.copytree(BEFORE, tmp_path / "runs")
    return tmp_path / "runs"


def test_recipes() -> None:
    digits = from_dict(read(BEFORE / "recipes" / "digits_w2_hqod.toml"))
    assert digits.quant == QATConfig(2, 2, weight_init="lsq") and digits.schedule.scale_lr == 0.1
    published = from_dict(read(BEFORE / "recipes" / "published_4bit.toml"))
    assert published.quant == QATConfig(4, 4)
    assert (published.schedule.scale_lr, published.schedule.scale_decay) == (1.0, 1e-4)


def test_settings_of_runs() -> None:
    config = from_dict(read(BEFORE / "w2" / "config.json"))
    assert config == from_dict(read_checkpoint(BEFORE / "w2")["config"])
    assert config.quant == W2 and config.data.calibration_images == 3
    assert (config.schedule.scale_lr, config.schedule.scale_decay) == (0.5, 1e-4)
    assert from_dict(read(BEFORE / "fp32" / "config.json")).quant.weight_bits == FLOAT_BITS


def test_checkpoint_computes_the_same() -> None:
    """The sums are those that the earlier version gave."""
    model, config, categories = load_detector(BEFORE / "w2")
    assert config.quant == W2 and len(categories) == 10
    with torch.no_grad():
        outputs = model(torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64))
    sums = [output.double().abs().sum().item() for output in outputs]
    assert sums == pytest.approx([14687.5043, 20.43874, 6.08185], rel=CLOSE)


def test_stopped_run_goes_on(runs: Path) -> None:
    expected = [json.loads(line) for line in (runs / "w2" / "log.jsonl").read_text().splitlines()]
    command = ["train", "--resume", "--name", "w2", "--runs", str(runs), "--quiet"]
    assert main([*command, "--threads", "1", "--set", "quant.scale_lr=0.5"]) == 0
    history = read_checkpoint(runs / "w2")["history"]
    assert [entry["loss"] for entry in history] == pytest.approx(
        [entry["loss"] for entry in expected],
        rel=CLOSE,
    )
    assert read_result(runs / "w2")["config"]["quant"]["weight_bits"] == 2


def test_resume_still_sees_what_changed(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--resume", "--name", "w2", "--runs", str(runs), "--bits", "4"]
    assert main(command) == 2
    assert "cannot resume: quant." in capsys.readouterr().err


def test_finished_runs_are_reported_and_started_from(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ["--recipe", str(BEFORE / "w2" / "config.json"), "--name", "again", "--bits", "4"]
    start = ["--init", str(runs / "fp32"), "--runs", str(runs), "--quiet", "--threads", "1"]
    assert main(["train", *recipe, *start]) == 0
    assert main(["report", str(runs)]) == 0
    printed = capsys.readouterr().out
    assert "| FP32 |" in printed and "| 4-bit LSQ + HQOD |" in printed


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("train", "load_detector"),
        ("train", "open_data"),
        ("train", "Run"),
        ("config", "ModelConfig"),
        ("config", "ConfigError"),
        ("atss", "ATSS"),
    ],
)
def test_modules_of_before(module: str, name: str) -> None:
    """Scripts import these from where they were."""
    old = importlib.import_module(f"hqod_ops.detection.{module}")
    assert getattr(old, name).__name__ == name
    with pytest.raises(AttributeError, match=f"hqod_ops.detection.{module}"):
        old.nothing  # noqa: B018
