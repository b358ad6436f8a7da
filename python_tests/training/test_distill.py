"""Runs that learn from a float run: with labels and without, after a stop, and what is refused."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("pycocotools")

from hqod_ops.cli import main
from hqod_ops.quant.config import QATConfig
from hqod_ops.training import ConfigError
from hqod_ops.training.build import (
    build_model,
    first_difference,
    load_float,
    load_teacher,
    quantize,
    set_scales,
)
from hqod_ops.training.data import open_data
from hqod_ops.training.files import read_checkpoint
from hqod_ops.training.run import Run
from hqod_ops.training.settings import DistillConfig, RunConfig, ScheduleConfig
from hqod_ops.training.trainer import Interrupted, Trainer
from python_tests.ranks import run_ranks
from python_tests.training.tiny import TINY, StopAt, same, tiny_config


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a float run."""
    made = tmp_path_factory.mktemp("runs")
    Run(tiny_config("fp32"), made).train(progress=False)
    return made


def student(folder: Path, name: str, labels: bool = True, epochs: int = 2) -> RunConfig:
    teacher = str(folder / "fp32")
    return tiny_config(
        name,
        init=teacher,
        quant=QATConfig(2, 4, batch_norm="freeze"),
        distill=DistillConfig(teacher=teacher, labels=labels),
        schedule=ScheduleConfig(epochs=epochs, batch_size=4, lr=2e-3),
    )


def test_without_labels_the_loss_goes_down(folder: Path) -> None:
    before = (folder / "fp32" / "last.pt").read_bytes()
    config = student(folder, "alone", labels=False, epochs=12)
    Run(config, folder).train(progress=False)
    state = read_checkpoint(folder / "alone")
    terms = [entry["terms"] for entry in state["history"]]
    assert all(set(term) == {"distill"} for term in terms)
    # Of 36 steps, after which a 2-bit student of 8 channels is not yet at its end.
    assert terms[-1]["distill"] < 0.8 * terms[0]["distill"]
    # Nothing of the teacher is kept, and its file is as it was.
    plain = replace(config, name="plain", distill=DistillConfig())
    Run(replace(plain, schedule=replace(plain.schedule, epochs=1)), folder).train(progress=False)
    assert state["model"].keys() == read_checkpoint(folder / "plain")["model"].keys()
    assert (folder / "fp32" / "last.pt").read_bytes() == before


@pytest.mark.parametrize("stop", [2, 4], ids=["first epoch", "second epoch"])
@pytest.mark.parametrize("labels", [True, False], ids=["labels", "alone"])
def test_resumed_distillation_is_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: bool, stop: int
) -> None:
    whole = student(folder, "whole", labels)
    whole = replace(whole, schedule=replace(whole.schedule, ema=0.5))
    Run(whole, tmp_path).train(progress=False)
    parts = replace(whole, name="parts")
    with monkeypatch.context() as patch:
        StopAt(patch, stop)
        with pytest.raises(Interrupted):
            Run(parts, tmp_path).train(progress=False)
    Run(parts, tmp_path, resume=True).train(progress=False)
    a, b = read_checkpoint(tmp_path / "whole"), read_checkpoint(tmp_path / "parts")
    for key in ("model", "average", "optimizer", "rng"):
        assert same(a[key], b[key]), key
    assert ("cls" in a["history"][0]["terms"]) == labels


def in_ranks(rank: int) -> dict[str, Any]:
    folder = Path(os.environ["HQOD_TEST_RUNS"])
    states = {}
    for labels in (True, False):
        config = student(folder, "run", labels)
        config = replace(config, schedule=replace(config.schedule, ema=0.5))
        dataset = open_data(config.data, train=True)
        model = build_model(config, 10)
        load_float(model, config, dataset.categories)
        teacher = load_teacher(model, config, dataset.categories)
        quantize(model, config)
        set_scales(model, dataset, config)
        before = copy.deepcopy(teacher.state_dict())
        trainer = Trainer(model, dataset, config, folder, teacher)
        trainer.fit(progress=False)
        assert same(before, teacher.state_dict())
        assert all(parameter.grad is None for parameter in teacher.parameters())
        terms = [entry["terms"]["distill"] for entry in trainer.history]
        states[labels] = {"model": trainer.trained.state_dict(), "terms": terms}
    return states


def test_processes_learn_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit; without labels no process waits for gradients that no term makes."""
    shutil.copytree(folder / "fp32", tmp_path / "fp32")
    monkeypatch.setenv("HQOD_TEST_RUNS", str(tmp_path))
    first, second = run_ranks(in_ranks, tmp_path)
    assert same(first, second)


def test_on_the_command_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(folder / "fp32" / "config.json")
    options = ["--recipe", recipe, "--runs", str(tmp_path), "--epochs", "1", "--quiet"]
    options += ["--threads", "1", "--bits", "4", "--init", str(folder / "fp32")]
    options += ["--distill", str(folder / "fp32"), "--set", "distill.labels=false"]
    assert main(["train", "--name", "w4", *options]) == 0
    assert "| 4-bit LSQ + HQOD, distilled, no labels |" in capsys.readouterr().out
    assert main(["train", "--name", "w8", *options, "--set", "distill.temperature=0"]) == 2
    assert "distill.temperature: expected" in capsys.readouterr().err


def test_what_cannot_teach(folder: Path, tmp_path: Path) -> None:
    wider = replace(TINY, widths=(8, 12, 16))
    for name, model, message in (
        ("wide", wider, r"layer 'backbone\..*': expected weight of shape \[8, .*\], got \[12, "),
        ("deep", replace(TINY, head_depth=2), r"layer 'head\..*': expected no weight, got one"),
    ):
        Run(tiny_config(name, model=model), tmp_path).train(progress=False)
        config = student(folder, "w2")
        config = replace(config, distill=DistillConfig(teacher=str(tmp_path / name)))
        with pytest.raises(ConfigError, match=f"^distill.teacher: the network of .*{message}"):
            Run(config, tmp_path / "runs").train(progress=False)
    config = student(folder, "w4")
    Run(replace(config, distill=DistillConfig()), tmp_path).train(progress=False)
    wrong = replace(config, name="x", distill=DistillConfig(teacher=str(tmp_path / "w4")))
    with pytest.raises(ConfigError, match="^distill.teacher: expected the checkpoint of a float"):
        Run(wrong, tmp_path).train(progress=False)
    none = DistillConfig(config.distill.teacher, feature_weight=0.0, prediction_weight=0.0)
    with pytest.raises(ConfigError, match="^distill.prediction_weight: expected it or"):
        Run(replace(config, name="y", distill=none), tmp_path).train(progress=False)


def test_the_first_difference_is_named() -> None:
    one = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert first_difference(one, one) == ""
    other = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
    assert first_difference(one, other) == "layer '0': expected bias, got none"
