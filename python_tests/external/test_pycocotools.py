"""pycocotools as the oracle of IoU, matching and AP, on random boxes."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hqod_ops import aligned_box_iou

pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")

from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hqod_ops.detection.data.coco_format import Annotation, coco_dict
from hqod_ops.detection.evaluation import coco_results, evaluate_coco
from hqod_ops.detection.harmony import match_detections, pairwise_iou

SIDE, IMAGES, CLASSES = 200, 12, 3
THRESHOLDS = np.linspace(0.5, 0.95, 10)


def boxes(rng: np.random.Generator, count: int, whole: bool) -> np.ndarray:
    corners = rng.uniform(0, SIDE, (count, 2, 2))
    corners.sort(axis=1)
    corners[:, 1] += 1.0  # no box without an area
    found = corners.reshape(count, 4)
    return np.round(found / 20) * 20 + [0, 0, 20, 20] if whole else found


def scene(rng: np.random.Generator, whole: bool) -> tuple[np.ndarray, ...]:
    """Objects, and detections near some of them; whole: on a grid, where IoUs tie."""
    truth = boxes(rng, int(rng.integers(0, 12)), whole)
    near = truth[rng.integers(0, max(len(truth), 1), 20 if len(truth) else 0)]
    if not whole:
        near = near + rng.normal(0, 4, near.shape)
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
    found = np.concatenate([near, boxes(rng, 6, whole)])
    scores = rng.permutation(len(found)) / len(found)
    labels, found_labels = (rng.integers(0, CLASSES, len(each)) for each in (truth, found))
    return truth, labels, found, scores, found_labels


def sides(corners: np.ndarray) -> np.ndarray:
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)


@pytest.mark.parametrize("whole", [False, True])
def test_iou(whole: bool) -> None:
    rng = np.random.default_rng(0)
    a, b = boxes(rng, 80, whole), boxes(rng, 60, whole)
    expected = mask.iou(sides(a), sides(b), [0] * len(b))
    # x + (x2 - x1) rounds where x2 did not: of 1e-16 relative to 200, on areas from 1.
    np.testing.assert_allclose(pairwise_iou(a, b), expected, rtol=0, atol=1e-12)
    pairs = aligned_box_iou(torch.from_numpy(a[:60]), torch.from_numpy(b)).numpy()
    np.testing.assert_allclose(pairs, expected.diagonal(), rtol=0, atol=1e-12)


def oracle(truth: dict[str, Any], found: list[dict[str, Any]], folder: Path) -> Any:
    """pycocotools by its own way: from files."""
    file = folder / "truth.json"
    file.write_text(json.dumps(truth))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(file))
        evaluator = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_matching_and_ap(tmp_path: Path, whole: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scenes = [scene(rng, whole) for _ in range(IMAGES)]
    notes = [
        Annotation(image, int(label), box)
        for image, (truth, labels, *_) in enumerate(scenes)
        for box, label in zip(truth, labels, strict=True)
    ]
    images = [{"id": i, "file_name": f"{i}.png", "width": SIDE, "height": SIDE}
              for i in range(IMAGES)]  # fmt: skip
    truth = coco_dict([str(label) for label in range(CLASSES)], images, notes)
    outputs = [
        {"boxes": torch.from_numpy(b), "scores": torch.from_numpy(s), "labels": torch.from_numpy(k)}
        for *_, b, s, k in scenes
    ]
    targets = [{"image_id": i, "scale": torch.ones(2)} for i in range(IMAGES)]
    results = coco_results(outputs, targets)
    expected = oracle(truth, results, tmp_path)

    metrics = evaluate_coco(truth, results)
    names = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR"]
    wanted = dict(zip(names, expected.stats, strict=False))
    for name, value in wanted.items():
        assert metrics[name] == pytest.approx(value, abs=1e-12) or value == -1, name
    assert 0.01 < metrics["AP"] < 0.99  # neither nothing nor everything is found

    place = {note["id"]: note for note in truth["annotations"]}
    first = {i: min((n["id"] for n in place.values() if n["image_id"] == i), default=0)
             for i in range(IMAGES)}  # fmt: skip
    compared = 0
    for number, threshold in enumerate(THRESHOLDS):
        for image, (gt, labels, found, scores, found_labels) in enumerate(scenes):
            matched, _ = match_detections(found, scores, found_labels, gt, labels, threshold)
            for label in range(CLASSES):
                entry = expected.evalImgs[label * 4 * IMAGES + image]  # all areas come first
                if entry is None:
                    assert (matched[found_labels == label] == -1).all()
                    continue
                mine = np.flatnonzero(found_labels == label)
                mine = mine[np.argsort(-scores[mine], kind="stable")]
                ours = [first[image] + m if m >= 0 else 0 for m in matched[mine]]
                np.testing.assert_array_equal(ours, entry["dtMatches"][number])
                compared += len(ours)
    assert compared > 1000
