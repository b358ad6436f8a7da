"""What the layouts on disk share: boxes in arrays, what is said about them, resizing."""

from __future__ import annotations

import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hqod_ops.detection.data.coco_format import Annotation, coco_dict
from hqod_ops.detection.data.dataset import (
    DataError,
    DetectionDataset,
    Target,
    Transform,
    logger,
)
from hqod_ops.detection.data.images import (
    ORIENTATIONS,
    image_size,
    is_turned,
    read_image,
)

_SPLITS = (("train", "training"), ("val", "valid", "validation"), ("test", "testing"))

_BORDER = 1.0
"""Pixels by which a box may stick out unmentioned: tools round, and count from 0 or from 1."""

_FAR = 1e100
_WHOLE = re.compile(r"[-+]?[0-9]{1,19}(\.0*)?")

_LOOKED_AT = 200
"""Images that are looked into for the reason why boxes fall outside of them."""


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

    # torchvision's Resize rounds the longer side down: boxes and pixels would no longer be those
    # that earlier runs saw.
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


class BoxCounts(NamedTuple):
    """What became of the boxes of a data set.

    Attributes:
        total (int): boxes in its files.
        usable (int): those to learn from: with an area inside their image, and no crowd.
        clipped (int): those that reached over their image's border by more than a pixel.
        dropped (int): those without an area inside their image.
    """

    total: int
    usable: int
    clipped: int
    dropped: int


class Records:
    """Image files and the objects in them, as a reader finds them, in pixels of the files.

    Args:
        source (str or Path): the file to name where something is wrong with all of them.
    """

    def __init__(self, source: str | Path) -> None:
        self.source = source
        self.paths: list[str] = []
        self.ids = array("q")
        self.sizes = array("q")
        self.images, self.labels, self.crowds = array("q"), array("q"), array("q")
        self.boxes, self.areas = array("d"), array("d")
        self.lenient: Counter[str] = Counter()
        """What was read though it is not as the format has it, and how often: for the log."""

    def add_image(self, path: str, image_id: int, width: int, height: int) -> None:
        self.paths.append(path)
        self.ids.append(image_id)
        self.sizes.extend((width, height))

    def add_object(
        self, image: int, label: int, box: Sequence[float], crowd: int, area: float
    ) -> None:
        """An object of the image at a position; the box is x1, y1, x2, y2."""
        self.images.append(image)
        self.labels.append(label)
        self.crowds.append(crowd)
        self.boxes.extend(box)
        self.areas.append(area)


def whole(value: Any) -> int | None:
    """A whole number, also as an integral float or as text; None for anything else.

    Example:
        >>> from hqod_ops.detection.data.files import whole
        >>> whole(7), whole(7.0), whole(" 7 "), whole("7.0"), whole(7.5), whole("x"), whole(True)
        (7, 7, 7, 7, None, None, None)
    """
    if type(value) is not int:  # as nearly all are
        if isinstance(value, str):
            value = int(value.partition(".")[0]) if _WHOLE.fullmatch(value.strip()) else None
        elif isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
            value = int(value)  # beyond 2**53 it may be the neighbour of what was meant
        else:
            return None
    return value if value is not None and -(2**63) <= value < 2**63 else None


def check_box(box: Any, where: str) -> tuple[float, float, float, float]:
    """Four finite numbers, as floats.

    Raises:
        DataError: anything else; the message starts with ``where``.
    """
    if not isinstance(box, list | tuple) or len(box) != 4:
        raise DataError(f"{where}: expected a box of 4 numbers, got {box!r}")
    try:
        a, b, c, d = map(float, box)
    except OverflowError:
        raise DataError(f"{where}: expected finite coordinates, got one beyond float") from None
    except (TypeError, ValueError):
        raise DataError(f"{where}: expected a box of 4 numbers, got {box!r}") from None
    # Their differences and products stay finite too.
    if not abs(a) + abs(b) + abs(c) + abs(d) < _FAR:
        raise DataError(f"{where}: expected finite coordinates, got {box!r}")
    return a, b, c, d


def check_names(categories: Sequence[str]) -> list[str]:
    """The names of classes that a user asks for.

    Raises:
        ValueError: there is none, or one is there twice.
    """
    names = [] if isinstance(categories, str) else list(categories)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"categories: expected different names of classes, got {categories!r}")
    return names


