"""One run from its configuration to its result: data, model, quantization, training, evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hqod_ops.detection.data import DetectionDataset
from hqod_ops.training import ConfigError
from hqod_ops.training.build import (
    build_model,
    choose_device,
    load_float,
    load_teacher,
    quantize,
    set_scales,
)
from hqod_ops.training.data import (
    check_categories,
    check_images,
    described,
    open_data,
    settled,
)
from hqod_ops.training.engine import processes, rank, sync_norms
from hqod_ops.training.evaluate import evaluate
from hqod_ops.training.files import (
    CHECKPOINT,
    CONFIG,
    HARMONY,
    RESULT,
    locked,
    read_checkpoint,
    saved_settings,
    write_json,
)
from hqod_ops.training.reading import from_dict, to_dict
from hqod_ops.training.settings import RunConfig
from hqod_ops.training.trainer import Trainer

_MAY_CHANGE = {
    *("name", "device", "data.workers", "data.unreadable"),
    *("engine.backend", "engine.checkpoint_minutes"),
}
"""Settings that a resumed run may change: at most its rounding differs then."""


class Run:
    """One training run in a directory of its own.

    It leaves ``config.json``, ``log.jsonl`` (a line an epoch), ``last.pt`` (the last checkpoint),
    ``harmony.npz`` and ``result.json``. The result is that of the last epoch: no epoch is chosen by
    its score on the test images. Under torchrun every process makes the same one, and the first
    writes.

    Args:
        config (RunConfig): everything the run depends on.
        runs (Path): the directory of all runs.
        resume (bool): continue where the run was stopped, or start if it never did. Default: False

    Raises:
        ConfigError: a setting is out of its range; the directory holds a run already (without
            resume) or one with other settings (with resume; the folder of the images may be
            another one).

    Example:
        >>> from pathlib import Path
        >>> from hqod_ops.training.run import Run
        >>> from hqod_ops.training.settings import RunConfig
        >>> Run(RunConfig(name="fp32"), Path("runs")).directory.as_posix()
        'runs/fp32'
    """

    def __init__(self, config: RunConfig, runs: Path, *, resume: bool = False) -> None:
        # Read again, since settings made in Python were not checked yet.
        config = from_dict(to_dict(config))
        self.directory = runs / _below(config.name)
        self.config = replace(config, data=settled(config.data))
        self._state: dict[str, Any] | None = None
        checkpoint = self.directory / CHECKPOINT
        if checkpoint.is_file():
            if not resume:
                raise ConfigError(
                    f"{self.directory}: holds a run already; choose another name, or resume it"
                )
            self._state = read_checkpoint(checkpoint)
            self._check_same(self._state["config"])
        elif resume and (self.directory / CONFIG).is_file():
            self._check_same(saved_settings(self.directory))

    def _take_sizes(self, saved: Mapping[str, Any]) -> None:
        """Sizes that are left open are those of an earlier run."""
        if self.config.data.size == "auto":
            data = from_dict(saved).data
            sizes = {name: getattr(data, name) for name in ("size", "short_side", "max_side")}
            self.config = replace(self.config, data=replace(self.config.data, **sizes))

    def _check_same(self, saved: Mapping[str, Any]) -> None:
        self._take_sizes(saved)
        before, now = (dict(_flat(to_dict(c))) for c in (from_dict(saved), self.config))
        drawn = "digits" in (before.get("data.source"), now["data.source"])
        may_change = _MAY_CHANGE if drawn else _MAY_CHANGE | {"data.source"}  # a folder moves
        for name in now.keys() - may_change:
            if before.get(name) != now[name]:
                raise ConfigError(
                    f"{self.directory}: cannot resume: {name} was {before.get(name)!r} and is now "
                    f"{now[name]!r}"
                )

    def train(
        self, *, progress: bool = True, say: Callable[[str], object] | None = None
    ) -> dict[str, Any]:
        """Train to the end, evaluate, and write the result.

        Args:
            progress (bool): show progress bars where the output is a terminal. Default: True
            say (callable, optional): takes a line about the images, before the training. Default:
                None

        Returns:
            dict: the metrics, ``seconds`` of training, ``epochs``, ``parameters``.

        Raises:
            ValueError: data or settings cannot be used, or another process is training this run;
                the message is one line.
            Interrupted: Ctrl-C or SIGTERM; the run can be resumed.
        """
        device = choose_device(self.config.device)
        self.directory.mkdir(parents=True, exist_ok=True)
        alone = locked(self.directory) if rank() == 0 else nullcontext()
        with alone, processes(self.config.engine, device):
            return self._train(device, progress, say if rank() == 0 else None)

    def _train(
        self, device: torch.device, progress: bool, say: Callable[[str], object] | None
    ) -> dict[str, Any]:
        # First of all: a run that is stopped before its first checkpoint is resumed by this file.
        self._save_settings()
        torch.manual_seed(self.config.seed)
        if self.config.init and self._state is None:
            self._take_sizes(read_checkpoint(self.config.init)["config"])
        dataset = open_data(self.config.data, train=True)
        config = replace(self.config, data=settled(self.config.data, dataset))
        if config != self.config:
            self.config = config
            self._save_settings()
        # Opened before the training, so that a mistake in it does not cost hours.
        test = open_data(config.data)
        check_categories(
            "data.test_split", "of data.train_split", dataset.categories, test.categories
        )
        if config.data.unreadable == "error":
            for images in (dataset, test):
                check_images(images, config.data, progress=progress)
        if self._state is not None:
            self._check_images(dataset)
        if say is not None:
            say(described(dataset, test))
        model = build_model(config, len(dataset.categories)).to(device)
        if config.init and self._state is None:
            load_float(model, config, dataset.categories)
        teacher = None
        if config.distill.teacher:
            teacher = load_teacher(model, config, dataset.categories)
        if config.engine.sync_norms:
            model.network = sync_norms(model.network)
        if config.quantized:
            quantize(model, config)
            if self._state is None:
                set_scales(model, dataset, config)
        if rank() > 0:  # for what draws in training, such as dropout
            torch.manual_seed(config.seed + rank())
        trainer = Trainer(model, dataset, config, self.directory, teacher)
        if self._state is not None:
            trainer.load(self._state)
        trainer.fit(title=config.name, progress=progress)
        model = trainer.trained
        metrics, harmony = evaluate(model, test, workers=config.data.workers, progress=progress)
        if rank() == 0:
            harmony.save(self.directory / HARMONY)
        result: dict[str, Any] = {
            **metrics,
            "epochs": trainer.epoch,
            "seconds": round(sum(entry["seconds"] for entry in trainer.history), 1),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        # JSON knows no NaN: a metric without a value is null.
        known = {k: None if v != v else v for k, v in result.items()}
        if rank() == 0:
            write_json(self.directory / RESULT, known)
        return result

    def _check_images(self, dataset: DetectionDataset) -> None:
        """The images that were moved are still those of the checkpoint."""
        assert self._state is not None
        owner = f"that {self.directory} was trained on"
        check_categories("data.source", owner, self._state["categories"], dataset.categories)
        count = self._state.get("images", len(dataset))  # earlier versions do not say it
        if count != len(dataset):
            raise ConfigError(
                f"data.source: expected the {count} training images {owner}, got {len(dataset)}"
            )

    def _save_settings(self) -> None:
        if rank() == 0:
            write_json(self.directory / CONFIG, to_dict(self.config))


def _below(name: str) -> str:
    """The name of a run, which is a directory below that of all runs.

    Raises:
        ConfigError: it is that directory itself, or leads out of it.
    """
    path = Path(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ConfigError(f"name: expected a directory below that of all runs, got {name!r}")
    return name


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
