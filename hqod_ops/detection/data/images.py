"""Image files as tools and cameras write them, as RGB in [0, 1]."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hqod_ops.detection._extras import require
from hqod_ops.detection.data.dataset import DataError

ORIENTATIONS = ("auto", "exif", "stored")
"""Which picture boxes belong to: the one that fits the annotated size, turned or as stored."""

_ORIENTATION, _BITS_PER_SAMPLE = 0x0112, 0x0102  # of EXIF, of TIFF


def one_line(error: BaseException) -> str:
    """The message of an error, on one line; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    image_module = require("PIL.Image", "Pillow")
    try:
        with image_module.open(path) as image:
            yield image
    except DataError:
        raise
    # A damaged file makes Pillow's decoders raise SyntaxError, struct.error, EOFError and more.
    except Exception as error:
        raise DataError(f"{path}: cannot be read as an image ({one_line(error)})") from error


def _orientation(image: Any) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken EXIF data beside a sound picture says nothing
        return 1
    return value if value in range(2, 9) else 1


def is_turned(path: str | Path) -> bool:
    """Whether an image file can be read and asks by EXIF to be turned."""
    try:
        with _opened(path) as image:
            return _orientation(image) > 1
    except DataError:
        return False


def image_size(path: str | Path, orientation: str = "auto") -> tuple[int, int]:
    """Width and height of an image file, turned as its EXIF says unless as ``"stored"``."""
    with _opened(path) as image:
        width, height = image.size
        turned = orientation != "stored" and _orientation(image) >= 5
        return (height, width) if turned else (width, height)


def read_image(
    path: str | Path, annotated: tuple[int, int], size: tuple[int, int], orientation: str = "auto"
) -> Tensor:
    """An image file as RGB in [0, 1].

    Transparency is left out. Grey values of 16 bits are divided by 65535 and keep their precision,
    floats are taken as they are, in [0, 1].

    Args:
        path (str or Path): the file.
        annotated (tuple of int): width and height that its annotation gives.
        size (tuple of int): width and height to bring it to.
        orientation (str): one of :data:`ORIENTATIONS`. Default: ``"auto"``, turned as EXIF says
            where that fits the annotated size

    Returns:
        Tensor: float32 ``[3, H, W]``.

    Raises:
        DataError: the file is no image, has another size than annotated, or values whose range is
            not known.
    """
    with _opened(path) as image:
        picture, seen = image, f"{image.size[0]} x {image.size[1]}"
        if _orientation(image) > 1:
            upright = require("PIL.ImageOps", "Pillow").exif_transpose(image)
            if orientation == "exif" or (orientation == "auto" and upright.size == annotated):
                picture = upright
            if upright.size != image.size:
                seen += f" ({upright.size[0]} x {upright.size[1]} as EXIF turns it)"
        if picture.size != annotated:
            raise DataError(
                f"{path}: expected {annotated[0]} x {annotated[1]} pixels as annotated, got {seen}"
            )
        return _rgb(path, picture, size)


def _rgb(path: str | Path, image: Any, size: tuple[int, int]) -> Tensor:
    image_module = require("PIL.Image", "Pillow")
    wide = image.mode.startswith("I") or image.mode == "F"
    if wide:  # convert("RGB") would cut such values off at 255
        image = image_module.fromarray(_gray(path, image))
    else:
        if image.mode == "P":  # whose transparency Pillow warns of unless it is kept at first
            image = image.convert("RGBA")
        image = image.convert("RGB")
    if image.size != size:
        image = image.resize(size, image_module.Resampling.BILINEAR)
    if wide:
        return torch.from_numpy(np.array(image, dtype=np.float32)).repeat(3, 1, 1)
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.permute(2, 0, 1).contiguous().float().div_(255.0)


def _gray(path: str | Path, image: Any) -> Any:
    """Values of more than 8 bits in [0, 1], float32 ``[H, W]``."""
    values = np.array(image)
    highest = 1 if image.mode == "F" else 65535
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))
    if image.mode != "F" and 8 < bits[0] < 16:  # TIFF of 12 bits
        highest = 2 ** bits[0] - 1
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= highest):
        raise DataError(
            f"{path}: expected grey values from 0 to {highest}, as this kind of image has, got "
            f"{low:g} to {high:g}: convert it to 8 or 16 bits"
        )
    return values.astype(np.float32) / np.float32(highest)
