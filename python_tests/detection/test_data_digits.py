"""The digit scenes: the same everywhere, no handwriting in two splits, tight boxes, COCO format."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hqod_ops.detection.data import (
    DigitScenes,
    RandomHorizontalFlip,
    collate,
    open_dataset,
    write_coco,
)
from hqod_ops.detection.data import digits as digits_module
from hqod_ops.detection.data import drawing as draw

pytestmark = pytest.mark.require("sklearn", "pycocotools", "PIL")

# Every random number and every pixel of four scenes, drawn with all kinds of clutter. It may change
# with the drawing, and then all figures measured on the scenes change too.
DIGEST = "90a856cbf90258d1f3c332de39ecaa4f551453a377c8a350d2e10aa20610537e"


def digest(data: DigitScenes) -> str:
    state = hashlib.sha256()
    for i in range(4):
        scene = data.scene(i)
        for array in (scene.image, scene.boxes, scene.labels, scene.samples):
            state.update(np.ascontiguousarray(array).tobytes())
    return state.hexdigest()


def full(split: str = "train", **options: Any) -> DigitScenes:
    spec: dict[str, Any] = {"num_images": 4, "noise": 8.0, "clutter": 8.0, "seed": 3}
    spec |= {"overlap": 0.25, "contrast": 64}
    return DigitScenes(split, **{**spec, **options})


def test_same_on_every_machine() -> None:
    assert digest(full()) == DIGEST


@pytest.mark.parametrize("options", [{"cache": False}, {"num_images": 9}], ids=str)
def test_scene_depends_on_nothing_else(options: dict[str, Any]) -> None:
    assert digest(full(**options)) == digest(full())


@pytest.mark.parametrize("options", [{"seed": 4}, {"split": "val"}, {"split": "test"}], ids=str)
def test_other_seed_or_split_is_another_scene(options: dict[str, Any]) -> None:
    assert digest(full(**options)) != digest(full())


def test_global_random_state_is_left_alone() -> None:
    np.random.seed(5)
    torch.manual_seed(5)
    first = full().scene(0).image
    np.random.seed(6)
    torch.manual_seed(6)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    assert (full().scene(0).image == first).all()
    assert (np.random.get_state()[1] == before[0]).all()
    assert torch.equal(torch.get_rng_state(), before[1])


def test_no_handwriting_in_two_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of digits among the clutter count too."""
    used: set[bytes] = set()
    original = draw.handwriting

    def record(sample: Any, *rest: Any) -> draw.Mask:
        used.add(sample.tobytes())
        return original(sample, *rest)

    monkeypatch.setattr(draw, "handwriting", record)
    by_split = {}
    for split in ("train", "val", "test"):
        used = set()
        data = DigitScenes(split, num_images=60, clutter=20.0)
        labelled = {int(s) for i in range(60) for s in data.scene(i).samples}
        assert len(used) > len(labelled)
        by_split[split] = used
    assert not by_split["train"] & by_split["val"]
    assert not by_split["train"] & by_split["test"]
    assert not by_split["val"] & by_split["test"]


def test_splits_cover_the_samples_and_all_digits() -> None:
    ranges = sorted(digits_module.SAMPLE_RANGES.values())
    assert [low for low, _ in ranges] == [0, *(high for _, high in ranges[:-1])]
    assert ranges[-1][1] == 1797
    labels = digits_module._handwriting()[1]
    for low, high in ranges:
        assert set(labels[low:high]) == set(range(10))


def test_labels_are_those_of_the_handwriting() -> None:
    data = full(num_images=20)
    truth = digits_module._handwriting()[1]
    for i in range(20):
        scene = data.scene(i)
        assert (scene.labels == truth[scene.samples]).all()


def test_boxes_are_tight_on_a_plain_background() -> None:
    """Seen from the picture alone: the box holds all ink, and each of its edges touches some."""
    data = DigitScenes("train", num_images=40, max_objects=1, noise=0.0, clutter=0.0)
    for i in range(40):
        scene = data.scene(i)
        assert len(scene.boxes) == 1
        contrast = np.abs(scene.image.astype(int) - scene.image[:, :1, :1]).max(axis=0)
        # Ink is where the coverage is a half or more; 2 % for the rounding of colours.
        surely, perhaps = contrast > 0.52 * contrast.max(), contrast > 0.48 * contrast.max()
        x1, y1, x2, y2 = scene.boxes[0].astype(int)
        inside = np.zeros_like(surely)
        inside[y1:y2, x1:x2] = True
        assert not (surely & ~inside).any()
        for edge in (perhaps[y1, x1:x2], perhaps[y2 - 1, x1:x2], perhaps[y1:y2, x1],
                     perhaps[y1:y2, x2 - 1]):  # fmt: skip
            assert edge.any()


def test_boxes_hold_the_visible_ink() -> None:
    data = DigitScenes("train", num_images=60, max_objects=8, overlap=0.5)
    covered = 0
    for i in range(60):
        scene = data.scene(i)
        for k, (x1, y1, x2, y2) in enumerate(scene.boxes.astype(int)):
            rows, columns = np.nonzero(scene.owner == k)
            assert (x1, y1, x2 - 1, y2 - 1) == (
                columns.min(), rows.min(), columns.max(), rows.max())  # fmt: skip
        assert ((scene.boxes >= 0) & (scene.boxes <= 96)).all()
        assert (scene.visible >= digits_module.MIN_VISIBLE).all()
        covered += int((scene.visible < 1).sum())
    assert covered > 20


