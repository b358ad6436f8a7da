"""Data sets on disk: the layouts of COCO and Pascal VOC, resizing, and one line for every fault."""

from __future__ import annotations

import json
import logging
import multiprocessing.reduction
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hqod_ops.detection.data import (
    CocoDataset,
    DataError,
    DigitScenes,
    RandomHorizontalFlip,
    Resize,
    Target,
    VocDataset,
    collate,
    open_dataset,
    write_coco,
)
from hqod_ops.detection.data.voc import VOC_CLASSES

pytestmark = pytest.mark.require("PIL", "sklearn")

WIDTH, HEIGHT = 40, 20


def save_image(path: Path, value: int = 0) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((HEIGHT, WIDTH, 3), value, dtype=np.uint8)
    pixels[:, : WIDTH // 2, 0] = 255
    Image.fromarray(pixels).save(path)


def coco_content() -> dict[str, Any]:
    """Two images, the second without objects; categories with gaps and out of order."""
    image = {"width": WIDTH, "height": HEIGHT}
    return {
        "images": [
            {"id": 9, "file_name": "b.png", **image},
            {"id": 4, "file_name": "a.png", **image},
        ],
        "categories": [{"id": 30, "name": "dog"}, {"id": 7, "name": "cat"}],
        "annotations": [
            {"id": 0, "image_id": 4, "category_id": 30, "bbox": [4, 2, 8, 6], "area": 40.5},
            {"id": 1, "image_id": 4, "category_id": 7, "bbox": [30, 10, 20, 20], "iscrowd": 1},
            {"id": 2, "image_id": 4, "category_id": 7, "bbox": [5, 5, 0, 3]},
        ],
    }


def make_coco(root: Path, content: Any = None) -> Path:
    for number, name in enumerate(("a", "b")):
        save_image(root / "val2017" / f"{name}.png", number)
    file = root / "annotations" / "instances_val2017.json"
    file.parent.mkdir(exist_ok=True)
    content = coco_content() if content is None else content
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult>
<bndbox><xmin>5</xmin><ymin>3</ymin><xmax>12</xmax><ymax>8</ymax></bndbox></object>"""
SIZE = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"


def make_voc(root: Path, objects: str = OBJECT.format(name="dog", difficult=0)) -> Path:
    for number, name in enumerate(("one", "two")):
        save_image(root / "JPEGImages" / f"{name}.png", number)
    lists, notes = root / "ImageSets" / "Main", root / "Annotations"
    lists.mkdir(parents=True)
    notes.mkdir()
    (lists / "val.txt").write_text("one\ntwo 1\n\n")
    hard = OBJECT.format(name="cat", difficult=1)
    (notes / "one.xml").write_text(f"<annotation>{SIZE}{objects}{hard}</annotation>")
    (notes / "two.xml").write_text("<annotation></annotation>")
    return notes / "one.xml"


def test_coco(tmp_path: Path) -> None:
    make_coco(tmp_path)
    data = open_dataset(tmp_path, "val")
    assert isinstance(data, CocoDataset)
    assert data.categories == ["cat", "dog"] and len(data) == 2
    image, target = data[0]
    assert image.shape == (3, HEIGHT, WIDTH) and image.dtype == torch.float32
    assert image[0, 0, 0] == 1 and image[0, 0, -1] == 0
    # The crowd is cut at the border, and the box without area is no target.
    assert target["boxes"].tolist() == [[4, 2, 12, 8], [30, 10, 40, 20]]
    assert target["labels"].tolist() == [1, 0]
    assert target["iscrowd"].tolist() == [0, 1]
    assert target["image_id"] == 4
    empty = data[1][1]
    assert empty["boxes"].shape == (0, 4) and empty["labels"].dtype == torch.int64
    assert empty["image_id"] == 9


def test_coco_ground_truth_keeps_the_file(tmp_path: Path) -> None:
    make_coco(tmp_path)
    truth = open_dataset(tmp_path, "val", size=16).coco_ground_truth
    assert [image["id"] for image in truth["images"]] == [4, 9]
    assert truth["categories"] == [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
    notes = truth["annotations"]
    assert [note["id"] for note in notes] == [1, 2, 3]
    assert [note["bbox"] for note in notes] == [[4, 2, 8, 6], [30, 10, 20, 20], [5, 5, 0, 3]]
    assert [note["area"] for note in notes] == [40.5, 400, 0]
    assert [note["category_id"] for note in notes] == [1, 0, 0]
    assert [note["iscrowd"] for note in notes] == [0, 1, 0]


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("annotations/instances_val2014.json", "val2014"),
        ("annotations/val.json", "images"),
        ("annotations/instances_val.json", "images/val"),
        ("val/_annotations.coco.json", "val"),
    ],
)
def test_coco_layouts(tmp_path: Path, file: str, images: str) -> None:
    for name in ("a", "b"):
        save_image(tmp_path / images / f"{name}.png")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(json.dumps(coco_content()))
    assert len(open_dataset(tmp_path, "val")) == 2


def test_voc(tmp_path: Path) -> None:
    make_voc(tmp_path)
    data = open_dataset(tmp_path, "val")
    assert isinstance(data, VocDataset)
    assert data.categories == VOC_CLASSES and len(VOC_CLASSES) == 20
    image, target = data[0]
    assert image.shape == (3, HEIGHT, WIDTH)
    assert target["boxes"].tolist() == [[4, 2, 12, 8], [4, 2, 12, 8]]
    assert [data.categories[i] for i in target["labels"]] == ["dog", "cat"]
    assert target["iscrowd"].tolist() == [0, 1]
    assert data[1][1]["boxes"].shape == (0, 4)
    assert data[1][1]["image_id"] == 1


def test_voc_with_other_classes(tmp_path: Path) -> None:
    make_voc(tmp_path / "VOCdevkit" / "VOC2007", OBJECT.format(name="ant", difficult=0))
    assert open_dataset(tmp_path, "val").categories == ["ant", "cat"]
    named = open_dataset(tmp_path, "val", categories=["cat", "bee", "ant"])
    assert named[0][1]["labels"].tolist() == [2, 0]


@pytest.mark.parametrize(
    ("resize", "size"),
    [
        ({}, (WIDTH, HEIGHT)),
        ({"size": 32}, (32, 32)),
        ({"short_side": 10}, (20, 10)),
        ({"short_side": 40, "max_side": 60}, (60, 30)),
    ],
    ids=str,
)
def test_resize(tmp_path: Path, resize: dict[str, int], size: tuple[int, int]) -> None:
    make_coco(tmp_path)
    image, target = open_dataset(tmp_path, "val", **resize)[0]  # type: ignore[arg-type]
    assert image.shape == (3, size[1], size[0])
    scale = torch.tensor([size[0] / WIDTH, size[1] / HEIGHT])
    torch.testing.assert_close(target["scale"], scale)
    expected = torch.tensor([4.0, 2.0, 12.0, 8.0]) * scale.repeat(2)
    torch.testing.assert_close(target["boxes"][0], expected)
    assert image[0, :, 0].min() > 0.9 and image[0, :, -1].max() < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size: expected at least 1 pixel, got 0"),
        ({"size": 8, "short_side": 8}, "size: expected without short_side and max_side"),
        ({"max_side": 8}, "max_side: expected together with short_side"),
    ],
    ids=str,
)
def test_bad_resize(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Resize(**options)


def test_flip() -> None:
    image = torch.rand(3, HEIGHT, WIDTH)
    target: Target = {"boxes": torch.tensor([[4.0, 2.0, 12.0, 8.0]]), "image_id": 3}
    flipped, mirrored = RandomHorizontalFlip(p=1.0)(image, target)
    assert torch.equal(flipped, image.flip(-1)) and mirrored["image_id"] == 3
    assert mirrored["boxes"].tolist() == [[28, 2, 36, 8]]
    assert target["boxes"].tolist() == [[4, 2, 12, 8]]
    again, back = RandomHorizontalFlip(p=1.0)(flipped, mirrored)
    assert torch.equal(again, image) and torch.equal(back["boxes"], target["boxes"])
    same, kept = RandomHorizontalFlip(p=0.0)(image, target)
    assert torch.equal(same, image) and torch.equal(kept["boxes"], target["boxes"])
    assert type(flipped) is type(mirrored["boxes"]) is torch.Tensor
    with pytest.raises(ValueError, match="p: expected a probability"):
        RandomHorizontalFlip(p=1.5)


def fault(action: Callable[[], object]) -> str:
    """The message of a DataError: one line."""
    with pytest.raises(DataError) as caught:
        action()
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def change(key: str, index: int, **values: Any) -> Callable[[dict[str, Any]], Any]:
    """An edit of COCO's content; the value ... removes a key."""

    def edit(content: dict[str, Any]) -> Any:
        entry = content[key][index]
        entry.update(values)
        content[key][index] = {k: v for k, v in entry.items() if v is not ...}
        return content

    return edit


COCO_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "not json": (lambda c: '{"images": [', "cannot be read as JSON"),
    "not an object": (lambda c: [c], "expected a JSON object, got a list"),
    "no images": (lambda c: {**c, "images": []}, "expected at least one entry under 'images'"),
    "no categories": (lambda c: {**c, "categories": ...}, "expected a list of objects under 'cat"),
    "annotations no list": (lambda c: {**c, "annotations": 3}, "a list of objects under 'annot"),
    "image id text": (change("images", 0, id="x"), "images[0]: expected a whole number as id"),
    "image id twice": (change("images", 0, id=4), "images[1]: id 4 is there twice"),
    "category twice": (change("categories", 0, id=7), "categories[1]: id 7 is there twice"),
    "no file name": (change("images", 0, file_name=...), "image 9: expected a file_name, got None"),
    "no width": (change("images", 0, width=0), "image 9: expected a width in pixels, got 0"),
    "box of 3": (change("annotations", 1, bbox=[1, 2, 3]), "annotation 1: bbox: expected a box of"),
    "box of text": (change("annotations", 1, bbox=["a", 2, 3, 4]), "annotation 1: bbox: expected"),
    "no box": (change("annotations", 1, bbox=...), "expected a box of 4 numbers, got None"),
    "nan box": (change("annotations", 1, bbox=[0, 0, float("nan"), 1]), "finite coordinates"),
    "huge box": (change("annotations", 1, bbox=[0, 0, 10**400, 1]), "finite coordinates"),
    "huge area": (change("annotations", 1, area=10**400), "expected an area of at least 0"),
    "deep": (lambda c: "[" * 100_000, "cannot be read as JSON"),
    "negative box": (change("annotations", 1, bbox=[0, 0, -1, 1]), "of at least 0, got [0, 0, -1"),
    "unknown category": (change("annotations", 1, category_id=8), "unknown category_id 8"),
    "no category": (change("annotations", 1, category_id=...), "unknown category_id None"),
    "unknown image": (change("annotations", 1, image_id=5), "annotation 1: unknown image_id 5"),
    "crowd": (change("annotations", 1, iscrowd=3), "expected iscrowd 0 or 1, got 3"),
    "area": (change("annotations", 1, area=-2), "expected an area of at least 0, got -2"),
}


