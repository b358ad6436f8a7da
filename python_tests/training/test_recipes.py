"""Recipes of every kind of quantization train, and leave a checkpoint that loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("pycocotools")

from hqod_ops.cli import main
from hqod_ops.detection.models.detector import Detector
from hqod_ops.quant import QUANTIZERS, LevelBatchNorm2d, placement, quantizer_parameters
from hqod_ops.training import ConfigError
from hqod_ops.training.build import MODELS, build_model, load_detector
from hqod_ops.training.files import read_checkpoint
from hqod_ops.training.reading import from_dict, read
from hqod_ops.training.run import Run
from hqod_ops.training.settings import RunConfig

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = (
    *("data.size=64", "data.train_images=8", "data.test_images=2", "data.calibration_images=4"),
    *("model.stem=4", "model.widths=[4, 4]", "model.depths=[1, 1]", "model.channels=4"),
    *("model.head_depth=1", "model.groups=2", "schedule.epochs=1", "schedule.batch_size=4"),
)


def train(folder: Path, *options: str, name: str = "run") -> tuple[Detector, RunConfig]:
    """Train with the command, on little, and load what it left."""
    command = ["train", "--name", name, "--runs", str(folder), "--quiet", "--threads", "1"]
    tiny = [part for text in TINY for part in ("--set", text)]
    assert main([*command, "--device", "cpu", *tiny, *options]) == 0
    model, config, _ = load_detector(folder / name)
    trained = read_checkpoint(folder / name)["model"]
    assert all(torch.equal(trained[k], v) for k, v in model.state_dict().items())
    assert len(model.detect(torch.rand(1, 3, 64, 64))) == 1
    return model, config


def recipe(name: str) -> tuple[str, str]:
    return "--recipe", str(RECIPES / f"{name}.toml")


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def test_tqt(tmp_path: Path) -> None:
    model, config = train(tmp_path, *recipe("digits_w4_tqt"))
    assert config.quant.weight_quantizer == "tqt" and quantizer_parameters(model)
    assert count(model, QUANTIZERS["tqt"]) > 0 and count(model, QUANTIZERS["lsq"]) == 0


def test_frozen_tqt_by_its_preset(tmp_path: Path) -> None:
    model, _ = train(tmp_path, "--set", "quant.preset=tqt_w4a4")
    assert count(model, QUANTIZERS["tqt_frozen"]) > 0 and not quantizer_parameters(model)


def test_lsq_plus(tmp_path: Path) -> None:
    model, _ = train(tmp_path, *recipe("digits_w4_lsq_plus"))
    assert count(model, QUANTIZERS["lsq_plus"]) > 0 and count(model, QUANTIZERS["lsq"]) > 0


def test_quantizers_on_the_producers(tmp_path: Path) -> None:
    model, config = train(
        tmp_path, *recipe("digits_w4_lsq_plus"), "--set", "quant.placement=producers"
    )
    assert config.quant.placement == "producers"
    assert placement(model.network).placed


def test_level_norms_of_aqd(tmp_path: Path) -> None:
    """In floating point and, from that checkpoint, quantized."""
    train(tmp_path, *recipe("digits_fp32"), "--set", "model.level_norms=true", name="float")
    train(tmp_path, *recipe("digits_w4_level_norms"), "--init", str(tmp_path / "float"), name="w4")
    for name in ("float", "w4"):
        model, _, _ = load_detector(tmp_path / name)
        assert count(model, LevelBatchNorm2d) == 2 and count(model, nn.GroupNorm) == 0
        norm = next(m for m in model.modules() if isinstance(m, LevelBatchNorm2d))
        means = [level.get_buffer("running_mean") for level in norm.norms]
        assert len(means) == 2 and not torch.equal(*means)  # each saw its own level


@pytest.mark.parametrize(
    "setting", ["batch_norm=fold", "batch_norm=freeze", "foreach=true", "per_channel=true"]
)
def test_fields_that_change_how_the_network_runs(tmp_path: Path, setting: str) -> None:
    model, _ = train(tmp_path, "--bits", "4", "--set", f"quant.{setting}")
    assert quantizer_parameters(model)
    assert (count(model, nn.BatchNorm2d) == 0) == ("fold" in setting)


def test_rules(tmp_path: Path) -> None:
    """Only what a rule names is quantized, where the rest is float."""
    rule = '{pattern = "head.*_tower.*", weight_bits = 4, act_bits = "float"}'
    model, config = train(tmp_path, "--set", f"quant.overrides=[{rule}]")
    assert config.quantized and count(model, QUANTIZERS["lsq"]) == 2


def test_patterns_that_fit_nothing_are_named(tmp_path: Path) -> None:
    data = {"train_images": 8, "test_images": 2}
    values = {"device": "cpu", "data": data, "quant": {"bits": 4, "first": "nowhere"}}
    with pytest.raises(ConfigError, match="^quant.first: no convolution or linear layer fits"):
        Run(from_dict(values), tmp_path).train(progress=False)


def test_published_recipes_train_scales_as_weights() -> None:
    recipes = sorted(RECIPES.glob("published_*.toml"))
    assert len(recipes) == 2
    for path in recipes:
        config = from_dict(read(path))
        assert config.quantized and config.loss.hqod and config.schedule.scale_lr == 1.0
        assert config.schedule.scale_decay == config.schedule.weight_decay


class _Grey(Detector):
    """A detector of another kind: one convolution that learns to give 0, and finds nothing."""

    stride = 16

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.network = nn.Conv2d(3, num_classes, 16, stride=16)

    def losses(self, images: torch.Tensor, targets: Any) -> dict[str, torch.Tensor]:
        return {"square": self.network(images).square().mean()}

    def detect(self, images: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        none = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0)}
        return [{**none, "labels": torch.zeros(0, dtype=torch.int64)} for _ in images]


def test_kinds_of_detectors_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "grey", lambda config, num_classes: _Grey(num_classes))
    model, _ = train(tmp_path, "--set", "model.kind=grey")
    assert isinstance(model, _Grey)
    assert read_checkpoint(tmp_path / "run")["history"][0]["terms"].keys() == {"square"}
    with pytest.raises(ConfigError, match="^model.kind: expected one of 'atss', 'grey', got 'yo'"):
        build_model(from_dict({"model": {"kind": "yo"}}), 10)
    with pytest.raises(ConfigError, match="^model.level_norms: expected a head_depth of at least"):
        build_model(from_dict({"model": {"level_norms": True, "head_depth": 0}}), 10)
