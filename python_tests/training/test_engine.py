"""Processes, parts of a step, precision: the same training by another way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("pycocotools")

from hqod_ops.cli import main
from hqod_ops.detection.data import DigitScenes, open_dataset, write_coco
from hqod_ops.detection.models.detector import Detections, Detector, Objects
from hqod_ops.quant import QATConfig
from hqod_ops.training import ConfigError
from hqod_ops.training.build import build_model
from hqod_ops.training.data import Seeded, open_data
from hqod_ops.training.engine import Engine
from hqod_ops.training.files import RESULT, read_checkpoint
from hqod_ops.training.run import Run
from hqod_ops.training.settings import (
    DataConfig,
    EngineConfig,
    LossConfig,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
)
from hqod_ops.training.trainer import Trainer
from python_tests.ranks import run_ranks

# Norms as they are: two processes have the statistics of half a batch each.
CONFIG = RunConfig(
    name="run",
    device="cpu",
    data=DataConfig(size=64, train_images=17, test_images=5, calibration_images=4),
    model=ModelConfig(stem=8, widths=(8, 8, 16), channels=8, head_depth=1, groups=2),
    loss=LossConfig(hqod=True),
    quant=QATConfig(4, 4, batch_norm="freeze"),
    schedule=ScheduleConfig(epochs=2, batch_size=8, lr=1e-3, scale_lr=1.0, optimizer="sgd"),
)


def in_ranks(rank: int) -> dict[str, Any]:
    folder = Path(os.environ["HQOD_TEST_RUNS"])
    result = Run(CONFIG, folder).train(progress=False)
    state = read_checkpoint(folder / "run")
    return {"result": result, "model": state["model"], "history": state["history"]}


def test_two_processes_are_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the images of a step shared: HQOD's divisors, LSQ's gradients, clipping, evaluation."""
    monkeypatch.setenv("HQOD_TEST_RUNS", str(tmp_path / "two"))
    first, second = run_ranks(in_ranks, tmp_path)
    assert first["result"]["AP"] == second["result"]["AP"]
    one = Run(CONFIG, tmp_path / "one").train(progress=False)
    state = read_checkpoint(tmp_path / "one" / "run")
    for ours, theirs in zip(state["history"], first["history"], strict=True):
        # The order of the sums differs, by which now and then a code at a tie goes another way.
        assert theirs["terms"] == pytest.approx(ours["terms"], rel=1e-4)
    for name, value in state["model"].items():
        if value.is_floating_point():
            torch.testing.assert_close(first["model"][name], value, rtol=1e-3, atol=2e-5)
    assert first["result"]["AP"] == pytest.approx(one["AP"], abs=1e-3, nan_ok=True)
    assert (tmp_path / "two" / "run" / RESULT).is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun's processes")
def test_torchrun(tmp_path: Path) -> None:
    """The command as it is typed; what it says is said once."""
    options = ["--set", "data.size=64", "--set", "data.train_images=8", "--set", "data.workers=1"]
    options += ["--set", "data.test_images=3", "--set", "data.calibration_images=2", "--epochs=1"]
    options += ["--batch-size=4", "--bits=4", "--hqod", "--device=cpu", "--threads=1", "--quiet"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--standalone", "-m", "hqod_ops.cli", "train", "--runs", str(tmp_path)]
    done = subprocess.run(
        [*torchrun, *options], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("4-bit LSQ + HQOD") == 1 and done.stdout.count("Images: ") == 1
    assert json.loads((tmp_path / "run" / RESULT).read_text())["epochs"] == 1
    assert len(read_checkpoint(tmp_path / "run")["ranks"]) == 1


class Squares(Detector):
    """Losses that are means over images, so that their parts add up."""

    stride = 8

    def __init__(self) -> None:
        super().__init__()
        self.network: nn.Module = nn.Conv2d(3, 2, 3)

    def losses(self, images: Tensor, targets: Sequence[Objects]) -> dict[str, Tensor]:
        output = self.network(images)
        return {"square": output.square().mean(), "mean": output.mean()}

    def detect(self, images: Tensor) -> list[Detections]:
        raise NotImplementedError


def test_parts_of_a_step() -> None:
    model, images = Squares(), torch.rand(4, 3, 8, 8)
    Engine(model, EngineConfig()).backward(images, [])
    whole = model.network.weight.grad
    model.zero_grad()
    parts = Engine(model, EngineConfig(), accumulate=2)
    for part in images.split(2):
        parts.backward(part, [])
    torch.testing.assert_close(model.network.weight.grad, whole)


def test_accumulated_steps_train(tmp_path: Path) -> None:
    schedule = replace(CONFIG.schedule, accumulate=4)
    config = replace(CONFIG, schedule=schedule)
    Run(config, tmp_path).train(progress=False)
    with pytest.raises(ConfigError, match="expected a multiple of 1 processes x 3 parts"):
        wrong = replace(config, name="wrong", schedule=replace(schedule, accumulate=3))
        Run(wrong, tmp_path).train(progress=False)


def test_bf16_and_channels_last(tmp_path: Path) -> None:
    """Near the run in float32; losses are computed in float32, so their boxes are not rounded."""
    losses = []
    for name, engine in (
        ("fp32", EngineConfig()),
        ("bf16", EngineConfig(precision="bf16", channels_last=True)),
    ):
        config = replace(CONFIG, name=name, engine=engine)
        Run(config, tmp_path).train(progress=False)
        losses.append(read_checkpoint(tmp_path / name)["history"][-1]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.05) and losses[0] != losses[1]


def test_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network alone; names of the weights stay."""
    seen = []
    compile_module = nn.Module.compile

    def compiled(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        seen.append(module)
        compile_module(module, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", compiled)
    losses = []
    for compiles in (False, True):
        config = replace(CONFIG, engine=EngineConfig(compile=compiles))
        model = build_model(replace(config, quant=QATConfig(32, 32)), 10)
        trainer = Trainer(model, open_data(config.data, train=True), config, tmp_path)
        torch.manual_seed(0)
        trainer.fit(progress=False)
        losses.append(len(read_checkpoint(tmp_path)["model"]))
    assert seen == [model.network] and losses[0] == losses[1]


def test_wrong_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--runs", str(tmp_path), "--device", "cpu", "--set", "data.train_images=8"]
    assert main([*command, "--set", "engine.precision=fp16"]) == 2
    assert "engine.precision: fp16 needs a CUDA device" in capsys.readouterr().err


def test_transforms_depend_on_seed_and_image(tmp_path: Path) -> None:
    """Not on the order, nor on who loads; the random state of the process is left alone."""
    write_coco(DigitScenes("train", num_images=6, size=64), tmp_path, "train")
    dataset = open_dataset(tmp_path, "train")

    def noisy(image: Tensor, target: Any) -> tuple[Tensor, Any]:
        return torch.rand(2), target

    dataset.transform = noisy
    before = torch.get_rng_state()
    one, other = Seeded(dataset, 3), Seeded(dataset, 4)
    drawn = [one[i][0] for i in range(6)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[i][0], drawn[i]) for i in (5, 0, 3))
    assert len({tuple(value.tolist()) for value in [*drawn, other[0][0]]}) == 7
