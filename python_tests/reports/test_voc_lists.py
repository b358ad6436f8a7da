"""Lists of Pascal VOC as people and systems write them.

Reports: https://github.com/bubbliiiing/efficientdet-pytorch/issues/16 (a name with a space is cut
in two); macOS's ``._`` files, which hold no text; lists of one class, with 1, 0 or -1 behind each
name; editors that write byte order marks and Windows' line ends.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from hqod_ops.detection.data import DataError, open_dataset
from python_tests.reports.layouts import BOX, voc, xml

pytestmark = pytest.mark.require("PIL")


def names(root: Path, split: str = "val") -> list[str]:
    """The images of a data set, each loaded, by the names of their files."""
    data = open_dataset(root, split)
    assert all(target["boxes"].tolist() == [BOX] for _, target in data)  # type: ignore[attr-defined]
    return [Path(entry["file_name"]).stem for entry in data.coco_ground_truth["images"]]


@pytest.mark.parametrize(
    ("there", "listed", "read"),
    [
        (["my image (1)"], b"my image (1)\n", ["my image (1)"]),
        (["my image"], b"my image  1\n", ["my image"]),
        (["my image"], b"my image -1\n", ["my image"]),
        (["one", "two"], b"one  1\ntwo  0\n", ["one", "two"]),
        (["one", "two"], b"one\t-1\r\ntwo\t 1\r\n\r\n", ["one", "two"]),
        (["one", "two"], b"one\ntwo 1", ["one", "two"]),
        (["one", "two"], b"one\rtwo\r", ["one", "two"]),
        (["one"], b"\xef\xbb\xbfone\n", ["one"]),
        (["one", "two"], "one\r\ntwo\r\n".encode("utf-16"), ["one", "two"]),
        (["frame 0", "frame 1"], b"frame 0\nframe 1\n", ["frame 0", "frame 1"]),
        # Without the first line this could be the list above; with it, the digits are flags.
        (["frame", "frame 1"], b"frame 1 -1\nframe 1\n", ["frame 1", "frame"]),
        (["one"], b"  one \n", ["one"]),
        (["one"], b"one\n._one\n", ["one"]),
        (["one"], b"one\none\n", ["one"]),
        (["one"], b"one.png\n", ["one"]),
        (["a.v1"], b"JPEGImages/a.v1.png\n", ["a.v1"]),
        (["one"], b"data\\JPEGImages\\one.JPG\n", ["one"]),
        (["\u00e9t\u00e9"], "\u00e9t\u00e9 1\n".encode(), ["\u00e9t\u00e9"]),
    ],
    ids=lambda value: value.decode("latin-1") if isinstance(value, bytes) else None,
)
def test_read_as_a_person_would(
    tmp_path: Path, there: list[str], listed: bytes, read: list[str]
) -> None:
    assert names(voc(tmp_path, *there, listed=listed)) == read


@pytest.mark.parametrize("folder", ["Annotations", "JPEGImages", "ImageSets/Main"])
def test_files_of_macos_are_passed_by(tmp_path: Path, folder: str) -> None:
    voc(tmp_path, "one")
    suffix = {"Annotations": "one.xml", "JPEGImages": "one.png"}.get(folder, "val.txt")
    (tmp_path / folder / f"._{suffix}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")
    assert names(tmp_path) == ["one"]


@pytest.mark.parametrize("suffix", [".jpg", ".JPG", ".jpeg", ".png", ".bmp", ".tif", ".webp"])
def test_kinds_of_images(tmp_path: Path, suffix: str) -> None:
    assert names(voc(tmp_path, "one", suffix=suffix)) == ["one"]


@pytest.mark.parametrize("size", ["<width>64.0</width><height> 48 </height>", ""])
def test_sizes(tmp_path: Path, size: str) -> None:
    voc(tmp_path, "one")
    (tmp_path / "Annotations/one.xml").write_text(xml(size=size))
    assert names(tmp_path) == ["one"]


@pytest.mark.parametrize("split", ["valid", "validation", "val2012", "val"])
def test_names_of_splits(tmp_path: Path, split: str) -> None:
    voc(tmp_path, "one", split=split)
    assert names(tmp_path, split) == ["one"]
    if split != "val2012":
        assert names(tmp_path, "val") == ["one"]


def test_a_missing_split_names_those_there_and_the_setting(tmp_path: Path) -> None:
    voc(tmp_path, "one")
    voc(tmp_path, "one", split="cat_train")
    (tmp_path / "ImageSets/Main/._val.txt").touch()
    with pytest.raises(DataError) as caught:
        open_dataset(tmp_path, "test")
    message = str(caught.value)
    assert "test.txt: the image list is missing" in message
    assert "splits that are there: 'val', 'cat_train' (" in message
    assert "data.train_split and data.test_split" in message


def test_a_name_without_annotations_is_told_whole(tmp_path: Path) -> None:
    voc(tmp_path, "one", listed=b"my lost image 1\n")
    with pytest.raises(DataError, match="my lost image.xml: the annotation file is missing"):
        open_dataset(tmp_path, "val")


def test_few_of_the_twenty_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All twenty, as they come with VOC itself, but said; ``categories`` names others."""
    voc(tmp_path, "one")
    with caplog.at_level(logging.WARNING):
        assert len(open_dataset(tmp_path, "val").categories) == 20
    (said,) = caplog.messages
    assert "1 of the 20 classes of Pascal VOC occur (cat)" in said and "data.categories" in said
    data = open_dataset(tmp_path, "val", categories=["cat"])
    assert data.categories == ["cat"] and data[0][1]["labels"].tolist() == [0]
    for categories in ([], "cat", ["cat", "cat"]):
        with pytest.raises(ValueError, match="categories: expected different names"):
            open_dataset(tmp_path, "val", categories=categories)
