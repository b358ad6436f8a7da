"""The training loop: optimizer, schedule, checkpoints that resume to the same bits."""

from __future__ import annotations

import io
import json
import math
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

from hqod_ops.detection.data import DetectionDataset, collate
from hqod_ops.detection.models.detector import Detector
from hqod_ops.detection.models.losses import total
from hqod_ops.training import ConfigError
from hqod_ops.training.batch import batch_images, training_targets
from hqod_ops.training.data import image_shape, workers_watched
from hqod_ops.training.files import CHECKPOINT, FORMAT, LOG, write_whole
from hqod_ops.training.optim import learning_rate, make_optimizer
from hqod_ops.training.progress import progress_bar
from hqod_ops.training.reading import to_dict
from hqod_ops.training.settings import RunConfig


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C; its checkpoint can be resumed."""


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


class Trainer:
    """Trains a detector epoch by epoch and keeps ``last.pt`` and ``log.jsonl`` in a directory.

    A checkpoint holds the weights, optimizer, schedule, random state and history after a whole
    epoch. The order of the images depends on the seed and the epoch alone. So a run that is stopped
    and resumed gives the same bits as one that is not.

    Args:
        model (Detector): the detector, on its device.
        dataset (DetectionDataset): images to train on.
        config (RunConfig): schedule and seed.
        directory (Path): where the files go; it must exist.
    """

    def __init__(
        self, model: Detector, dataset: DetectionDataset, config: RunConfig, directory: Path
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
        self.optimizer = make_optimizer(model, config.schedule)
        self.scheduler = LambdaLR(
            self.optimizer, learning_rate(config.schedule, self.steps_per_epoch)
        )
        self.epoch = 0
        self.history: list[dict[str, Any]] = []

    def save(self) -> None:
        """Write the checkpoint and the log; a crash meanwhile leaves the last checkpoint whole."""
        state = {
            "format": FORMAT,
            "config": to_dict(self.config),
            "categories": list(self.dataset.categories),
            "image": list(image_shape(self.dataset)),
            "epoch": self.epoch,
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        # To a file, torch would hide why it cannot be written.
        content = io.BytesIO()
        torch.save(state, content)
        write_whole(self.directory / CHECKPOINT, content.getbuffer())
        lines = "".join(json.dumps(entry) + "\n" for entry in self.history)
        write_whole(self.directory / LOG, lines.encode())

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint (:func:`hqod_ops.training.files.read_checkpoint`).

        Raises:
            ConfigError: it is damaged, or of another network.
        """
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.epoch, self.history = state["epoch"], state["history"]
            torch.set_rng_state(state["rng"])
            if state["cuda_rng"] and torch.cuda.is_available():
                torch.cuda.set_rng_state_all(state["cuda_rng"])
        except Exception as error:  # of any kind, by whatever is wrong in it
            what = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"{self.directory}: cannot resume from its checkpoint: {type(error).__name__}: "
                f"{what}"
            ) from error

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
        batch = batch_images(images, self.device, self.model.stride)
        losses = self.model.losses(batch, training_targets(targets, self.device))
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
        with bar as advance, _interrupt_between_steps() as interrupted, workers_watched():
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
