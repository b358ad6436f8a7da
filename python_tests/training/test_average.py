"""The moving average of a run: its values, its statistics, the same bits after a stop."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("pycocotools")

from hqod_ops.quant import quantizer_parameters
from hqod_ops.quant.config import QATConfig
from hqod_ops.training import ConfigError
from hqod_ops.training.build import build_model, load_detector, quantize, set_scales
from hqod_ops.training.data import open_data
from hqod_ops.training.evaluate import evaluate
from hqod_ops.training.files import CHECKPOINT, read_checkpoint
from hqod_ops.training.run import Run
from hqod_ops.training.settings import ScheduleConfig
from hqod_ops.training.trainer import Interrupted, Trainer
from python_tests.ranks import run_ranks
from python_tests.training.tiny import StopAt, same, tiny_config

DECAY = 0.75
SCHEDULE = ScheduleConfig(epochs=2, batch_size=4, ema=DECAY)


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_weights_and_scales_are_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the formula, step by step."""
    config = tiny_config("run", quant=QATConfig(4, 4), schedule=SCHEDULE)
    dataset = open_data(config.data, train=True)
    model = build_model(config, 10)
    quantize(model, config)
    set_scales(model, dataset, config)
    expected: dict[str, torch.Tensor] = {}
    original = Trainer.step

    def step(trainer: Trainer, *args: Any) -> dict[str, float]:
        values = original(trainer, *args)
        for name, value in trainer.model.named_parameters():
            before = expected.get(name, value.detach())
            expected[name] = DECAY * before + (1 - DECAY) * value.detach()
        return values

    monkeypatch.setattr(Trainer, "step", step)
    trainer = Trainer(model, dataset, config, tmp_path)
    trainer.fit(progress=False)
    found = dict(trainer.trained.named_parameters())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].detach(), value, rtol=1e-5, atol=1e-7)
    scales = [id(p) for p in quantizer_parameters(trainer.trained)]
    assert scales and set(scales) <= {id(p) for p in found.values()}
    own = dict(model.named_parameters())
    assert any(not torch.equal(found[name], own[name]) for name in found)
    statistics = [name for name in model.state_dict() if name.endswith("running_mean")]
    ours, theirs = model.state_dict(), trainer.trained.state_dict()
    assert statistics and not any(torch.equal(ours[name], theirs[name]) for name in statistics)


@pytest.mark.parametrize("stop", [1, 4, 6], ids=["first epoch", "second epoch", "last step"])
def test_resumed_average_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    whole = tiny_config("whole", quant=QATConfig(4, 4), schedule=SCHEDULE)
    result = Run(whole, tmp_path).train(progress=False)
    parts = replace(whole, name="parts")
    with monkeypatch.context() as patch:
        StopAt(patch, stop)
        with pytest.raises(Interrupted):
            Run(parts, tmp_path).train(progress=False)
    torch.rand(7)
    resumed = Run(parts, tmp_path, resume=True).train(progress=False)
    a, b = read_checkpoint(tmp_path / "whole"), read_checkpoint(tmp_path / "parts")
    for key in ("model", "average", "optimizer", "rng"):
        assert same(a[key], b[key]), key
    assert result["AP"] == resumed["AP"] and a["average"]["steps"] == 6
    # Once more on a run that has its end: nothing changes.
    Run(parts, tmp_path, resume=True).train(progress=False)
    assert same(read_checkpoint(tmp_path / "parts")["average"], b["average"])


def test_the_average_is_what_a_run_gives(tmp_path: Path) -> None:
    """It is evaluated, loaded and started from; the training itself is not touched by it."""
    config = tiny_config("float", schedule=SCHEDULE)
    result = Run(config, tmp_path).train(progress=False)
    plain = tiny_config("plain", schedule=replace(SCHEDULE, ema=0.0))
    Run(plain, tmp_path).train(progress=False)
    state, without = (read_checkpoint(tmp_path / name) for name in ("float", "plain"))
    assert same(state["model"], without["model"]) and without["average"] is None
    model, loaded, _ = load_detector(tmp_path / "float")
    assert same(model.state_dict(), state["average"]["model"])
    metrics, _ = evaluate(model, open_data(loaded.data), progress=False)
    assert metrics["AP"] == result["AP"]
    still = ScheduleConfig(epochs=1, batch_size=4, lr=0.0)
    config = tiny_config("next", init=str(tmp_path / "float" / CHECKPOINT), schedule=still)
    Run(config, tmp_path).train(progress=False)
    started = read_checkpoint(tmp_path / "next")["model"]
    for name, value in state["average"]["model"].items():
        assert not name.endswith("weight") or torch.equal(started[name], value)


def in_ranks(rank: int) -> dict[str, Any]:
    config = tiny_config("run", quant=QATConfig(4, 4), schedule=SCHEDULE)
    dataset = open_data(config.data, train=True)
    torch.manual_seed(0)
    model = build_model(config, 10)
    quantize(model, config)
    set_scales(model, dataset, config)
    trainer = Trainer(model, dataset, config, Path(os.environ["HQOD_TEST_RUNS"]))
    trainer.fit(progress=False)
    return trainer.trained.state_dict()


def test_processes_have_the_same_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, statistics included, though each has seen images of its own."""
    monkeypatch.setenv("HQOD_TEST_RUNS", str(tmp_path))
    first, second = run_ranks(in_ranks, tmp_path)
    assert same(first, second)
    assert same(read_checkpoint(tmp_path)["average"]["model"], first)


@pytest.mark.parametrize("ema", [-0.1, 1.0, 2.0])
def test_bad_decay(tmp_path: Path, ema: float) -> None:
    config = tiny_config("run", schedule=replace(SCHEDULE, ema=ema))
    with pytest.raises(ConfigError, match=r"^schedule.ema: expected float"):
        Run(config, tmp_path)
