"""Photos of phones are stored as the sensor lies, with an orientation in EXIF. Annotation tools
show and measure them turned, or as stored, or mix both.

Reports: https://github.com/facebookresearch/detectron2/issues/788 and 213 (boxes and pixels of
different pictures), https://github.com/HumanSignal/label-studio/issues/6608 (turned boxes beside
the size as stored).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from hqod_ops.detection.data import DataError, DetectionDataset, open_dataset
from python_tests.reports.layouts import BOX, HEIGHT, WIDTH, coco, edited, save, voc, xml

pytestmark = pytest.mark.require("PIL")

STORED, TURNED = (WIDTH, HEIGHT), (HEIGHT, WIDTH)
LOW = [10, 50, 20, 10]
"""A box that lies in the turned picture alone."""


def photo(path: Path, orientation: int, size: tuple[int, int] = STORED) -> Path:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = orientation
    return save(path, *size, exif=exif.tobytes())


def open_photo(
    root: Path,
    tag: int,
    annotated: tuple[int | None, int | None],
    bbox: list[float] | None = None,
    stored: tuple[int, int] = STORED,
    **options: Any,
) -> DetectionDataset:
    photo(root / "val/a.png", tag, stored)
    content = edited(
        images__width=annotated[0],
        images__height=annotated[1],
        annotations__bbox=bbox or [8, 6, 30, 24],
    )
    return open_dataset(coco(root, content), "val", **options)


def shown(path: Path) -> torch.Tensor:
    """The picture as Pillow turns it."""
    import numpy as np
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        return torch.from_numpy(np.array(ImageOps.exif_transpose(file))).permute(2, 0, 1) / 255


@pytest.mark.parametrize("orientation", range(5, 9))
def test_annotated_size_says_that_boxes_are_of_the_turned_picture(
    tmp_path: Path, orientation: int
) -> None:
    image, target = open_photo(tmp_path, orientation, TURNED, LOW)[0]
    assert image.shape == (3, WIDTH, HEIGHT)
    assert torch.equal(image, shown(tmp_path / "val/a.png"))
    assert target["boxes"].tolist() == [[10, 50, 30, 60]]


@pytest.mark.parametrize("orientation", range(5, 9))
def test_annotated_size_says_that_boxes_are_of_the_stored_picture(
    tmp_path: Path, orientation: int
) -> None:
    image, target = open_photo(tmp_path, orientation, STORED)[0]
    assert image.shape == (3, HEIGHT, WIDTH)
    assert image[0, :, : WIDTH // 2].min() == 1 and image[0, :, WIDTH // 2 :].max() == 0
    assert target["boxes"].tolist() == [BOX]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("setting", ["auto", "exif", "stored"])
def test_a_setting_decides_where_both_sizes_fit(
    tmp_path: Path, orientation: int, setting: str
) -> None:
    """A square fits both ways; so does any picture that is mirrored or upside down."""
    side = (WIDTH, WIDTH) if orientation >= 5 else STORED
    data = open_photo(tmp_path, orientation, side, stored=side, orientation=setting)
    plain = save(tmp_path / "plain.png", *side)
    expected = shown(plain if setting == "stored" else tmp_path / "val/a.png")
    assert torch.equal(data[0][0], expected)
    assert torch.equal(expected, shown(plain)) == (setting == "stored" or orientation == 1)


@pytest.mark.parametrize("orientation", [6, 8])
@pytest.mark.parametrize("annotated", [STORED, TURNED, (None, None)], ids=str)
def test_a_setting_overrules_the_annotated_size(
    tmp_path: Path, orientation: int, annotated: tuple[int | None, int | None]
) -> None:
    turned = open_photo(tmp_path / "a", orientation, annotated, LOW, orientation="exif")
    image, target = turned[0]
    assert image.shape == (3, WIDTH, HEIGHT) and target["boxes"].tolist() == [[10, 50, 30, 60]]
    assert turned.coco_ground_truth["images"][0]["width"] == HEIGHT
    stored = open_photo(tmp_path / "b", orientation, annotated, orientation="stored")
    image, target = stored[0]
    assert image.shape == (3, HEIGHT, WIDTH) and target["boxes"].tolist() == [BOX]


def test_boxes_outside_are_counted_and_the_setting_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photo(tmp_path / "val/a.png", 6)
    content = edited()
    content["annotations"].append({"image_id": 1, "category_id": 1, "bbox": LOW})
    content["annotations"].append({"image_id": 1, "category_id": 1, "bbox": [10, 40, 20, 20]})
    with caplog.at_level(logging.WARNING):
        data = open_dataset(coco(tmp_path, content), "val")
    assert data.box_counts == (3, 2, 1, 1)  # type: ignore[attr-defined]
    assert data[0][1]["boxes"].tolist() == [BOX, [10, 40, 30, 48]]
    (said,) = caplog.messages
    assert "of 3 boxes 1 are clipped" in said and "1 dropped" in said
    assert "1 of the images where they fall outside are turned by EXIF" in said
    assert 'orientation "exif" (data.orientation)' in said


def test_all_boxes_outside_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of its 1 boxes .* turned by EXIF"):
        open_photo(tmp_path, 6, STORED, LOW)


def test_another_size_is_an_error_that_names_both(tmp_path: Path) -> None:
    data = open_photo(tmp_path, 6, (50, 60))
    with pytest.raises(DataError) as caught:
        data[0]
    assert "expected 50 x 60 pixels as annotated, got 64 x 48 (48 x 64 as EXIF turns" in str(
        caught.value
    )


def test_broken_exif_is_no_orientation(tmp_path: Path) -> None:
    save(tmp_path / "val/a.jpg", exif=b"Exif\0\0MM\0*\0\0\xff\xff broken")
    content = edited(images__file_name="a.jpg")
    data = open_dataset(coco(tmp_path, content, "val/a.jpg"), "val")
    assert data[0][0].shape == (3, HEIGHT, WIDTH)


def test_voc_without_a_size(tmp_path: Path) -> None:
    voc(tmp_path, "one")
    photo(tmp_path / "JPEGImages/one.png", 6)
    (tmp_path / "Annotations/one.xml").write_text(xml(size=""))
    image, target = open_dataset(tmp_path, "val")[0]
    assert image.shape == (3, WIDTH, HEIGHT) and target["boxes"].tolist() == [BOX]
    image, _ = open_dataset(tmp_path, "val", orientation="stored")[0]
    assert image.shape == (3, HEIGHT, WIDTH)


def test_unknown_setting(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="orientation: expected one of 'auto', 'exif', 'stored'"):
        open_photo(tmp_path, 1, STORED, orientation="left")
