"""What the layouts on disk share: reading and resizing images, and records of their objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hqod_ops.detection._extras import require
from hqod_ops.detection.data.coco_format import Annotation, coco_dict
from hqod_ops.detection.data.dataset import DataError, DetectionDataset, Target, Transform


@dataclass(frozen=True)
class Resize:
    """The size that images are brought to.

    Args:
        size (int, optional): width and height of a square; the image is stretched. Default: None
        short_side (int, optional): length of the shorter side, keeping the shape. Default: None
        max_side (int, optional): with short_side, the longer side is at most this. Default: None

    Raises:
        ValueError: size comes with another option, max_side without short_side, or one is below 1.

    Example:
        >>> from hqod_ops.detection.data.files import Resize
        >>> Resize(short_side=800, max_side=1333)(640, 480), Resize()(640, 480)
        ((1067, 800), (640, 480))
    """

    size: int | None = None
    short_side: int | None = None
    max_side: int | None = None

    def __post_init__(self) -> None:
        for name in ("size", "short_side", "max_side"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1 pixel, got {value}")
        if self.size is not None and (self.short_side is not None or self.max_side is not None):
            raise ValueError("size: expected without short_side and max_side, got both")
        if self.max_side is not None and self.short_side is None:
            raise ValueError("max_side: expected together with short_side, got it alone")

    def __call__(self, width: int, height: int) -> tuple[int, int]:
        """The new width and height of an image."""
        if self.size is not None:
            return self.size, self.size
        if self.short_side is None:
            return width, height
        factor = self.short_side / min(width, height)
        if self.max_side is not None:
            factor = min(factor, self.max_side / max(width, height))
        return max(round(width * factor), 1), max(round(height * factor), 1)


@dataclass
class Record:
    """An image file and the objects in it, in pixels of the file."""

    path: Path
    image_id: int
    width: int
    height: int
    objects: list[Annotation]


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of an image file, from its header."""
    image_module = require("PIL.Image", "Pillow")
    try:
        with image_module.open(path) as image:
            width, height = image.size
    except (OSError, image_module.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as an image ({one_line(error)})") from error
    return int(width), int(height)


def one_line(error: BaseException) -> str:
    """The message of an error, on one line."""
    return " ".join(str(error).split())


def check_box(box: Any, where: str) -> tuple[float, float, float, float]:
    """Four finite numbers, as floats.

    Raises:
        DataError: anything else; the message starts with ``where``.
    """
    if not isinstance(box, Sequence) or isinstance(box, str) or len(box) != 4:
        raise DataError(f"{where}: expected a box of 4 numbers, got {box!r}")
    try:
        a, b, c, d = (float(value) for value in box)
    except OverflowError:
        raise DataError(f"{where}: expected finite coordinates, got one beyond float") from None
    except (TypeError, ValueError):
        raise DataError(f"{where}: expected a box of 4 numbers, got {box!r}") from None
    if not all(np.isfinite((a, b, c, d))):
        raise DataError(f"{where}: expected finite coordinates, got {box!r}")
    return a, b, c, d


class FileDataset(DetectionDataset):
    """A data set of image files. Images are read with Pillow, converted to RGB and resized by it.

    Args:
        categories (list[str]): names of the classes.
        records (list[Record]): the images, in the order of the data set.
        resize (Resize): the size they are brought to.
        transform (callable, optional): see :class:`DetectionDataset`.

    Raises:
        DataError: an image file is missing, or there is none; when an image is loaded: it cannot be
            read, or has another size than its record says.
    """

    def __init__(
        self,
        categories: list[str],
        records: list[Record],
        resize: Resize,
        transform: Transform | None = None,
    ) -> None:
        super().__init__(transform)
        for record in records:
            if not record.path.is_file():
                raise DataError(f"{record.path}: the image file is missing")
        self.categories, self.records, self.resize = categories, records, resize

    def __len__(self) -> int:
        return len(self.records)

    @property
    def coco_ground_truth(self) -> dict[str, Any]:
        return coco_dict(
            self.categories,
            [
                {"id": r.image_id, "file_name": r.path.name, "width": r.width, "height": r.height}
                for r in self.records
            ],
            [note for record in self.records for note in record.objects],
        )

    def load(self, index: int) -> tuple[Tensor, Target]:
        record = self.records[index]
        width, height = self.resize(record.width, record.height)
        scale = torch.tensor([width / record.width, height / record.height])
        boxes = torch.tensor([note.box for note in record.objects]).reshape(-1, 4)
        boxes = boxes * scale.repeat(2)
        boxes[:, 0::2] = boxes[:, 0::2].clamp(0, width)
        boxes[:, 1::2] = boxes[:, 1::2].clamp(0, height)
        # COCO has a few boxes without area: they count in the evaluation, but no detector can learn
        # from them.
        kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        target = {
            "boxes": boxes[kept],
            "labels": _integers([note.label for note in record.objects])[kept],
            "iscrowd": _integers([note.iscrowd for note in record.objects])[kept],
            "image_id": record.image_id,
            "scale": scale,
        }
        return self._read(record, width, height), target

    def _read(self, record: Record, width: int, height: int) -> Tensor:
        image_module = require("PIL.Image", "Pillow")
        try:
            with image_module.open(record.path) as file:
                image = file.convert("RGB")
        # Pillow raises SyntaxError for some broken PNGs.
        except (OSError, SyntaxError, image_module.DecompressionBombError) as error:
            reason = one_line(error)
            raise DataError(f"{record.path}: cannot be read as an image ({reason})") from error
        if image.size != (record.width, record.height):
            raise DataError(
                f"{record.path}: expected {record.width} x {record.height} pixels as annotated, "
                f"got {image.size[0]} x {image.size[1]}"
            )
        if image.size != (width, height):
            image = image.resize((width, height), image_module.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
        return pixels.permute(2, 0, 1).contiguous().float().div_(255.0)


def _integers(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