@pytest.mark.parametrize("name", COCO_FAULTS)
def test_broken_coco(tmp_path: Path, name: str) -> None:
    edit, expected = COCO_FAULTS[name]
    content = edit(coco_content())
    if isinstance(content, dict):
        content = {key: value for key, value in content.items() if value is not ...}
    file = make_coco(tmp_path, content)
    message = fault(lambda: open_dataset(tmp_path, "val"))
    assert str(file) in message and expected in message


def test_missing_files(tmp_path: Path) -> None:
    assert "no such folder" in fault(lambda: open_dataset(tmp_path / "nowhere"))
    (tmp_path / "file").touch()
    assert "is not a folder" in fault(lambda: open_dataset(tmp_path / "file"))
    message = fault(lambda: open_dataset(tmp_path))
    assert str(tmp_path) in message and "COCO's layout" in message
    make_coco(tmp_path)
    message = fault(lambda: open_dataset(tmp_path, "train"))
    assert "no annotations of split 'train'" in message and "there: 'val2017' (" in message
    assert "data.train_split and data.test_split" in message
    (tmp_path / "val2017" / "a.png").unlink()
    message = fault(lambda: open_dataset(tmp_path, "val"))
    assert message == f"{tmp_path / 'val2017' / 'a.png'}: the image file is missing"
    message = fault(lambda: CocoDataset(tmp_path / "x.json", tmp_path))
    assert message == f"{tmp_path / 'x.json'}: the annotation file is missing"


