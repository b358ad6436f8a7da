"""Damaged files: a data set or one clear line, never a traceback from within the readers.

Files are changed at random, from fixed seeds: values by odd ones, bytes by others. Whatever opens
must be sound: boxes inside their images, labels among the classes, ground truth that agrees.
"""

from __future__ import annotations

import copy
import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hqod_ops.detection.data import DataError, open_dataset
from python_tests.mutation import change_bytes, change_value

pytestmark = pytest.mark.require("PIL", "pycocotools")

ROUNDS = 200
"""Files of each kind; 200 of all kinds take a few seconds."""

CONTENT = {
    "info": {},
    "images": [
        {"id": 4, "file_name": "a.png", "width": 40, "height": 20},
        {"id": 9, "file_name": "b.png", "width": 40, "height": 20},
    ],
    "categories": [
        {"id": 0, "name": "all", "supercategory": "none"},
        {"id": 1, "name": "cat", "supercategory": "all"},
        {"id": 2, "name": "dog", "supercategory": "all"},
    ],
    "annotations": [
        {"id": 1, "image_id": 4, "category_id": 1, "bbox": [4, 2, 8, 6], "area": 40.5},
        {"id": 2, "image_id": 4, "category_id": 2, "bbox": [30, 10, 20, 20], "iscrowd": 1},
        {"id": 3, "image_id": 9, "category_id": 2, "segmentation": [[1, 1, 9, 1, 9, 9]]},
        {"id": 4, "image_id": 9, "category_id": 2,
         "segmentation": {"size": [20, 40], "counts": [45, 5, 750]}},
    ],
}  # fmt: skip

XML = """<?xml version="1.0" encoding="utf-8"?><annotation><filename>a.png</filename>
<size><width>40</width><height>20</height><depth>3</depth></size>
<object><name>dog</name><difficult>0</difficult>
<bndbox><xmin>5</xmin><ymin>3</ymin><xmax>12</xmax><ymax>8</ymax></bndbox></object>
<object><name>cat</name><difficult>1</difficult>
<bndbox><xmin>5.5</xmin><ymin>3</ymin><xmax>44</xmax><ymax>8</ymax></bndbox></object></annotation>"""


def save_image(path: Path, **options: Any) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.arange(40 * 20 * 3, dtype=np.uint8).reshape(20, 40, 3)
    Image.fromarray(ramp).save(path, **options)


def check(open_data: Callable[[], Any]) -> bool:
    """Whether the files give a data set; it is looked at whole."""
    try:
        data = open_data()
        for image, target in (data[index] for index in range(len(data))):
            width, height = image.shape[-1], image.shape[-2]
            boxes, labels = target["boxes"], target["labels"]
            assert image.shape[0] == 3 and image.min() >= 0 and image.max() <= 1
            assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height] * 2)).all()
            assert (boxes[:, 2:] > boxes[:, :2]).all() and len(boxes) == len(labels)
            assert ((labels >= 0) & (labels < len(data.categories))).all()
        truth = json.loads(json.dumps(data.coco_ground_truth, allow_nan=False))
        assert len(truth["annotations"]) == data.box_counts.total
        assert {note["image_id"] for note in truth["annotations"]} <= {
            image["id"] for image in truth["images"]
        }
    except DataError as error:
        message = str(error)
        assert message.encode() and len(message.splitlines()) == 1, repr(message)
        return False
    return True


def fuzz(write: Callable[[random.Random], None], open_data: Callable[[], Any]) -> None:
    sound = 0
    for seed in range(ROUNDS):
        write(random.Random(seed))
        try:
            sound += check(open_data)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
    assert 0 < sound < ROUNDS  # files that are all refused, or all whole, would show nothing


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="hqod_ops.detection.data")


@pytest.fixture
def coco_root(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        save_image(tmp_path / "val" / f"{name}.png")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/val.json").write_text(json.dumps(CONTENT))
    return tmp_path


@pytest.fixture
def voc_root(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        save_image(tmp_path / "JPEGImages" / f"{name}.png")
    for folder in ("Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "Annotations/a.xml").write_text(XML)
    (tmp_path / "Annotations/b.xml").write_text("<annotation></annotation>")
    (tmp_path / "ImageSets/Main/val.txt").write_text("a\nb 1\n")
    return tmp_path


def test_coco_values(coco_root: Path) -> None:
    def write(rng: random.Random) -> None:
        content = copy.deepcopy(CONTENT)
        for _ in range(rng.choice((1, 1, 2, 4))):
            change_value(content, rng)
        (coco_root / "annotations/val.json").write_text(json.dumps(content))

    fuzz(write, lambda: open_dataset(coco_root, "val"))


def test_coco_bytes(coco_root: Path) -> None:
    def write(rng: random.Random) -> None:
        data = change_bytes(json.dumps(CONTENT).encode(), rng)
        (coco_root / "annotations/val.json").write_bytes(data)

    fuzz(write, lambda: open_dataset(coco_root, "val", size=16))


def test_voc_bytes(voc_root: Path) -> None:
    def write(rng: random.Random) -> None:
        (voc_root / "Annotations/a.xml").write_bytes(change_bytes(XML.encode(), rng))

    fuzz(write, lambda: open_dataset(voc_root, "val", short_side=10))


def test_voc_values(voc_root: Path) -> None:
    pieces = [
        "",
        " ",
        "-1",
        "1e400",
        "nan",
        "9" * 400,
        "&#233;",
        "dog",
        "<name>x</name>",
        "0.0",
        "40",
    ]

    def write(rng: random.Random) -> None:
        parts = XML.split("<")
        for _ in range(rng.choice((1, 2))):
            place = rng.randrange(2, len(parts))
            tag, _, text = parts[place].partition(">")
            parts[place] = f"{tag}>{rng.choice(pieces) if text.strip() else text}"
        (voc_root / "Annotations/a.xml").write_text("<".join(parts))

    fuzz(write, lambda: open_dataset(voc_root, "val", categories=["dog", "cat", "x"]))


def test_voc_lists(voc_root: Path) -> None:
    def write(rng: random.Random) -> None:
        (voc_root / "ImageSets/Main/val.txt").write_bytes(change_bytes(b"a\nb 1\na 0\r\n", rng))

    fuzz(write, lambda: open_dataset(voc_root, "val"))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.gif", "a.bmp", "a.webp"])
@pytest.mark.filterwarnings("ignore")  # Pillow's, about what it repairs
def test_images(tmp_path: Path, name: str) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "val" / name
    save_image(path, **({} if name[2:] in ("gif", "bmp") else {"exif": exif.tobytes()}))
    sound = path.read_bytes()
    content = {**CONTENT, "images": [{"id": 4, "file_name": name}],
               "annotations": CONTENT["annotations"][:1]}  # fmt: skip
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/val.json").write_text(json.dumps(content))

    def write(rng: random.Random) -> None:
        path.write_bytes(change_bytes(sound, rng))

    fuzz(write, lambda: open_dataset(tmp_path, "val", size=8))
