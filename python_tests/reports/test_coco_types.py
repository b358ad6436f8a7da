"""COCO files as tools write them: ids through pandas or JavaScript, null for what is not known,
byte order marks, paths of Windows.

Reports: https://github.com/dbolya/yolact/issues/156 (ids that are text),
https://github.com/pylabel-project/pylabel/issues/6 (null and empty fields),
https://github.com/HumanSignal/label-studio/issues/7294 (backslashes and folders in file_name),
https://github.com/cityjson/cjio/issues/21 (a byte order mark),
https://github.com/facebookresearch/maskrcnn-benchmark/issues/480 (numbers of another type).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")

from hqod_ops.detection.data import DataError, open_dataset
from python_tests.reports.layouts import BOX, HEIGHT, WIDTH, coco, edited, save

POLYGON = [[8, 6, 38, 6, 38, 30, 8, 30]]


def mask(kind: str) -> dict[str, Any]:
    """The box as a run-length mask, by columns: 8 empty ones, 30 with 24 pixels, 26 empty ones."""
    runs = [8 * HEIGHT + 6]
    for column in range(30):
        runs += [24, HEIGHT - 24 if column < 29 else 18 + 26 * HEIGHT]
    if kind == "runs":
        return {"size": [HEIGHT, WIDTH], "counts": runs}
    from pycocotools import mask as masks

    packed = masks.frPyObjects({"size": [HEIGHT, WIDTH], "counts": runs}, HEIGHT, WIDTH)
    return {"size": [HEIGHT, WIDTH], "counts": packed["counts"].decode()}


READ: dict[str, dict[str, Any]] = {
    "image_id text": {"annotations__image_id": "1"},
    "image_id float": {"annotations__image_id": 1.0},
    "image_id text of a float": {"annotations__image_id": "1.0"},
    "category_id text": {"annotations__category_id": " 1 "},
    "category_id float": {"annotations__category_id": 1.0},
    "image id text": {"images__id": "1"},
    "image id float": {"images__id": 1.0},
    "category id text": {"categories__id": "1"},
    "category id float": {"categories__id": 1.0},
    "annotation id null": {"annotations__id": None},
    "annotation id text": {"annotations__id": "a-1"},
    "sizes text": {"images__width": "64", "images__height": "48"},
    "sizes floats": {"images__width": 64.0, "images__height": 48.0},
    "sizes null": {"images__width": None, "images__height": None},
    "width NaN": {"images__width": float("nan")},
    "height null": {"images__height": None},
    "box of text": {"annotations__bbox": ["8", "6", "30", "24.0"]},
    "iscrowd null": {"annotations__iscrowd": None},
    "iscrowd NaN": {"annotations__iscrowd": float("nan")},
    "iscrowd float": {"annotations__iscrowd": 0.0},
    "iscrowd text": {"annotations__iscrowd": "0"},
    "iscrowd false": {"annotations__iscrowd": False},
    "area null": {"annotations__area": None},
    "area NaN": {"annotations__area": float("nan")},
    "area text": {"annotations__area": "720.0"},
    "segmentation null": {"annotations__segmentation": None},
    "polygon": {"annotations__segmentation": POLYGON},
    "box null beside a polygon": {"annotations__bbox": None, "annotations__segmentation": POLYGON},
    "box empty beside runs": {"annotations__bbox": [], "annotations__segmentation": mask("runs")},
    "box null beside a mask": {
        "annotations__bbox": None,
        "annotations__segmentation": mask("packed"),
    },
    "supercategory null": {"categories__supercategory": None},
    "own supercategory": {"categories__supercategory": "cat"},
    "backslash": {"images__file_name": "sub\\a.png"},
    "folder again": {"images__file_name": "val/a.png"},
    "folder again, Windows": {"images__file_name": "val\\sub\\a.png"},
    "dot": {"images__file_name": "./a.png"},
    "folders above": {"images__file_name": "data/coco/val/sub/a.png"},
    "path of another machine": {"images__file_name": "C:\\data\\val\\a.png"},
    "beside the folder": {"images__file_name": "extra/a.png"},
}


@pytest.mark.parametrize("name", READ)
def test_read_where_the_meaning_is_plain(tmp_path: Path, name: str) -> None:
    save(tmp_path / "val/sub/a.png")
    save(tmp_path / "extra/a.png")
    data = open_dataset(coco(tmp_path, edited(**READ[name])), "val")
    image, target = data[0]
    assert image.shape == (3, HEIGHT, WIDTH) and data.categories == ["cat"]
    assert target["boxes"].tolist() == [BOX]
    assert target["labels"].tolist() == [0] and target["iscrowd"].tolist() == [0]
    assert target["image_id"] == 1 and type(target["image_id"]) is int
    (note,) = data.coco_ground_truth["annotations"]
    assert note["area"] == 720 and note["bbox"] == [8, 6, 30, 24] and note["image_id"] == 1


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    content = edited(categories__name="caf\u00e9")
    coco(tmp_path, content, encoding=encoding)
    file = tmp_path / "annotations/val.json"
    file.write_text(json.dumps(content, ensure_ascii=False), encoding=encoding)
    assert open_dataset(tmp_path, "val").categories == ["caf\u00e9"]


@pytest.mark.parametrize("value", [True, 1, 1.0, "1"], ids=repr)
@pytest.mark.parametrize("segmentation", [mask("runs"), mask("packed"), POLYGON], ids=type)
def test_crowds(tmp_path: Path, value: object, segmentation: object) -> None:
    content = edited(annotations__iscrowd=value, annotations__segmentation=segmentation)
    data = open_dataset(coco(tmp_path, content), "val")
    assert data[0][1]["iscrowd"].tolist() == [1] and data[0][1]["boxes"].tolist() == [BOX]
    assert data.box_counts == (1, 0, 0, 0)  # type: ignore[attr-defined]


CLEAR: dict[str, tuple[dict[str, Any], str]] = {
    "half an id": ({"annotations__image_id": 1.5}, "annotation 1: unknown image_id 1.5"),
    "another id": ({"annotations__image_id": "2"}, "annotation 1: unknown image_id '2'"),
    "a name": ({"annotations__image_id": "a.png"}, "annotation 1: unknown image_id 'a.png'"),
    "null": ({"annotations__category_id": None}, "annotation 1: unknown category_id None"),
    "true": ({"annotations__category_id": True}, "annotation 1: unknown category_id True"),
    "a list": ({"annotations__category_id": [1]}, "annotation 1: unknown category_id [1]"),
    "underscores": ({"images__id": "2007_000032"}, "a whole number as id, got '2007_000032'"),
    "a float that rounds": ({"images__id": 2.0**60}, "images[0]: expected a whole number as id"),
    "beyond 64 bits": ({"images__id": 10**30}, "images[0]: expected a whole number as id"),
    "width in words": ({"images__width": "wide"}, "expected a width in pixels, got 'wide'"),
    "no box at all": ({"annotations__bbox": None}, "expected a box of 4 numbers, got None"),
    "broken outline": (
        {"annotations__bbox": None, "annotations__segmentation": {"size": [1]}},
        "expected a bbox, or a segmentation of polygons or a mask",
    ),
    "area in words": ({"annotations__area": "big"}, "expected an area of at least 0, got 'big'"),
}


@pytest.mark.parametrize("name", CLEAR)
def test_clear_where_it_is_not(tmp_path: Path, name: str) -> None:
    changes, said = CLEAR[name]
    with pytest.raises(DataError) as caught:
        open_dataset(coco(tmp_path, edited(**changes)), "val")
    assert said in str(caught.value) and str(tmp_path / "annotations/val.json") in str(caught.value)


def test_said_once_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = edited(images__file_name="val\\a.png", images__id="1", annotations__image_id=1.0)
    with caplog.at_level(logging.WARNING):
        data = open_dataset(coco(tmp_path, content), "val")
        data[0], data[0]
    (said,) = caplog.messages
    assert "ids written as text or as floats: 2" in said
    assert "file names with backslashes or with the images' folder: 1" in said
    caplog.clear()
    with caplog.at_level(logging.DEBUG):
        open_dataset(coco(tmp_path, edited()), "val")
    assert not caplog.messages


def test_gaps_and_negative_ids(tmp_path: Path) -> None:
    content = edited()
    content["categories"] = [{"id": 90, "name": "z"}, {"id": -3, "name": "x"}, {"id": 7}]
    content["annotations"][0]["category_id"] = 90
    content["images"][0]["id"] = content["annotations"][0]["image_id"] = 2**62
    data = open_dataset(coco(tmp_path, content), "val")
    assert data.categories == ["x", "7", "z"] and data[0][1]["labels"].tolist() == [2]
    assert data[0][1]["image_id"] == 2**62


def test_categories_asked_for(tmp_path: Path) -> None:
    content = edited()
    content["categories"].append({"id": 2, "name": "dog"})
    data = open_dataset(coco(tmp_path, content), "val", categories=["dog", "cat", "cow"])
    assert data.categories == ["dog", "cat", "cow"] and data[0][1]["labels"].tolist() == [1]
    with pytest.raises(DataError, match="annotation 1: category 'cat' is none of those asked for"):
        open_dataset(tmp_path, "val", categories=["dog"])


def test_images_alone(tmp_path: Path) -> None:
    """The files of COCO's test images have no annotations; nothing can be learnt from them."""
    content: dict[str, Any] = edited()
    del content["annotations"]
    data = open_dataset(coco(tmp_path, content), "val")
    assert data[0][1]["boxes"].shape == (0, 4)
    with pytest.raises(DataError, match="no box to learn from among 0 boxes of 1 images"):
        data.require_boxes()
