"""One run from its configuration to its result: data, model, quantization, training, evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hqod_ops.detection.data import (
    DataError,
    DetectionDataset,
    RandomHorizontalFlip,
    collate,
    open_dataset,
)
from hqod_ops.detection.data.dataset import Target
from hqod_ops.detection.evaluation import coco_results, evaluate_coco
from hqod_ops.detection.harmony import HarmonyReport, harmony_report
from hqod_ops.detection.models.atss import ATSS, Detections
from hqod_ops.quant import QATConfig, calibrate, prepare_qat
from hqod_ops.training.settings import (
    ConfigError,
    DataConfig,
    QuantConfig,
    RunConfig,
    TestConfig,
    from_dict,
    read,
    to_dict,
)
from hqod_ops.training.trainer import (
    CHECKPOINT,
    Trainer,
    batch_images,
    progress_bar,
    read_checkpoint,
)

CONFIG = "config.json"
RESULT = "result.json"
HARMONY = "harmony.npz"
_MAY_CHANGE = {"name", "device"}
"""Settings that a resumed run may change: at most its rounding differs then."""

_EVALUATION_BATCH = 64


def open_data(config: DataConfig, *, train: bool = False) -> DetectionDataset:
    """The images to train or to test on.

    Args:
        config (DataConfig): source, splits, sizes and, for digits, number of scenes.
        train (bool): the training images, mirrored at random where that is allowed, instead of the
            test images. Default: False

    Raises:
        DataError: the data cannot be used; the message is one line.
        ConfigError: an option is out of its range.
    """
    digits, size = config.source == "digits", config.size or None
    test_split = config.test_split or ("test" if digits else "val")
    split = config.train_split if train else test_split
    try:
        if digits:
            return _open_digits(
                split,
                size,
                num_images=config.train_images if train else config.test_images,
                max_objects=config.max_objects,
                clutter=config.clutter,
                seed=config.seed,
            )
        return open_dataset(
            config.source,
            split,
            size=size,
            short_side=config.short_side or None,
            max_side=config.max_side or None,
            transform=RandomHorizontalFlip() if train and config.flip else None,
        )
    except DataError:
        raise
    except ValueError as error:
        text = str(error)
        for name in ("num_images", "split"):  # settings that exist for training and for testing
            if text.startswith(f"{name}:"):
                kind = "train" if train else "test"
                text = f"{kind}_{name.removeprefix('num_')}{text.removeprefix(name)}"
        raise ConfigError(f"data.{text}") from None


# Scenes take seconds to draw and no run changes them, so the runs of a process share them.
@lru_cache(maxsize=4)
def _open_digits(split: str, size: int | None, **options: Any) -> DetectionDataset:
    return open_dataset("digits", split, size=size, **options)


def check_categories(name: str, owner: str, expected: Sequence[str], got: Sequence[str]) -> None:
    """Check that labels mean the same here as there: without it an AP would be silently wrong.

    Args:
        name (str): the setting to blame.
        owner (str): whose the expected classes are, after "classes".
        expected (sequence of str): names of the classes, by label.
        got (sequence of str): those that came.

    Raises:
        ConfigError: the numbers differ, or a name; the message is one line.

    Example:
        >>> from hqod_ops.training.run import check_categories
        >>> check_categories("data.test_split", "of data.train_split", ["cat"], ["cat"])
    """
    if len(expected) != len(got):
        raise ConfigError(
            f"{name}: expected the {len(expected)} classes {owner}, got {len(got)} classes"
        )
    for label, (wanted, found) in enumerate(zip(expected, got, strict=True)):
        if wanted != found:
            raise ConfigError(
                f"{name}: expected the classes {owner}, got {found!r} for {wanted!r} as class "
                f"{label + 1} of {len(expected)}"
            )


def build_model(config: RunConfig, num_classes: int) -> ATSS:
    """An untrained float detector.

    Raises:
        ConfigError: the settings of the model do not fit together.
    """
    try:
        return ATSS(config.model, num_classes)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from None


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto" is CUDA where there is one.

    Raises:
        ConfigError: the name is unknown or the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).partition("\n")[0]
        raise ConfigError(f"device: cannot use {name!r}: {first}") from None
    if device.type == "meta":
        raise ConfigError(f"device: cannot use {name!r}: it computes no values")
    return device


def quantize(model: ATSS, config: QuantConfig) -> None:
    """Put quantizers into a detector's network, in place; their scales are still to be set."""
    prepare_qat(
        model.network,
        QATConfig(
            weight_bits=config.bits,
            act_bits=config.bits,
            edge_bits=config.edge_bits,
            weight_init=config.weight_init,
        ),
    )