def split_names(split: str) -> list[str]:
    """Names under which a split may be found on disk, the likeliest first.

    Example:
        >>> from hqod_ops.detection.data.files import split_names
        >>> split_names("val")[:4]
        ['val', 'val2017', 'val2014', 'valid']
    """
    alike = next((words for words in _SPLITS if split in words), ())
    words = dict.fromkeys((split, *alike))
    return [word + year for word in words for year in ("", "2017", "2014")]


def no_split(where: str, split: str, there: Iterable[str]) -> DataError:
    """The error for a split that is not there."""
    names = [repr(name) for name in dict.fromkeys(there)]
    if not names:
        return DataError(where)
    listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return DataError(
        f"{where}; splits that are there: {listed} (expected {split!r}; the settings are "
        "data.train_split and data.test_split)"
    )


class FileDataset(DetectionDataset):
    """A data set of image files. Images are read with Pillow, converted to RGB and resized by it.

    Args:
        categories (list[str]): names of the classes.
        records (Records): the images, in the order of the data set, and their objects.
        resize (Resize): the size they are brought to.
        transform (callable, optional): see :class:`DetectionDataset`.
        orientation (str): to which picture boxes belong where EXIF asks for a photo to be turned:
            ``"exif"`` to the turned one, ``"stored"`` to that in the file, ``"auto"`` to the one
            that has the annotated size, the turned one if both have it. Default: ``"auto"``

    Attributes:
        sizes (int64 Tensor[N, 2]): width and height of the images, as annotated.
        box_counts (BoxCounts): how many boxes there are, were clipped and were dropped. What is
            worth a word is said once through :mod:`logging` as the data set is opened.

    Raises:
        DataError: an image file is missing, or there is none, or none of the boxes has an area
            inside its image; when an image is loaded: it cannot be read, or has another size than
            annotated.
    """

    def __init__(
        self,
        categories: list[str],
        records: Records,
        resize: Resize,
        transform: Transform | None = None,
        orientation: str = "auto",
    ) -> None:
        super().__init__(transform)
        if orientation not in ORIENTATIONS:
            options = ", ".join(map(repr, ORIENTATIONS))
            raise ValueError(f"orientation: expected one of {options}, got {orientation!r}")
        missing = [path for path in records.paths if not os.path.isfile(path)]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise DataError(f"{missing[0]}: the image file is missing{more}")
        self.categories, self.resize, self.orientation = categories, resize, orientation
        self.paths, self.source = records.paths, records.source
        # In tensors, which the workers of a loader share however they are started.
        self._ids, self.sizes = _tensor(records.ids), _tensor(records.sizes).reshape(-1, 2)
        images = _tensor(records.images)
        order = images.argsort(stable=True)
        self._starts = torch.searchsorted(images[order], torch.arange(len(self.paths) + 1))
        self._boxes = _tensor(records.boxes).reshape(-1, 4)[order]
        self._labels, self._crowds, self._areas = (
            _tensor(values)[order] for values in (records.labels, records.crowds, records.areas)
        )
        if orientation != "auto":
            self._orient()
        self.box_counts = self._count(images[order], records.lenient)

    def __len__(self) -> int:
        return len(self.paths)

    def require_boxes(self) -> None:
        if not self.box_counts.usable:
            raise DataError(
                f"{self.source}: no box to learn from among {self.box_counts.total} boxes of "
                f"{len(self)} images"
            )

    @property
    def coco_ground_truth(self) -> dict[str, Any]:
        ids, sizes = self._ids.tolist(), self.sizes.tolist()
        owners = np.repeat(ids, self._starts.diff().numpy()).tolist()
        columns = (self._labels, self._boxes, self._crowds, self._areas)
        return coco_dict(
            self.categories,
            [
                {"id": i, "file_name": os.path.basename(path), "width": width, "height": height}
                for i, path, (width, height) in zip(ids, self.paths, sizes, strict=True)
            ],
            map(Annotation, owners, *(column.tolist() for column in columns)),
        )

    def load(self, index: int) -> tuple[Tensor, Target]:
        full_width, full_height = self.sizes[index].tolist()
        width, height = self.resize(full_width, full_height)
        scale = torch.tensor([width / full_width, height / full_height])
        mine = slice(*self._starts[index : index + 2].tolist())
        boxes = _clip(self._boxes[mine].float() * scale.repeat(2), torch.tensor([width, height]))
        kept = _has_area(boxes)
        target = {
            "boxes": boxes[kept],
            "labels": self._labels[mine][kept],
            "iscrowd": self._crowds[mine][kept],
            "image_id": int(self._ids[index]),
            "scale": scale,
        }
        size = (full_width, full_height), (width, height)
        return read_image(self.paths[index], *size, self.orientation), target

    def unreadable(self, seen: Callable[[str], object] | None = None) -> dict[int, str]:
        """Images that cannot be loaded: every file is read whole, by as many threads as processors.

        Args:
            seen (callable, optional): called with the path of each image that was looked at.
                Default: None

        Returns:
            dict[int, str]: why not, by the image's place.
        """

        def fault(index: int) -> str | None:
            width, height = self.sizes[index].tolist()
            try:
                read_image(self.paths[index], (width, height), (width, height), self.orientation)
            except DataError as error:
                return str(error)
            return None

        found: dict[int, str] = {}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for index, message in enumerate(pool.map(fault, range(len(self)))):
                if message is not None:
                    found[index] = message
                if seen is not None:
                    seen(self.paths[index])
        return found

    def leave_out(self, images: Iterable[int]) -> None:
        """Leave out images, with their objects; the others keep their ids.

        Args:
            images (iterable of int): their places.

        Raises:
            DataError: none would be left.
        """
        kept = torch.ones(len(self), dtype=torch.bool)
        kept[list(images)] = False
        if not kept.any():
            raise DataError(f"{self.source}: no image is left")
        owners = torch.arange(len(self)).repeat_interleave(self._starts.diff())
        mine = kept[owners]
        self.paths = [path for path, keep in zip(self.paths, kept.tolist(), strict=True) if keep]
        self._starts = torch.cat([self._starts[:1], self._starts.diff()[kept].cumsum(0)])
        self._ids, self.sizes = self._ids[kept], self.sizes[kept]
        self._boxes, self._labels = self._boxes[mine], self._labels[mine]
        self._crowds, self._areas = self._crowds[mine], self._areas[mine]
        owners = torch.arange(len(self)).repeat_interleave(self._starts.diff())
        self.box_counts = self._count(owners, Counter())

    def _orient(self) -> None:
        """Set the sizes of the picture that the user chose, where that of the other is given."""
        for index, path in enumerate(self.paths):
            chosen = image_size(path, self.orientation)
            if self.sizes[index].tolist() == [*reversed(chosen)]:
                self.sizes[index] = torch.tensor(chosen)

    def _count(self, images: Tensor, lenient: Counter[str]) -> BoxCounts:
        """Count the boxes, and say what is worth a word."""
        clipped = _clip(self._boxes, self.sizes[images])
        kept = _has_area(clipped)
        outside = ((self._boxes - clipped).abs() > _BORDER).any(dim=1)
        counts = BoxCounts(
            total=len(kept),
            usable=int((kept & (self._crowds == 0)).sum()),
            clipped=int((kept & outside).sum()),
            dropped=int((~kept).sum()),
        )
        hint = self._hint(images[outside].unique().tolist())
        if counts.total and counts.dropped == counts.total:
            raise DataError(
                f"{self.source}: none of its {counts.total} boxes has an area inside its image"
                f"{hint}"
            )
        if counts.total and float(self._boxes[kept].max()) <= 1.0:
            raise DataError(
                f"{self.source}: expected boxes in pixels, but all of its {counts.total} boxes lie "
                "in the first pixel: are they fractions of the image?"
            )
        said = [f"{what}: {count}" for what, count in lenient.items()]
        if counts.dropped or counts.clipped:
            said.append(
                f"of {counts.total} boxes {counts.clipped} are clipped at the border of their "
                f"image and {counts.dropped} dropped, having no area inside it{hint}"
            )
        if said:
            logger.warning("%s: %s", self.source, "; ".join(said))
        return counts

    def _hint(self, images: list[int]) -> str:
        """What to do about boxes outside of photos that EXIF turns."""
        turned = sum(is_turned(self.paths[index]) for index in images[:_LOOKED_AT])
        if not turned or self.orientation == "exif":
            return ""
        return (
            f"; {turned} of the images where they fall outside are turned by EXIF: with "
            'orientation "exif" (data.orientation) boxes are those of the turned image'
        )


def _tensor(values: array[Any]) -> Tensor:
    kind = torch.float64 if values.typecode == "d" else torch.int64
    return torch.frombuffer(values, dtype=kind) if values else torch.empty(0, dtype=kind)


def _clip(boxes: Tensor, size: Tensor) -> Tensor:
    """Boxes cut off at the border of images of a width and height."""
    limits = size.to(boxes.dtype).repeat(*[1] * (size.ndim - 1), 2)
    return torch.minimum(boxes.clamp(min=0), limits)


# COCO has a few boxes without area: they count in the evaluation, but no detector can learn from
# them.
def _has_area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
