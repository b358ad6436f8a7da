"""The training loop: optimizer, schedule, checkpoints that resume to the same bits."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Subset

from hqod_ops.detection._extras import require
from hqod_ops.detection.data import DetectionDataset, collate
from hqod_ops.detection.models.atss import ATSS, Target
from hqod_ops.detection.models.losses import total
from hqod_ops.quant import quantizer_parameters
from hqod_ops.training.settings import (
    ConfigError,
    QuantConfig,
    RunConfig,
    ScheduleConfig,
    to_dict,
)

CHECKPOINT = "last.pt"
LOG = "log.jsonl"
_FORMAT = 1
_MEAN, _STD = 0.5, 0.25


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C; its checkpoint can be resumed."""


def batch_images(images: Sequence[Tensor], device: torch.device, divisor: int) -> Tensor:
    """One normalised batch from images of any size, padded with grey at the right and the bottom.

    Args:
        images (sequence of Tensor[3, H_b, W_b]): values in [0, 1].
        device (torch.device): where the batch goes.
        divisor (int): height and width of the batch are multiples of it.

    Returns:
        Tensor[B, 3, H, W]: ``(x - 0.5) / 0.25``.

    Example:
        >>> import torch
        >>> from hqod_ops.training.trainer import batch_images
        >>> images = [torch.zeros(3, 30, 20), torch.ones(3, 16, 16)]
        >>> batch_images(images, torch.device("cpu"), 16).shape
        torch.Size([2, 3, 32, 32])
    """
    height, width = (
        math.ceil(max(image.shape[side] for image in images) / divisor) * divisor for side in (1, 2)
    )
    batch = images[0].new_full((len(images), 3, height, width), _MEAN)
    for place, image in zip(batch, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return batch.to(device, non_blocking=True).sub_(_MEAN).div_(_STD)


def training_targets(targets: Sequence[dict[str, Any]], device: torch.device) -> list[Target]:
    """Boxes and labels to learn, without crowds and difficult objects.

    Args:
        targets (sequence of dict): targets of a :class:`hqod_ops.detection.data.DetectionDataset`.
        device (torch.device): where they go.
    """
    clean: list[Target] = []
    for target in targets:
        keep = target["iscrowd"] == 0
        clean.append(
            {"boxes": target["boxes"][keep].to(device), "labels": target["labels"][keep].to(device)}
        )
    return clean


def learning_rate(config: ScheduleConfig, steps_per_epoch: int) -> Callable[[int], float]:
    """The learning rate of a step, relative to ``config.lr``.

    "onecycle": a straight rise from 1/25 over the first part ``warmup`` of all steps, then half a
    cosine down to 1/1000. "step": an exponential rise from ``warmup`` over the first epoch, then a
    tenth from each of ``steps`` on (epochs).

    Example:
        >>> from hqod_ops.training.settings import ScheduleConfig
        >>> from hqod_ops.training.trainer import learning_rate
        >>> rate = learning_rate(ScheduleConfig(epochs=10, warmup=0.1), steps_per_epoch=10)
        >>> rate(0), rate(10), round(rate(100), 4)
        (0.04, 1.0, 0.001)
    """
    steps = config.epochs * steps_per_epoch
    rise = max(1.0, config.warmup * steps)

    def onecycle(step: int) -> float:
        if step < rise:
            return 0.04 + 0.96 * step / rise
        done = (step - rise) / max(1.0, steps - rise)
        return 0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def stepwise(step: int) -> float:
        if step < steps_per_epoch:
            return float(config.warmup ** (1 - step / steps_per_epoch))
        return float(0.1 ** sum(step >= epoch * steps_per_epoch for epoch in config.steps))

    return onecycle if config.policy == "onecycle" else stepwise


def make_optimizer(
    model: nn.Module, config: ScheduleConfig, quant: QuantConfig
) -> torch.optim.Optimizer:
    """AdamW or SGD with weight decay on matrices and kernels alone.

    Args:
        model (nn.Module): the model, quantized or not.
        config (ScheduleConfig): kind and rates.
        quant (QuantConfig): rate and decay of the quantizers' scales.
    """
    scales = list(quantizer_parameters(model))
    known = {id(p) for p in scales}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if scales:
        groups.append(
            {
                "params": scales,
                "weight_decay": quant.scale_decay,
                "lr": config.lr * quant.scale_lr,
            }
        )
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9)
    # Fused: a quantized model has a hundred scales of one element each.
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


@contextmanager
def progress_bar(
    title: str, total: int, *, start: int = 0, enabled: bool = True
) -> Iterator[Callable[[str], None]]:
    """A bar on the error output, where that is a terminal; it vanishes at the end.

    Args:
        title (str): what is done.
        total (int): number of steps.
        start (int): steps done already. Default: 0
        enabled (bool): False shows nothing. Default: True

    Yields:
        callable: ``advance(note)`` counts a step and shows a note behind the bar.

    Example:
        >>> from hqod_ops.training.trainer import progress_bar
        >>> with progress_bar("count", 2) as advance:
        ...     advance("one")
        ...     advance("two")
    """
    rich = require("rich.progress", "rich")
    console = require("rich.console", "rich").Console(stderr=True)
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.fields[note]}"),
    )
    hidden = not (enabled and console.is_terminal)
    with rich.Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(title, total=total, completed=start, note="")
        yield lambda note: bar.update(task, advance=1, note=note)