def test_broken_images(tmp_path: Path) -> None:
    make_coco(tmp_path)
    path = tmp_path / "val2017" / "a.png"
    path.write_bytes(path.read_bytes()[:40])
    message = fault(lambda: open_dataset(tmp_path, "val")[0])
    assert message.startswith(f"{path}: cannot be read as an image")
    content = coco_content()
    content["images"][1]["width"] = 41
    make_coco(tmp_path, content)
    message = fault(lambda: open_dataset(tmp_path, "val")[0])
    assert message == f"{path}: expected 41 x 20 pixels as annotated, got 40 x 20"


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_image_in_a_loader(tmp_path: Path, workers: int) -> None:
    """The worker's stack is not part of the message."""
    make_coco(tmp_path)
    path = tmp_path / "val2017" / "a.png"
    path.write_bytes(path.read_bytes()[:40])
    data = open_dataset(tmp_path, "val")
    loader = torch.utils.data.DataLoader(data, num_workers=workers, collate_fn=collate)
    message = fault(lambda: list(loader))
    assert message.startswith(f"{path}: cannot be read as an image")


def test_huge_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow refuses to open what may be meant to fill the memory."""
    from PIL import Image

    make_coco(tmp_path / "coco")
    make_voc(tmp_path / "voc")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert "cannot be read as an image" in fault(lambda: open_dataset(tmp_path / "coco", "val")[0])
    assert "cannot be read as an image" in fault(lambda: open_dataset(tmp_path / "voc", "val"))


def test_unknown_encoding(tmp_path: Path) -> None:
    file = make_voc(tmp_path)
    file.write_text('<?xml version="1.0" encoding="klingon"?><annotation></annotation>')
    assert f"{file}: cannot be read as XML" in fault(lambda: open_dataset(tmp_path, "val"))


BNDBOX = "<object><name>dog</name><bndbox>{}</bndbox></object>"
VOC_FAULTS = {
    "three sides": (BNDBOX.format("<xmin>1</xmin><ymin>1</ymin><xmax>3</xmax>"), "of 4 numbers"),
    "text": (
        BNDBOX.format("<xmin>a</xmin><ymin>1</ymin><xmax>3</xmax><ymax>3</ymax>"),
        "object 1: bndbox: expected a box of 4 numbers",
    ),
    "inverted": (
        BNDBOX.format("<xmin>5</xmin><ymin>1</ymin><xmax>3</xmax><ymax>3</ymax>"),
        "expected xmin <= xmax and ymin <= ymax",
    ),
    "no name": ("<object></object>", "object 1: unknown category ''"),
    "difficult": (OBJECT.format(name="dog", difficult="maybe"), "expected difficult 0 or 1"),
    "not xml": ("<object>", "cannot be read as XML"),
}


@pytest.mark.parametrize("name", VOC_FAULTS)
def test_broken_voc(tmp_path: Path, name: str) -> None:
    objects, expected = VOC_FAULTS[name]
    file = make_voc(tmp_path, objects)
    message = fault(lambda: open_dataset(tmp_path, "val"))
    assert str(file) in message and expected in message


def test_more_broken_voc(tmp_path: Path) -> None:
    file = make_voc(tmp_path)
    message = fault(lambda: open_dataset(tmp_path, "val", categories=["dog"]))
    assert message == f"{file}: object 2: unknown category 'cat'"
    message = fault(lambda: open_dataset(tmp_path, "train"))
    assert "train.txt: the image list is missing; splits that are there: 'val' (" in message
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("\n")
    assert "got an empty list" in fault(lambda: open_dataset(tmp_path, "train"))
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("three\n")
    message = fault(lambda: open_dataset(tmp_path, "train"))
    assert message.endswith("three.xml: the annotation file is missing")
    file.write_text("<annotation><size><width>w</width></size></annotation>")
    assert "size: expected whole numbers" in fault(lambda: open_dataset(tmp_path, "val"))
    (tmp_path / "JPEGImages" / "two.png").unlink()
    file.write_text("<annotation></annotation>")
    assert "two.jpg: the image file is missing" in fault(lambda: open_dataset(tmp_path, "val"))
    (tmp_path / "JPEGImages" / "two.png").write_text("no image")
    assert "cannot be read as an image" in fault(lambda: open_dataset(tmp_path, "val"))


def test_boxes_are_counted_and_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = coco_content()
    content["annotations"] += [
        {"id": 3, "image_id": 9, "category_id": 7, "bbox": [39.5, 0, 1, 10]},  # out by half a pixel
        {"id": 4, "image_id": 9, "category_id": 7, "bbox": [-8, -8, 16, 16]},
        {"id": 5, "image_id": 9, "category_id": 7, "bbox": [50, 50, 5, 5]},
    ]
    file = make_coco(tmp_path, content)
    with caplog.at_level(logging.WARNING):
        data = open_dataset(tmp_path, "val", size=20)
        boxes = [data[index][1]["boxes"] for index in (0, 1, 1)]
    assert isinstance(data, CocoDataset)
    assert data.box_counts == (6, 3, 2, 2)  # the crowd and one more are clipped
    assert data.box_counts._fields == ("total", "usable", "clipped", "dropped")
    assert [len(found) for found in boxes] == [2, 2, 2]
    assert boxes[1].tolist() == [[19.75, 0, 20, 10], [0, 0, 4, 8]]
    assert len(data.coco_ground_truth["annotations"]) == 6
    assert caplog.messages == [
        f"{file}: of 6 boxes 2 are clipped at the border of their image and 2 dropped, having no "
        "area inside it"
    ]
    data.require_boxes()


def test_no_usable_box(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"] = [
        {"id": i, "image_id": 4, "category_id": 7, "bbox": box}
        for i, box in enumerate([[5000, 5000, 30, 24], [5, 5, 0, 3]])
    ]
    file = make_coco(tmp_path, content)
    message = fault(lambda: open_dataset(tmp_path, "val"))
    assert message == f"{file}: none of its 2 boxes has an area inside its image"
    content["annotations"][0]["bbox"] = [0.2, 0.1, 0.5, 0.4]
    make_coco(tmp_path, content)
    message = fault(lambda: open_dataset(tmp_path, "val"))
    assert f"{file}: expected boxes in pixels" in message and "fractions of the image" in message
    content["annotations"][0].update(bbox=[2, 1, 5, 4], iscrowd=1)
    make_coco(tmp_path, content)
    data = open_dataset(tmp_path, "val")  # what is crowded counts in an evaluation
    assert data[0][1]["iscrowd"].tolist() == [1]
    message = fault(data.require_boxes)
    assert message == f"{file}: no box to learn from among 2 boxes of 2 images"


def test_digits_have_boxes() -> None:
    DigitScenes("val", num_images=1).require_boxes()


def test_missing_images_are_counted(tmp_path: Path) -> None:
    make_coco(tmp_path)
    for name in ("a", "b"):
        (tmp_path / "val2017" / f"{name}.png").unlink()
    message = fault(lambda: open_dataset(tmp_path, "val"))
    assert message == f"{tmp_path / 'val2017' / 'a.png'}: the image file is missing (and 1 more)"


def test_spawned_workers_share_the_boxes(tmp_path: Path) -> None:
    """What is sent to a worker does not grow with the boxes, but for the names of the images."""
    content = coco_content()
    content["annotations"] *= 5000
    make_coco(tmp_path, content)
    data = open_dataset(tmp_path, "val", size=16)
    sent = multiprocessing.reduction.ForkingPickler.dumps(data)
    assert len(sent) < 5000
    loader = torch.utils.data.DataLoader(
        data, num_workers=1, collate_fn=collate, multiprocessing_context="spawn"
    )
    for (images, targets), (image, target) in zip(loader, (data[0], data[1]), strict=True):
        assert torch.equal(images[0], image)
        assert torch.equal(targets[0]["boxes"], target["boxes"])


def test_two_voc_folders(tmp_path: Path) -> None:
    make_voc(tmp_path / "VOC2007")
    make_voc(tmp_path / "VOC2012")
    message = fault(lambda: open_dataset(tmp_path, "val"))
    assert "several folders" in message and str(tmp_path / "VOC2012") in message
    assert len(open_dataset(tmp_path / "VOC2012", "val")) == 2


def test_write_coco_refuses_resized_images(tmp_path: Path) -> None:
    write_coco(DigitScenes("val", num_images=1), tmp_path, "val")
    resized = open_dataset(tmp_path, "val", size=32)
    with pytest.raises(ValueError, match="images of their original size"):
        write_coco(resized, tmp_path / "again", "val")
