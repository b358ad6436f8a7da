"""The images of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hqod_ops.detection.data import (
    DataError,
    DetectionDataset,
    RandomHorizontalFlip,
    Resize,
    open_dataset,
)
from hqod_ops.detection.data.dataset import Target, logger
from hqod_ops.detection.data.files import FileDataset
from hqod_ops.training import ConfigError, WorkerError
from hqod_ops.training.engine import from_first, rank
from hqod_ops.training.progress import progress_bar
from hqod_ops.training.settings import DataConfig

_DIGITS = 96
_MULTIPLE = 32
"""Of the shorter side that is chosen for images: the stride of the deeper detectors."""
_LONGEST = 640
"""The longest shorter side that is chosen."""
_NAMED = 20
"""Unreadable images that are named, at most."""


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
    config = settled(config)
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
        data = open_dataset(
            config.source,
            split,
            size=None if size == "auto" else size,
            short_side=config.short_side or None,
            max_side=(config.max_side or None) if size != "auto" else None,
            transform=RandomHorizontalFlip() if train and config.flip else None,
            categories=config.categories or None,
            orientation=config.orientation,
        )
        if size == "auto" and isinstance(data, FileDataset):
            data.resize = _typical_size(data, config.max_side)
        if config.unreadable == "skip":
            check_images(data, config)
        if train:
            data.require_boxes()
        return data
    except DataError:
        raise
    except ValueError as error:
        text = str(error)
        for name in ("num_images", "split"):  # settings that exist for training and for testing
            if text.startswith(f"{name}:"):
                kind = "train" if train else "test"
                text = f"{kind}_{name.removeprefix('num_')}{text.removeprefix(name)}"
        raise ConfigError(f"data.{text}") from None


def settled(config: DataConfig, dataset: DetectionDataset | None = None) -> DataConfig:
    """The settings with sizes in pixels where these are known, in the place of "auto".

    Args:
        config (DataConfig): settings.
        dataset (DetectionDataset, optional): the images that they opened. Default: None, sizes are
            known where the data need not be looked at
    """
    if config.size != "auto":
        return config
    if config.source == "digits":
        return replace(config, size=_DIGITS)
    if config.short_side:
        return replace(config, size=0)
    if isinstance(dataset, FileDataset):
        resize = dataset.resize
        return replace(
            config, size=0, short_side=resize.short_side or 0, max_side=resize.max_side or 0
        )
    return config


def _typical_size(dataset: FileDataset, max_side: int) -> Resize:
    """The shape kept, and the shorter side that of the median image within limits."""
    short = int(dataset.sizes.min(dim=1).values.median())
    short = min(-(-short // _MULTIPLE) * _MULTIPLE, _LONGEST)
    return Resize(short_side=short, max_side=max_side or 2 * short)


def image_shape(dataset: DetectionDataset) -> tuple[int, int]:
    """Height and width of a typical image: that of median size, of files."""
    if isinstance(dataset, FileDataset):
        width, height = dataset.resize(*dataset.sizes.median(dim=0).values.tolist())
        return height, width
    height, width = dataset.load(0)[0].shape[1:]
    return height, width


def check_images(dataset: DetectionDataset, config: DataConfig, *, progress: bool = True) -> None:
    """Look at every image file before hours are spent, as ``data.unreadable`` says.

    In a distributed run every process calls it; the first one looks.

    Args:
        dataset (DetectionDataset): images; nothing is to be done unless they are files.
        config (DataConfig): with ``unreadable``.
        progress (bool): show a progress bar where the output is a terminal. Default: True

    Raises:
        DataError: files cannot be read; the message names them.
    """
    if not isinstance(dataset, FileDataset) or config.unreadable == "unchecked":
        return
    found: dict[int, str] | None = None
    if rank() == 0:
        with progress_bar("check images", len(dataset), enabled=progress) as advance:
            found = dataset.unreadable(lambda path: advance(""))
    found = from_first(found)
    if not found:
        return
    text = next(iter(found.values()))
    also = [Path(dataset.paths[index]).name for index in found][1:]
    if also:
        text += f"; also {', '.join(also[:_NAMED])}"
    if len(also) > _NAMED:
        text += f" and {len(also) - _NAMED} more"
    if config.unreadable == "error":
        raise DataError(f"{text}; --skip-unreadable (data.unreadable) leaves such images out")
    count = f"{len(found)} of {len(dataset)} images"
    logger.warning("%s: %s left out: %s", dataset.source, count, text)
    dataset.leave_out(found)


def described(train: DetectionDataset, test: DetectionDataset) -> str:
    """What a run has to say of its images before it starts: how many, their boxes, their size."""
    parts = []
    for name, dataset in (("train on", train), ("test on", test)):
        text = f"{len(dataset)} to {name}"
        if isinstance(dataset, FileDataset):
            counts = dataset.box_counts
            text += (
                f" with {counts.usable} boxes ({counts.clipped} clipped at the border, "
                f"{counts.dropped} dropped)"
            )
        parts.append(text)
    height, width = image_shape(train)
    size = f"of {width} x {height} pixels"
    if isinstance(train, FileDataset):
        before = " x ".join(map(str, train.sizes.median(dim=0).values.tolist()))
        how = "stretched" if train.resize.size else "scaled"
        size = f"{how} from {before} to {width} x {height} pixels (median; data.size)"
    return f"Images: {', '.join(parts)}; {size}"


class Seeded(Dataset[tuple[Tensor, Target]]):
    """A data set whose random transforms depend on a seed and the image alone.

    So they are the same for any number of workers and processes, and after a run was resumed.

    Args:
        dataset (DetectionDataset): the data set.
        seed (int): another one for every epoch.
    """

    def __init__(self, dataset: DetectionDataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        if self.dataset.transform is None:
            return self.dataset[index]
        with torch.random.fork_rng(devices=()):
            # Of the CPU alone: torch.manual_seed would seed a GPU's too.
            torch.default_generator.manual_seed((self.seed * 2**31 + index) % 2**63)
            return self.dataset[index]


# Scenes take seconds to draw and no run changes them, so the runs of a process share them.
@lru_cache(maxsize=4)
def _open_digits(split: str, size: int | None, **options: Any) -> DetectionDataset:
    return open_dataset("digits", split, size=size, **options)


@contextmanager
def workers_watched() -> Iterator[None]:
    """Say what it means where a process that loads images dies, most often for want of memory.

    Raises:
        WorkerError: one did. torch raises it from a signal handler: anywhere, not only where the
            next batch is asked for.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        text = " ".join(str(error).split())
        if not text.startswith("DataLoader worker") and not _hung_up(error):
            raise
        why = text.partition(" It is possible")[0] or "it hung up"
        raise WorkerError(
            f"a process that loads images died ({why}): fewer data.workers need less memory"
        ) from error


def _hung_up(error: Exception) -> bool:
    """Whether the other end of a pipe or socket went: a process that died while it handed a batch
    over, which may show before torch sees that it died."""
    if isinstance(error, ConnectionError):
        return True
    if isinstance(error, FileNotFoundError):  # of a socket: a file has its name here
        return error.filename is None
    return isinstance(error, EOFError) and not error.args


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
        >>> from hqod_ops.training.data import check_categories
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
