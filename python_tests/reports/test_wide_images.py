"""Grey images of more than 8 bits were cut off at 255, so that all of them was white; and the other
ways in which pixels are stored: palettes, transparency, CMYK.

Reports: https://github.com/python-pillow/Pillow/issues/2574 and 5991 (16-bit grey PNG in mode "I"
or "I;16" is clipped by ``convert("RGB")``).
"""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hqod_ops.detection.data import DataError, open_dataset
from python_tests.reports.layouts import HEIGHT, WIDTH, coco, edited

pytestmark = pytest.mark.require("PIL")

RAMP = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)


def load(root: Path, name: str, **options: Any) -> Tensor:
    """The picture as a data set gives it, without a warning of Pillow's."""
    content = edited(images__file_name=name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image: Tensor = open_dataset(coco(root, content, f"val/{name}"), "val", **options)[0][0]
    return image


def save(root: Path, name: str, image: Any, **options: Any) -> None:
    (root / "val").mkdir()
    image.save(root / "val" / name, **options)


def tiff12(values: np.ndarray) -> bytes:
    """A grey TIFF of 12 bits, which Pillow reads and does not write."""
    pairs = values.reshape(-1, 2).astype(int)
    first, second = pairs[:, 0], pairs[:, 1]
    data = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1)
    packed = data.astype(np.uint8).tobytes()
    tags = [(256, WIDTH), (257, HEIGHT), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1),
            (278, HEIGHT), (279, len(packed))]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed
    return head + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.png", "<u2"),
        ("a.tif", "<u2"),
        ("a.tif", ">u2"),
        ("a.tif", "<i4"),  # mode "I", as older Pillow reads PNG too
        ("a.pgm", "<i4"),
        ("a.tif", "<f4"),
    ],
)
def test_scaled_by_their_own_range(tmp_path: Path, name: str, kind: str) -> None:
    from PIL import Image

    values = (RAMP / 65535 if kind == "<f4" else RAMP).astype(kind)
    save(tmp_path, name, Image.fromarray(values))
    expected = torch.from_numpy(RAMP.astype(np.float32) / 65535)
    # One rounding to float32.
    torch.testing.assert_close(load(tmp_path, name), expected.expand(3, -1, -1), rtol=0, atol=1e-7)


def test_twelve_bits(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val/a.tif").write_bytes(tiff12(RAMP >> 4))
    expected = torch.from_numpy((RAMP >> 4).astype(np.float32) / 4095)
    image = load(tmp_path, "a.tif")
    torch.testing.assert_close(image, expected.expand(3, -1, -1), rtol=0, atol=1e-7)


def test_resized_in_full_precision(tmp_path: Path) -> None:
    from PIL import Image

    save(tmp_path, "a.png", Image.fromarray(RAMP))
    image = load(tmp_path, "a.png", size=24)
    assert image.shape == (3, 24, 24) and image[0].unique().numel() > 256
    assert image.mean().item() == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (RAMP.astype(np.float32), "from 0 to 1, as this kind of image has, got 0 to 65535"),
        (RAMP.astype(np.int32) - 1, "from 0 to 65535, as this kind of image has, got -1 to 65534"),
        (RAMP.astype(np.int32) * 2, "from 0 to 65535, as this kind of image has, got 0 to 131070"),
        (np.where(RAMP > 5, np.nan, 0.5).astype(np.float32), "got nan to nan"),
    ],
    ids=["floats", "negative", "32 bits", "nan"],
)
def test_unknown_range_is_refused(tmp_path: Path, values: np.ndarray, said: str) -> None:
    from PIL import Image

    save(tmp_path, "a.tif", Image.fromarray(values))
    with pytest.raises(DataError, match=said):
        load(tmp_path, "a.tif")


GRAY = (RAMP >> 8).astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("a.png", "L", {}),
        ("a.png", "L", {"transparency": 3}),
        ("a.png", "LA", {}),
        ("a.png", "P", {}),
        ("a.png", "P", {"transparency": 3}),
        ("a.png", "P", {"transparency": bytes(range(256))}),
        ("a.gif", "P", {"transparency": 3}),
        ("a.png", "RGBA", {}),
        ("a.png", "RGB", {"transparency": (3, 3, 3)}),
        ("a.tif", "CMYK", {}),
    ],
    ids=str,
)
def test_eight_bits_in_other_modes(
    tmp_path: Path, name: str, mode: str, options: dict[str, Any]
) -> None:
    """The colours are those stored; transparency is left out."""
    from PIL import Image

    gray = Image.fromarray(GRAY)
    if mode == "P":
        gray.putpalette([level for value in range(256) for level in (value, value, value)])
    image = gray if gray.mode == mode else gray.convert("RGB").convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(7)
    save(tmp_path, name, image, **options)
    expected = torch.from_numpy(GRAY.astype(np.float32) / 255)
    torch.testing.assert_close(load(tmp_path, name), expected.expand(3, -1, -1), rtol=0, atol=1e-7)


def test_black_and_white(tmp_path: Path) -> None:
    from PIL import Image

    save(tmp_path, "a.png", Image.fromarray(RAMP > 32767))
    assert torch.equal(load(tmp_path, "a.png")[2], torch.from_numpy(RAMP > 32767).float())
