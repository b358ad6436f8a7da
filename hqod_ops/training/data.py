"""The images of a run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from hqod_ops.detection.data import (
    DataError,
    DetectionDataset,
    RandomHorizontalFlip,
    open_dataset,
)
from hqod_ops.training import ConfigError
from hqod_ops.training.settings import DataConfig


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
        data = open_dataset(
            config.source,
            split,
            size=size,
            short_side=config.short_side or None,
            max_side=config.max_side or None,
            transform=RandomHorizontalFlip() if train and config.flip else None,
            categories=config.categories or None,
            orientation=config.orientation,
        )
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