@contextmanager
def _interrupt_between_steps() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C into a flag; the second one stops at once."""
    seen = False

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal seen
        if seen:
            raise KeyboardInterrupt
        seen = True

    try:
        previous = signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread, which alone may handle signals
        yield lambda: False
        return
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, previous)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint written by :class:`Trainer`.

    Args:
        path (str or Path): the file, or the directory of a run.

    Raises:
        ConfigError: there is none, or it is not a checkpoint of a run.
    """
    path = Path(path)
    path = path / CHECKPOINT if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"{path}: expected a checkpoint, found no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first = str(error).partition("\n")[0]
        raise ConfigError(f"{path}: not a readable checkpoint: {first}") from None
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ConfigError(f"{path}: expected a checkpoint written by hqod train")
    return state


class Trainer:
    """Trains a detector epoch by epoch and keeps ``last.pt`` and ``log.jsonl`` in a directory.

    A checkpoint holds the weights, optimizer, schedule, random state and history after a whole
    epoch. The order of the images depends on the seed and the epoch alone. So a run that is stopped
    and resumed gives the same bits as one that is not.

    Args:
        model (ATSS): the detector, on its device.
        dataset (DetectionDataset): images to train on.
        config (RunConfig): loss, schedule and seed.
        directory (Path): where the files go; it must exist.
    """

    def __init__(
        self, model: ATSS, dataset: DetectionDataset, config: RunConfig, directory: Path
    ) -> None:
        self.model, self.dataset, self.config, self.directory = model, dataset, config, directory
        self.device = next(model.parameters()).device
        batch = config.schedule.batch_size
        if len(dataset) < batch:
            raise ConfigError(
                f"schedule.batch_size: expected at most the {len(dataset)} training images, "
                f"got {batch}"
            )
        self.steps_per_epoch = len(dataset) // batch
        self.optimizer = make_optimizer(model, config.schedule, config.quant)
        self.scheduler = LambdaLR(
            self.optimizer, learning_rate(config.schedule, self.steps_per_epoch)
        )
        self.epoch = 0
        self.history: list[dict[str, Any]] = []

    def save(self) -> None:
        """Write the checkpoint and the log; a crash meanwhile leaves the last checkpoint whole."""
        state = {
            "format": _FORMAT,
            "config": to_dict(self.config),
            "categories": list(self.dataset.categories),
            "epoch": self.epoch,
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        path = self.directory / CHECKPOINT
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
        lines = "".join(json.dumps(entry) + "\n" for entry in self.history)
        (self.directory / LOG).write_text(lines, encoding="utf-8")

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint (:func:`read_checkpoint`)."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.history = state["epoch"], state["history"]
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_rng"])

    def _batches(self) -> DataLoader[Any]:
        """The images of the coming epoch in their order; the incomplete last batch is left out."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.epoch)
        size = self.config.schedule.batch_size
        order = torch.randperm(len(self.dataset), generator=generator)
        return DataLoader(
            Subset(self.dataset, order[: self.steps_per_epoch * size].tolist()),
            batch_size=size,
            num_workers=self.config.data.workers,
            collate_fn=collate,
            generator=generator,
        )

    def step(self, images: Sequence[Tensor], targets: Sequence[dict[str, Any]]) -> dict[str, float]:
        """One update; returns the terms of the loss before it.

        Raises:
            FloatingPointError: the loss is not finite; the message names the terms.
        """
        batch = batch_images(images, self.device, self.model.strides[-1])
        losses = self.model.losses(batch, training_targets(targets, self.device), self.config.loss)
        self.optimizer.zero_grad(set_to_none=True)
        total(losses).backward()
        values = dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))
        if not all(math.isfinite(v) for v in values.values()):
            terms = ", ".join(f"{name} = {value:g}" for name, value in values.items())
            raise FloatingPointError(f"the loss is not finite in epoch {self.epoch + 1}: {terms}")
        if self.config.schedule.clip > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.schedule.clip)
        self.optimizer.step()
        self.scheduler.step()
        return values

    def fit(self, *, title: str = "", progress: bool = True) -> None:
        """Train to the last epoch.

        Args:
            title (str): shown at the progress bar. Default: ""
            progress (bool): show a progress bar where the output is a terminal. Default: True

        Raises:
            Interrupted: Ctrl-C; the checkpoint is that of the last whole epoch.
            FloatingPointError: the loss is not finite.
        """
        epochs = self.config.schedule.epochs
        if self.epoch == 0:
            self.save()
        bar = progress_bar(
            title,
            epochs * self.steps_per_epoch,
            start=self.epoch * self.steps_per_epoch,
            enabled=progress,
        )
        with bar as advance, _interrupt_between_steps() as interrupted:
            while self.epoch < epochs:
                self._epoch(advance, interrupted)

    def _epoch(self, advance: Callable[[str], None], interrupted: Callable[[], bool]) -> None:
        started, sums = time.perf_counter(), dict[str, float]()
        rate = self.scheduler.get_last_lr()[0]
        self.model.train()
        for images, targets in self._batches():
            values = self.step(images, targets)
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value
            advance(
                f"epoch {self.epoch + 1}/{self.config.schedule.epochs}, "
                f"loss {sum(values.values()):.3f}"
            )
            if interrupted():
                raise Interrupted(f"in epoch {self.epoch + 1}, {self.epoch} saved")
        self.epoch += 1
        self.history.append(
            {
                "epoch": self.epoch,
                "lr": rate,
                "loss": sum(sums.values()) / self.steps_per_epoch,
                "terms": {name: value / self.steps_per_epoch for name, value in sums.items()},
                "seconds": round(time.perf_counter() - started, 3),
            }
        )
        self.save()