def test_no_overlap_when_none_is_wanted() -> None:
    data = DigitScenes("train", num_images=30, overlap=0.0)
    assert all((data.scene(i).visible == 1).all() for i in range(30))


def test_sizes_and_counts_vary() -> None:
    data = DigitScenes("train", num_images=200)
    heights = np.concatenate([np.diff(data.scene(i).boxes[:, 1::2])[:, 0] for i in range(200)])
    counts = {len(data.scene(i).labels) for i in range(200)}
    labels = np.concatenate([data.scene(i).labels for i in range(200)])
    assert heights.min() <= 20 and heights.max() >= 40
    assert counts == {1, 2, 3, 4, 5}
    assert np.bincount(labels, minlength=10).min() > len(labels) / 20


def test_items() -> None:
    data = DigitScenes("val", num_images=3, size=128)
    image, target = data[1]
    assert image.shape == (3, 128, 128) and image.dtype == torch.float32
    assert image.min() >= 0 and image.max() <= 1
    count = len(data.scene(1).labels)
    assert target["boxes"].shape == (count, 4) and target["boxes"].dtype == torch.float32
    assert target["labels"].shape == (count,) and target["labels"].dtype == torch.int64
    assert target["iscrowd"].tolist() == [0] * count
    assert target["image_id"] == 1 and target["scale"].tolist() == [1, 1]
    assert torch.equal(data[-2][0], image)
    with pytest.raises(IndexError, match="expected one of 3 images, got 3"):
        data[3]


def test_changing_an_item_leaves_the_data_alone() -> None:
    data = full()
    image, target = data[0]
    image.zero_()
    target["boxes"].zero_()
    assert data[0][0].max() > 0 and data[0][1]["boxes"].max() > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_loader(workers: int) -> None:
    loader = DataLoader(full(), batch_size=3, collate_fn=collate, num_workers=workers)
    images, targets = next(iter(loader))
    assert [target["image_id"] for target in targets] == [0, 1, 2]
    assert torch.equal(images[2], full()[2][0])


def test_coco_ground_truth_is_read_by_pycocotools(tmp_path: Path) -> None:
    from pycocotools.coco import COCO

    data = full()
    file = tmp_path / "truth.json"
    file.write_text(json.dumps(data.coco_ground_truth))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(file))
    assert coco.getImgIds() == [0, 1, 2, 3]
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == data.categories
    assert min(coco.getAnnIds()) == 1
    for i in range(4):
        notes = coco.loadAnns(coco.getAnnIds(i))
        boxes = np.array([note["bbox"] for note in notes])
        boxes[:, 2:] += boxes[:, :2]
        assert (boxes == data.scene(i).boxes).all()
        assert [note["category_id"] for note in notes] == data.scene(i).labels.tolist()
        assert all(note["area"] == note["bbox"][2] * note["bbox"][3] for note in notes)


def test_written_as_coco_and_read_back(tmp_path: Path) -> None:
    data = full("val")
    write_coco(data, tmp_path, "val")
    again = open_dataset(tmp_path, "val")
    assert again.categories == data.categories and len(again) == len(data)
    for (image, target), (image2, target2) in zip(data, again, strict=False):
        assert torch.equal(image, image2)
        for key in ("boxes", "labels", "iscrowd", "scale"):
            assert torch.equal(target[key], target2[key])


def test_mirroring_is_refused() -> None:
    with pytest.raises(ValueError, match="does not mirror DigitScenes"):
        full(transform=RandomHorizontalFlip())


def test_transform_is_applied() -> None:
    data = full(transform=lambda image, target: (1 - image, {**target, "seen": True}))
    image, target = data[0]
    assert target["seen"] and torch.equal(image, 1 - full()[0][0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "split: expected one of 'train', 'val', 'test', got 'dev'"),
        ({"num_images": 0}, "num_images: expected a value in"),
        ({"size": 20}, r"size: expected a value in \[64, 1024\], got 20"),
        ({"max_objects": 0}, "max_objects: expected"),
        ({"noise": -1.0}, "noise: expected"),
        ({"clutter": float("nan")}, "clutter: expected"),
        ({"overlap": 0.6}, r"overlap: expected a value in \[0, 0.5\], got 0.6"),
        ({"contrast": 200}, "contrast: expected"),
        ({"seed": -1}, "seed: expected"),
    ],
    ids=lambda value: str(value),
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        full(**options)


def test_open_by_name() -> None:
    data = open_dataset("digits", "val", size=64, num_images=2)
    assert isinstance(data, DigitScenes) and data[0][0].shape == (3, 64, 64)
    with pytest.raises(ValueError, match="short_side, max_side: expected None for digits"):
        open_dataset("digits", short_side=96)
    with pytest.raises(TypeError):
        open_dataset("digits", unknown=1)
