"""Recipes of every kind of quantization train, and leave a checkpoint that loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("pycocotools")

from hqod_ops.cli import main
from hqod_ops.detection.models.detector import Detector
from hqod_ops.quant import QUANTIZERS, LevelBatchNorm2d, quantizer_parameters
from hqod_ops.training import ConfigError
from hqod_ops.training.build import MODELS, build_model, load_detector
from hqod_ops.training.files import read_checkpoint
from hqod_ops.training.reading import from_dict, read
from hqod_ops.training.run import Run
from hqod_ops.training.settings import RunConfig

TINY = """
device = "cpu"
[data]
size = 64
train_images = 8
test_images = 2
calibration_images = 4
[schedule]
epochs = 1
batch_size = 4
[model]
stem = 4
widths = [4, 4]
depths = [1, 1]
channels = 4
head_depth = 1
groups = 2
"""


def train(folder: Path, recipe: str) -> tuple[Detector, RunConfig, Path]:
    """Train by a recipe with the command, and load what it left."""
    file = folder / "recipe.toml"
    file.write_text(TINY + recipe)
    command = ["train", "--recipe", str(file), "--name", "run", "--runs", str(folder), "--quiet"]
    assert main([*command, "--threads", "1"]) == 0
    model, config, _ = load_detector(folder / "run")
    trained = read_checkpoint(folder / "run")["model"]
    assert all(torch.equal(trained[k], v) for k, v in model.state_dict().items())
    assert len(model.detect(torch.rand(1, 3, 64, 64))) == 1
    return model, config, folder / "run"


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def trained_scales(model: nn.Module) -> int:
    return len(quantizer_parameters(model))


def test_tqt(tmp_path: Path) -> None:
    model, config, _ = train(
        tmp_path, '[quant]\nbits = 4\nweight_quantizer = "tqt"\nact_quantizer = "tqt"\n'
    )
    assert config.quant.weight_quantizer == "tqt" and trained_scales(model) > 0
    assert count(model, QUANTIZERS["tqt"]) > 0 and count(model, QUANTIZERS["lsq"]) == 0


def test_frozen_tqt_by_its_preset(tmp_path: Path) -> None:
    model, _, _ = train(tmp_path, '[quant]\npreset = "tqt_w4a4"\n')
    assert count(model, QUANTIZERS["tqt_frozen"]) > 0 and trained_scales(model) == 0


def test_lsq_plus(tmp_path: Path) -> None:
    model, _, _ = train(tmp_path, '[quant]\nbits = 3\nact_quantizer = "lsq_plus"\n')
    assert count(model, QUANTIZERS["lsq_plus"]) > 0 and count(model, QUANTIZERS["lsq"]) > 0


def test_level_norms_of_aqd(tmp_path: Path) -> None:
    """In floating point and, from that checkpoint, quantized."""
    norms = TINY + "level_norms = true\n"
    (tmp_path / "float.toml").write_text(norms)
    command = ["train", "--recipe", str(tmp_path / "float.toml"), "--name", "float"]
    assert main([*command, "--runs", str(tmp_path), "--quiet", "--threads", "1"]) == 0
    recipe = "level_norms = true\n[quant]\nbits = 4\n[loss]\nhqod = true\n"
    start = f'init = "{tmp_path / "float"}"\n'
    (tmp_path / "w4.toml").write_text(start + TINY + recipe)
    command = ["train", "--recipe", str(tmp_path / "w4.toml"), "--name", "w4", "--quiet"]
    assert main([*command, "--runs", str(tmp_path), "--threads", "1"]) == 0
    for name in ("float", "w4"):
        model, _, _ = load_detector(tmp_path / name)
        assert count(model, LevelBatchNorm2d) == 2 and count(model, nn.GroupNorm) == 0
        norm = next(m for m in model.modules() if isinstance(m, LevelBatchNorm2d))
        means = [level.running_mean for level in norm.norms]
        assert len(means) == 2 and not torch.equal(means[0], means[1])  # each saw its own level


@pytest.mark.parametrize(
    "setting",
    ['batch_norm = "fold"', 'batch_norm = "freeze"', "foreach = true", "per_channel = true"],
)
def test_fields_that_change_how_the_network_runs(tmp_path: Path, setting: str) -> None:
    model, _, _ = train(tmp_path, f"[quant]\nbits = 4\n{setting}\n")
    assert trained_scales(model) > 0
    assert (count(model, nn.BatchNorm2d) == 0) == ("fold" in setting)


def test_rules(tmp_path: Path) -> None:
    """Only what a rule names is quantized, where the rest is float."""
    rule = '[[quant.overrides]]\npattern = "head.*_tower.*"\nweight_bits = 4\nact_bits = "float"\n'
    model, config, _ = train(tmp_path, rule)
    assert config.quantized and count(model, QUANTIZERS["lsq"]) == 2


def test_patterns_that_fit_nothing_are_named(tmp_path: Path) -> None:
    values = {"name": "x", "device": "cpu", "quant": {"bits": 4, "first": "nowhere"}}
    values["data"] = {"train_images": 8, "test_images": 2}
    with pytest.raises(ConfigError, match="^quant.first: no convolution or linear layer fits"):
        Run(from_dict(values), tmp_path).train(progress=False)


def test_published_recipes_scale_as_their_weights() -> None:
    recipes = sorted((Path(__file__).parents[2] / "recipes").glob("published_*.toml"))
    assert len(recipes) == 2
    for recipe in recipes:
        config = from_dict(read(recipe))
        assert config.quantized and config.loss.hqod and config.schedule.scale_lr == 1.0
        assert config.schedule.scale_decay == config.schedule.weight_decay


class _Grey(Detector):
    """A detector of another kind: one convolution that learns to give 0, and finds nothing."""

    stride = 16

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.network = nn.Conv2d(3, num_classes, 16, stride=16)
        self.network.qat_first = self.network.qat_prediction = ()  # type: ignore[assignment]

    def losses(self, images: torch.Tensor, targets: object) -> dict[str, torch.Tensor]:
        return {"square": self.network(images).square().mean()}

    def detect(self, images: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        none = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0)}
        return [{**none, "labels": torch.zeros(0, dtype=torch.int64)} for _ in images]


def test_another_kind_of_detector_is_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grey: Callable[[RunConfig, int], Detector] = lambda config, classes: _Grey(classes)  # noqa: E731
    monkeypatch.setitem(MODELS, "grey", grey)
    model, _, run = train(tmp_path, 'kind = "grey"\n')
    assert isinstance(model, _Grey)
    assert read_checkpoint(run)["history"][0]["terms"].keys() == {"square"}
    with pytest.raises(ConfigError, match="^model.kind: expected one of 'atss', 'grey', got 'yo'"):
        build_model(from_dict({"model": {"kind": "yo"}}), 10)
