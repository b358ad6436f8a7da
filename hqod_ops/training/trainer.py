"""The training loop: optimizer, schedule, checkpoints that resume to the same bits."""

from __future__ import annotations

import io
import json
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from hqod_ops.detection.data import DetectionDataset
from hqod_ops.detection.models.detector import Detector
from hqod_ops.detection.models.losses import rank_mean
from hqod_ops.quant.observers import gather
from hqod_ops.training import ConfigError
from hqod_ops.training.average import Average
from hqod_ops.training.batch import Padding, normalised, training_targets
from hqod_ops.training.build import sample_batches
from hqod_ops.training.data import Seeded, image_shape, workers_watched
from hqod_ops.training.engine import Engine, rank, world
from hqod_ops.training.files import CHECKPOINT, FORMAT, LOG, write_whole
from hqod_ops.training.optim import learning_rate, make_optimizer
from hqod_ops.training.progress import progress_bar
from hqod_ops.training.reading import to_dict
from hqod_ops.training.settings import RunConfig


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal, after a checkpoint from which it can be resumed.

    Attributes:
        signum (int): the signal.
    """

    def __init__(self, message: str, signum: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signum = int(signum)


@contextmanager
def _signal_between_steps() -> Iterator[Callable[[], int]]:
    """Note Ctrl-C and SIGTERM, as a number to be looked at; the second Ctrl-C stops at once."""
    seen = 0

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal seen
        if seen and signum == signal.SIGINT:
            raise KeyboardInterrupt
        seen = signum

    before = {}
    try:
        for signum in (signal.SIGINT, signal.SIGTERM):
            before[signum] = signal.signal(signum, note)
    except ValueError:  # not the main thread, which alone may handle signals
        pass
    try:
        yield lambda: seen
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class Trainer:
    """Trains a detector epoch by epoch and keeps ``last.pt`` and ``log.jsonl`` in a directory.

    A checkpoint holds the weights and their average (``schedule.ema``), optimizer, schedule, random
    state and history after an epoch, after some minutes within one, and where a signal stops the
    run. The order of the images and what is done to them depend on the seed and the epoch alone. So
    a run that is stopped and resumed gives the same bits as one that is not. In a distributed run,
    the first process writes.

    Args:
        model (Detector): the detector, on its device.
        dataset (DetectionDataset): images to train on.
        config (RunConfig): schedule, engine and seed.
        directory (Path): where the files go; it must exist.
        teacher (Detector, optional): what ``distill.teacher`` names, on the same device.
            Default: None

    Attributes:
        epoch (int): whole epochs that are done.
        done (int): steps of the next one that are.

    Raises:
        ConfigError: settings that do not fit the images, the device or the number of processes.
    """

    def __init__(
        self,
        model: Detector,
        dataset: DetectionDataset,
        config: RunConfig,
        directory: Path,
        teacher: Detector | None = None,
    ) -> None:
        self.model, self.dataset, self.config, self.directory = model, dataset, config, directory
        schedule, self.device = config.schedule, next(model.parameters()).device
        batch = schedule.batch_size
        if len(dataset) < batch:
            raise ConfigError(
                f"schedule.batch_size: expected at most the {len(dataset)} training images, "
                f"got {batch}"
            )
        # Before the engine: a copy of its hooks would be one of the teacher too.
        self._average = Average(model, schedule.ema) if schedule.ema else None
        self.engine = Engine(
            model, config.engine, schedule.accumulate, teacher=teacher, distill=config.distill
        )
        if batch % self.engine.parts:
            raise ConfigError(
                f"schedule.batch_size: expected a multiple of {world()} processes x "
                f"{schedule.accumulate} parts (schedule.accumulate), got {batch}"
            )
        self.steps_per_epoch = len(dataset) // batch
        fused = config.engine.precision != "fp16"  # which unscales gradients before they are used
        self.optimizer = make_optimizer(model, schedule, fused=fused)
        self.scheduler = LambdaLR(self.optimizer, learning_rate(schedule, self.steps_per_epoch))
        self.epoch = self.done = 0
        self.history: list[dict[str, Any]] = []
        self._rate = self._seconds = 0.0
        self._sums: dict[str, float] = {}
        self._saved = time.monotonic()

    @property
    def trained(self) -> Detector:
        """What the training gives: the detector, or the average of it."""
        return self.model if self._average is None else self._average.model

    def save(self) -> None:
        """Write the checkpoint and the log; a crash meanwhile leaves the last checkpoint whole.

        In a distributed run, every process calls it.
        """
        self._saved = time.monotonic()
        states = gather(self._random_state()) if world() > 1 else [self._random_state()]
        if rank() > 0:
            return
        state = {
            "format": FORMAT,
            "config": to_dict(self.config),
            "categories": list(self.dataset.categories),
            "image": list(image_shape(self.dataset)),
            "images": len(self.dataset),
            "epoch": self.epoch,
            "step": self.done,
            "so_far": {"lr": self._rate, "seconds": self._seconds, "terms": self._sums},
            "history": self.history,
            "model": self.model.state_dict(),
            "average": None if self._average is None else self._average.state(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.engine.scaler.state_dict(),
            "rng": states[0][0],
            "cuda_rng": states[0][1],
            "ranks": states[1:],
        }
        # To a file, torch would hide why it cannot be written.
        content = io.BytesIO()
        torch.save(state, content)
        write_whole(self.directory / CHECKPOINT, content.getbuffer())
        lines = "".join(json.dumps(entry) + "\n" for entry in self.history)
        write_whole(self.directory / LOG, lines.encode())

    def _random_state(self) -> tuple[Tensor, list[Tensor]]:
        cuda: list[Tensor] = []
        if world() > 1 and self.device.type == "cuda":
            cuda = [torch.cuda.get_rng_state(self.device)]
        elif torch.cuda.is_available():
            cuda = torch.cuda.get_rng_state_all()
        return torch.get_rng_state(), cuda

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint (``hqod_ops.training.files.read_checkpoint``).

        Raises:
            ConfigError: it is damaged, or of another network.
        """
        try:
            self.model.load_state_dict(state["model"])
            if self._average is not None:
                self._average.load(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            if state.get("scaler"):
                self.engine.scaler.load_state_dict(state["scaler"])
            self.epoch, self.history = state["epoch"], state["history"]
            # Those of earlier versions are of whole epochs.
            self.done, so_far = state.get("step", 0), state.get("so_far", {})
            self._rate, self._seconds = so_far.get("lr", 0.0), so_far.get("seconds", 0.0)
            self._sums = dict(so_far.get("terms", {}))
            states = [(state["rng"], state["cuda_rng"]), *state.get("ranks", [])]
            # With another number of processes the bits differ all the same.
            rng, cuda = states[min(rank(), len(states) - 1)]
            torch.set_rng_state(rng)
            if cuda and torch.cuda.is_available():
                if len(states) > 1:
                    torch.cuda.set_rng_state(cuda[0], self.device)
                else:
                    torch.cuda.set_rng_state_all(cuda)
        except Exception as error:  # of any kind, by whatever is wrong in it
            what = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"{self.directory}: cannot resume from its checkpoint: {type(error).__name__}: "
                f"{what}"
            ) from error

    def _batches(self) -> DataLoader[Any]:
        """This process's parts of the coming epoch's steps, from the first that is not done.

        The images are in an order of the epoch; the incomplete last batch is left out.
        """
        schedule, data = self.config.schedule, self.config.data
        seed = self.config.seed * 1_000_003 + self.epoch
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.dataset), generator=generator)
        order = order[: self.steps_per_epoch * schedule.batch_size]
        parts = order.view(self.steps_per_epoch, schedule.accumulate, world(), -1)
        return DataLoader(
            Seeded(self.dataset, seed),
            batch_sampler=parts[self.done :, :, rank()].flatten(0, 1).tolist(),
            num_workers=data.workers,
            collate_fn=Padding(self.model.stride),
            pin_memory=self.device.type == "cuda",
            generator=generator,
        )

    def step(self, parts: Sequence[tuple[Tensor, Sequence[dict[str, Any]]]]) -> dict[str, float]:
        """One update; returns the terms of the loss before it, means over parts and processes.

        Args:
            parts (sequence of tuple): images (Tensor[B, 3, H, W], padded, values in [0, 1]) and
                their targets.

        Raises:
            FloatingPointError: the loss is not finite; the message names the terms.
        """
        self.optimizer.zero_grad(set_to_none=True)
        seen: list[Tensor] = []
        names: list[str] = []
        for number, (images, targets) in enumerate(parts, start=1):
            losses = self.engine.backward(
                normalised(images, self.device),
                training_targets(targets, self.device),
                last=number == len(parts),
            )
            names = list(losses)
            seen.append(torch.stack([term.detach() for term in losses.values()]))
        terms = seen[0] if len(seen) == 1 else torch.stack(seen).mean(dim=0)
        values = dict(zip(names, rank_mean(terms).tolist(), strict=True))
        if not all(math.isfinite(v) for v in values.values()):
            listed = ", ".join(f"{name} = {value:g}" for name, value in values.items())
            raise FloatingPointError(f"the loss is not finite in epoch {self.epoch + 1}: {listed}")
        self.engine.update(self.optimizer, self.config.schedule.clip)
        self.scheduler.step()
        if self._average is not None:
            self._average.update(self.model)
        return values

    def fit(self, *, title: str = "", progress: bool = True) -> None:
        """Train to the last epoch.

        Args:
            title (str): shown at the progress bar. Default: ""
            progress (bool): show a progress bar where the output is a terminal, and else a line an
                epoch. Default: True

        Raises:
            Interrupted: Ctrl-C or SIGTERM; what was done until then is in the checkpoint.
            FloatingPointError: the loss is not finite.
        """
        epochs = self.config.schedule.epochs
        if self.epoch == self.done == 0:
            self.save()
        bar = progress_bar(
            title,
            epochs * self.steps_per_epoch,
            start=self.epoch * self.steps_per_epoch + self.done,
            enabled=progress and rank() == 0,
        )
        with bar as advance, _signal_between_steps() as stopped, workers_watched():
            while self.epoch < epochs:
                self._epoch(advance, stopped)
        self.engine.close()
        self.engine.share_buffers()
        if self._average is not None:
            batches = sample_batches(self.dataset, self.config, self.device, self.model.stride)
            self._average.finish(self.model, batches)
            self.save()

    def _epoch(self, advance: Callable[[str], None], stopped: Callable[[], int]) -> None:
        started = time.perf_counter() - self._seconds
        if self.done == 0:
            self._rate = float(self.scheduler.get_last_lr()[0])
        number, epochs = self.epoch + 1, self.config.schedule.epochs
        self.model.train()
        for parts in _in_steps(self._batches(), self.config.schedule.accumulate):
            values = self.step(parts)
            self.done += 1
            for name, value in values.items():
                self._sums[name] = self._sums.get(name, 0.0) + value
            advance(
                f"epoch {number}/{epochs}, "
                f"loss {sum(values.values()):.3f} "
                f"({', '.join(f'{name} {value:.3f}' for name, value in values.items())})"
            )
            signum, due = self._agreed(stopped())
            if self.done < self.steps_per_epoch and (signum or due):
                self._seconds = time.perf_counter() - started
                self.save()
            elif self.done == self.steps_per_epoch:
                self._end_epoch(time.perf_counter() - started)
            if signum:
                where = (
                    f"in epoch {number}, step {self.done}" if self.done else f"in epoch {number}"
                )
                raise Interrupted(f"{signal.Signals(signum).name} {where}; saved", signum)

    def _agreed(self, signum: int) -> tuple[int, bool]:
        """The signal that any process got, and whether the first finds a checkpoint due."""
        minutes = self.config.engine.checkpoint_minutes
        due = minutes > 0 and time.monotonic() - self._saved > 60 * minutes
        if world() == 1:
            return signum, due
        flags = torch.tensor([signum, due and rank() == 0], device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        signum, late = flags.tolist()
        return signum, bool(late)

    def _end_epoch(self, seconds: float) -> None:
        self.epoch += 1
        means = {name: value / self.steps_per_epoch for name, value in self._sums.items()}
        self.history.append(
            {
                "epoch": self.epoch,
                "lr": self._rate,
                "loss": sum(self._sums.values()) / self.steps_per_epoch,
                "terms": means,
                "seconds": round(seconds, 3),
            }
        )
        self.done, self._sums, self._seconds = 0, {}, 0.0
        self.save()


def _in_steps(batches: Iterable[Any], accumulate: int) -> Iterator[list[Any]]:
    """The parts of each step together."""
    parts: list[Any] = []
    for batch in batches:
        parts.append(batch)
        if len(parts) == accumulate:
            yield parts
            parts = []
