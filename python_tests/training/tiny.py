"""A run of a few steps, stopped where a test says, for the tests of this folder."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import Any

import pytest
import torch

from hqod_ops.training.settings import (
    DataConfig,
    LossConfig,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
)
from hqod_ops.training.trainer import Trainer

TINY = ModelConfig(stem=8, widths=(8, 8, 16), channels=8, head_depth=1, groups=2)


def tiny_config(name: str, **changes: Any) -> RunConfig:
    base = RunConfig(
        name=name,
        device="cpu",
        data=DataConfig(size=64, train_images=12, test_images=4, calibration_images=4),
        model=TINY,
        loss=LossConfig(hqod=True),
        schedule=ScheduleConfig(epochs=3, batch_size=4),
    )
    return replace(base, **changes)


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, tensors within nested containers included."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in history]


class StopAt:
    """Send the process a Ctrl-C in a step of the training."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
        self.left, self.original = step, Trainer.step
        monkeypatch.setattr(Trainer, "step", lambda trainer, *args: self(trainer, *args))

    def __call__(self, trainer: Trainer, *args: Any) -> dict[str, float]:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return self.original(trainer, *args)