def _calibrate(model: ATSS, dataset: DetectionDataset, config: RunConfig) -> None:
    """The first scales, from a sample of the training images."""
    calibrate(model.network, _calibration_batches(model, dataset, config), progress=False)


def _calibration_batches(
    model: ATSS, dataset: DetectionDataset, config: RunConfig
) -> Iterator[Tensor]:
    """Batches of images drawn by the run's seed, one in memory at a time.

    Files are often sorted by what is in them, so the first ones are no sample.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(dataset), generator=generator)[: config.quant.calibration_images]
    for indices in order.split(config.schedule.batch_size):
        images = [dataset[i][0] for i in indices.tolist()]
        yield batch_images(images, device, model.strides[-1])


def _load_float(model: ATSS, config: RunConfig, categories: Sequence[str]) -> None:
    state = read_checkpoint(config.init)
    if state["config"]["quant"]["bits"]:
        raise ConfigError(f"init: expected the checkpoint of a float model, got {config.init}")
    check_categories("init", "of the data", categories, state["categories"])
    try:
        model.load_state_dict(state["model"])
    except RuntimeError:
        raise ConfigError(
            f"init: the network of {config.init} differs from that of this run's settings"
        ) from None


def load_detector(path: str | Path) -> tuple[ATSS, RunConfig, list[str]]:
    """A trained detector.

    Args:
        path (str or Path): a checkpoint, or the directory of a run.

    Returns:
        tuple: the detector in eval mode on the CPU, the configuration of its run, and the names of
        its classes.

    Raises:
        ConfigError: no checkpoint of a run.
    """
    state = read_checkpoint(path)
    config = from_dict(RunConfig, state["config"])
    model = build_model(config, len(state["categories"]))
    if config.quant.bits:
        quantize(model, config.quant)
    model.load_state_dict(state["model"])
    return model.eval(), config, state["categories"]


@torch.no_grad()
def predict(
    model: ATSS,
    dataset: Dataset[tuple[Tensor, Target]],
    config: TestConfig | None = None,
    *,
    workers: int = 0,
    progress: bool = True,
) -> tuple[list[Detections], list[Target]]:
    """Detections on every image of a data set.

    Args:
        model (ATSS): the detector; it is put into eval mode.
        dataset (Dataset): images with targets, as a :class:`DetectionDataset` has them.
        config (TestConfig, optional): thresholds and limits. Default: None, TestConfig()
        workers (int): processes that load images. Default: 0
        progress (bool): show a progress bar where the output is a terminal. Default: True

    Returns:
        tuple: detections and targets of every image, in pixels of the network's input, on the CPU.
    """
    device = next(model.parameters()).device
    model.eval()
    loader = DataLoader(
        dataset, batch_size=_EVALUATION_BATCH, num_workers=workers, collate_fn=collate
    )
    outputs: list[Detections] = []
    truth: list[Target] = []
    with progress_bar("evaluate", len(loader), enabled=progress) as advance:
        for images, targets in loader:
            found = model.detect(batch_images(images, device, model.strides[-1]), config)
            outputs += [_on_cpu(entry, image) for entry, image in zip(found, images, strict=True)]
            truth += targets
            advance("")
    return outputs, truth


def _on_cpu(found: Detections, image: Tensor) -> Detections:
    """Detections cut at the border of their image, which may be smaller than its batch."""
    limit = torch.tensor([image.shape[2], image.shape[1]] * 2, dtype=torch.float32)
    return {
        "boxes": torch.minimum(found["boxes"].cpu(), limit),
        "scores": found["scores"].cpu(),
        "labels": found["labels"].cpu(),
    }


def evaluate(
    model: ATSS, dataset: DetectionDataset, config: RunConfig, *, progress: bool = True
) -> tuple[dict[str, float], HarmonyReport]:
    """COCO's metrics and the agreement of scores and IoUs.

    Args:
        model (ATSS): the detector.
        dataset (DetectionDataset): images with ground truth.
        config (RunConfig): thresholds, limits and workers.
        progress (bool): show a progress bar where the output is a terminal. Default: True

    Returns:
        tuple: the metrics of :func:`hqod_ops.detection.evaluation.evaluate_coco` with those of the
        harmony report, and that report.
    """
    outputs, targets = predict(
        model, dataset, config.test, workers=config.data.workers, progress=progress
    )
    metrics = evaluate_coco(dataset.coco_ground_truth, coco_results(outputs, targets))
    harmony = harmony_report(outputs, targets)
    return {**metrics, **harmony.as_dict()}, harmony


def is_finished(directory: Path) -> bool:
    """Whether a run has its result."""
    return (directory / RESULT).is_file()


def saved_settings(directory: Path) -> dict[str, Any]:
    """The settings of a run that was started, as plain data.

    They are those of its checkpoint, or of its ``config.json`` if it was stopped before the first.

    Raises:
        ConfigError: no run was started there, or its file is broken.
    """
    if (directory / CHECKPOINT).is_file():
        return dict(read_checkpoint(directory)["config"])
    if (directory / CONFIG).is_file():
        return read(directory / CONFIG)
    raise ConfigError(
        f"{directory}: expected a run to resume, found neither {CHECKPOINT} nor {CONFIG}"
    )


class Run:
    """One training run in a directory of its own.

    It leaves ``config.json``, ``log.jsonl`` (a line an epoch), ``last.pt`` (the checkpoint after
    the last whole epoch), ``harmony.npz`` and ``result.json``. The result is that of the last
    epoch: no epoch is chosen by its score on the test images.

    Args:
        config (RunConfig): everything the run depends on.
        runs (Path): the directory of all runs.
        resume (bool): continue where the run was stopped, or start if it never did. Default: False

    Raises:
        ConfigError: the directory holds a run already (without resume) or one with other settings
            (with resume).

    Example:
        >>> from pathlib import Path
        >>> from hqod_ops.training.settings import RunConfig
        >>> from hqod_ops.training.run import Run
        >>> Run(RunConfig(name="fp32"), Path("runs")).directory.as_posix()
        'runs/fp32'
    """

    def __init__(self, config: RunConfig, runs: Path, *, resume: bool = False) -> None:
        self.config, self.directory = config, runs / config.name
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

    def _check_same(self, saved: dict[str, Any]) -> None:
        for name, value in _flat(to_dict(self.config)).items():
            old = _flat(saved).get(name)
            if old != value and name not in _MAY_CHANGE:
                raise ConfigError(
                    f"{self.directory}: cannot resume: {name} was {old!r} and is now {value!r}"
                )

    def train(self, *, progress: bool = True) -> dict[str, Any]:
        """Train to the end, evaluate, and write the result.

        Args:
            progress (bool): show progress bars where the output is a terminal. Default: True

        Returns:
            dict: the metrics, ``seconds`` of training, ``epochs``, ``parameters``.

        Raises:
            ValueError: data or settings cannot be used; the message is one line.
            Interrupted: Ctrl-C; the run can be resumed.
        """
        config, device = self.config, choose_device(self.config.device)
        # First of all: a run that is stopped before its first checkpoint is resumed by this file.
        self.directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(to_dict(config), indent=2) + "\n"
        (self.directory / CONFIG).write_text(text, encoding="utf-8")
        torch.manual_seed(config.seed)
        dataset = open_data(config.data, train=True)
        # Opened before the training, so that a mistake in it does not cost hours.
        test = open_data(config.data)
        check_categories(
            "data.test_split", "of data.train_split", dataset.categories, test.categories
        )
        model = build_model(config, len(dataset.categories)).to(device)
        if config.init and self._state is None:
            _load_float(model, config, dataset.categories)
        if config.quant.bits:
            quantize(model, config.quant)
            if self._state is None:
                _calibrate(model, dataset, config)
        trainer = Trainer(model, dataset, config, self.directory)
        if self._state is not None:
            trainer.load(self._state)
        trainer.fit(title=config.name, progress=progress)
        metrics, harmony = evaluate(model, test, config, progress=progress)
        harmony.save(self.directory / HARMONY)
        result: dict[str, Any] = {
            **metrics,
            "epochs": trainer.epoch,
            "seconds": round(sum(entry["seconds"] for entry in trainer.history), 1),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        # JSON knows no NaN: a metric without a value is null.
        known = {k: None if v != v else v for k, v in result.items()}
        text = json.dumps(known, indent=2, allow_nan=False) + "\n"
        (self.directory / RESULT).write_text(text, encoding="utf-8")
        return result


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = tuple(value) if isinstance(value, list) else value
    return flat
