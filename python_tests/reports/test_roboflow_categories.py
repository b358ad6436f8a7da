"""Roboflow's COCO export: folders train, valid and test, and a category 0 that only groups others.

Reports: https://github.com/roboflow/rf-detr/issues/1303 and
https://github.com/roboflow/roboflow-100-benchmark/issues/45 (one class too many).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from hqod_ops.detection.data import DataError, open_dataset
from python_tests.reports.layouts import coco, edited

pytestmark = pytest.mark.require("PIL")

ROOT = {"id": 0, "name": "pets", "supercategory": "none"}
CAT = {"id": 1, "name": "cat", "supercategory": "pets"}
DOG = {"id": 2, "name": "dog", "supercategory": "pets"}


def export(root: Path, categories: list[dict[str, Any]], **used: int) -> Path:
    """A split for each keyword, with one object of the category that it says."""
    for split, category in used.items():
        content = {**edited(annotations__category_id=category), "categories": categories}
        coco(root, content, f"{split}/a.png", f"{split}/_annotations.coco.json")
    return root


def test_a_category_that_only_groups_is_no_class(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export(tmp_path, [ROOT, CAT, DOG], train=1, valid=2, test=1)
    with caplog.at_level(logging.WARNING):
        assert open_dataset(tmp_path, "train").categories == ["cat", "dog"]
    assert ["category 'pets' only groups others" in said for said in caplog.messages] == [True]
    assert open_dataset(tmp_path, "val")[0][1]["labels"].tolist() == [1]


def test_all_splits_have_the_same_classes(tmp_path: Path) -> None:
    """A group that has objects of its own in one split is a class in all of them."""
    export(tmp_path, [ROOT, CAT, DOG], train=0, valid=2)
    for split in ("train", "valid"):
        assert open_dataset(tmp_path, split).categories == ["pets", "cat", "dog"]


def test_groups_within_groups(tmp_path: Path) -> None:
    categories = [ROOT, {"id": 3, "name": "big", "supercategory": "pets"},
                  {"id": 1, "name": "cat", "supercategory": "big"}]  # fmt: skip
    export(tmp_path, categories, train=1)
    assert open_dataset(tmp_path, "train").categories == ["cat"]


@pytest.mark.parametrize("parent", [None, "", "none", "pet", "cat"])
def test_a_class_without_objects_stays(tmp_path: Path, parent: str | None) -> None:
    export(tmp_path, [{**CAT, "supercategory": parent}, {"id": 2, "name": "dog"}], train=2)
    assert open_dataset(tmp_path, "train").categories == ["cat", "dog"]


def test_a_name_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    export(tmp_path, [CAT, {"id": 5, "name": "cat"}], train=5)
    with caplog.at_level(logging.WARNING):
        data = open_dataset(tmp_path, "train")
    assert data.categories == ["cat", "cat"] and data[0][1]["labels"].tolist() == [1]
    assert ["several categories are named 'cat'" in said for said in caplog.messages] == [True]


def test_a_root_named_as_its_class(tmp_path: Path) -> None:
    export(tmp_path, [{**ROOT, "name": "cat"}, {**CAT, "supercategory": "cat"}], train=1)
    data = open_dataset(tmp_path, "train")
    assert data.categories == ["cat"] and data[0][1]["labels"].tolist() == [0]


@pytest.mark.parametrize("asked", ["val", "valid", "validation"])
@pytest.mark.parametrize("there", ["val", "valid", "validation"])
def test_names_of_the_split(tmp_path: Path, asked: str, there: str) -> None:
    export(tmp_path, [CAT], train=1, **{there: 1})
    data = open_dataset(tmp_path, asked)
    assert Path(data.paths[0]).parent.name == there  # type: ignore[attr-defined]


@pytest.mark.parametrize("layout", ["{}/_annotations.coco.json", "annotations/{}.json"])
def test_a_missing_split_names_those_there_and_the_setting(tmp_path: Path, layout: str) -> None:
    for split in ("train", "test"):
        coco(tmp_path, edited(), f"{split}/a.png", layout.format(split))
    with pytest.raises(DataError) as caught:
        open_dataset(tmp_path, "val")
    message = str(caught.value)
    assert "no annotations of split 'val'" in message
    assert "'train'" in message and "'test'" in message
    assert "data.train_split and data.test_split" in message
