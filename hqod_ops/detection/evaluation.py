"""COCO's detection metrics, by pycocotools or, where it is installed, by faster-coco-eval."""

from __future__ import annotations

import contextlib
import importlib
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from hqod_ops.detection._extras import require
from hqod_ops.detection.data.dataset import Target

METRICS = {
    "AP": 0,
    "AP50": 1,
    "AP75": 2,
    "APs": 3,
    "APm": 4,
    "APl": 5,
    "AR1": 6,
    "AR10": 7,
    "AR": 8,
}
"""Names of the metrics, and their places among COCOeval's statistics."""


def coco_results(
    outputs: Sequence[dict[str, Tensor]], targets: Sequence[Target]
) -> list[dict[str, Any]]:
    """Detections in COCO's result format, in pixels of the original images.

    Args:
        outputs (sequence of dict): one for an image, with ``"boxes"`` ``Tensor[D, 4]`` (x1, y1, x2,
            y2 in pixels of the network's input), ``"scores"`` ``Tensor[D]`` and ``"labels"``
            ``Tensor[D]``.
        targets (sequence of dict): the targets of the same images, of which ``"image_id"`` and
            ``"scale"`` are used.

    Returns:
        list[dict]: each with ``"image_id"``, ``"category_id"`` (the label), ``"bbox"`` (x, y,
        width, height) and ``"score"``.

    Raises:
        ValueError: the numbers of outputs and targets, or of boxes, scores and labels, differ.

    Example:
        >>> import torch
        >>> from hqod_ops.detection.evaluation import coco_results
        >>> output = {"boxes": torch.tensor([[2., 2., 6., 4.]]), "scores": torch.tensor([0.5]),
        ...           "labels": torch.tensor([3])}
        >>> coco_results([output], [{"image_id": 7, "scale": torch.tensor([2., 1.])}])
        [{'image_id': 7, 'category_id': 3, 'bbox': [1.0, 2.0, 2.0, 2.0], 'score': 0.5}]
    """
    if len(outputs) != len(targets):
        raise ValueError(
            f"outputs and targets: expected as many, got {len(outputs)} and {len(targets)}"
        )
    results = []
    for output, target in zip(outputs, targets, strict=True):
        boxes, scores, labels = (output[k].detach().cpu() for k in ("boxes", "scores", "labels"))
        if boxes.shape != (len(scores), 4) or labels.shape != scores.shape:
            raise ValueError(
                "outputs: expected boxes [D, 4], scores [D] and labels [D], "
                f"got {tuple(boxes.shape)}, {tuple(scores.shape)} and {tuple(labels.shape)}"
            )
        corners = boxes.double() / target["scale"].double().repeat(2)
        corners[:, 2:] -= corners[:, :2]
        results += [
            {"image_id": target["image_id"], "category_id": label, "bbox": box, "score": score}
            for box, score, label in zip(
                corners.tolist(), scores.tolist(), labels.tolist(), strict=True
            )
        ]
    return results


EVALUATORS = ("faster-coco-eval", "pycocotools")
"""What can count, the fast one first."""


def _classes(evaluator: str | None) -> tuple[Any, Any]:
    """The classes of an evaluator that read annotations and that count."""
    if evaluator not in (None, *EVALUATORS):
        names = ", ".join(map(repr, EVALUATORS))
        raise ValueError(f"evaluator: expected one of {names} or None, got {evaluator!r}")
    if evaluator != "pycocotools":
        try:
            fast = importlib.import_module("faster_coco_eval")
            return fast.COCO, fast.COCOeval_faster
        except ImportError:
            if evaluator is not None:
                require("faster_coco_eval", "faster-coco-eval")
    return require("pycocotools.coco").COCO, require("pycocotools.cocoeval").COCOeval


def evaluate_coco(
    ground_truth: dict[str, Any],
    detections: Sequence[dict[str, Any]],
    *,
    categories: bool = False,
    evaluator: str | None = None,
) -> dict[str, float]:
    """COCO's metrics of a set of detections.

    faster-coco-eval gives pycocotools' numbers, sooner and with less memory
    (``benchmarks/evaluators.py``); pycocotools stands in where it is not installed.

    Args:
        ground_truth (dict): annotations in COCO's format, such as
            :attr:`DetectionDataset.coco_ground_truth`. All its images count.
        detections (sequence of dict): ``image_id``, ``category_id``, ``bbox`` (x, y, width, height
            in pixels) and ``score``, as :func:`coco_results` gives them; there may be none.
        categories (bool): the AP of every category too. Default: False
        evaluator (str, optional): ``"faster-coco-eval"`` or ``"pycocotools"``. Default: None, the
            first of them that is installed

    Returns:
        dict[str, float]: in [0, 1], NaN where there is no such ground truth: ``AP`` (the mean over
        IoU 0.5 to 0.95 and categories), ``AP50``, ``AP75``, ``APs``, ``APm``, ``APl`` (below 32**2,
        up to 96**2, above, in square pixels), ``AR1``, ``AR10`` and ``AR`` (recall with 1, 10 and
        100 detections an image); with categories ``AP/<name>`` for each, in their order.

    Raises:
        ValueError: a detection names an unknown image or category, or there is no such evaluator.
        ImportError: the evaluator is missing.

    Source: COCO (arXiv:1405.0312), https://cocodataset.org/#detection-eval.

    Example:
        >>> from hqod_ops.detection.data import DigitScenes
        >>> from hqod_ops.detection.evaluation import evaluate_coco
        >>> evaluate_coco(DigitScenes("val", num_images=4).coco_ground_truth, [])["AP"]
        0.0
    """
    coco_class, evaluator_class = _classes(evaluator)
    image_ids = {image["id"] for image in ground_truth["images"]}
    category_ids = {category["id"] for category in ground_truth["categories"]}
    results = []
    for number, detection in enumerate(detections, start=1):
        for key, known in (("image_id", image_ids), ("category_id", category_ids)):
            if detection[key] not in known:
                raise ValueError(
                    f"detections: expected a {key} of the ground truth, got {detection[key]!r}"
                )
        _, _, width, height = detection["bbox"]
        # pycocotools' own loader gives the same entries, but fails on an empty list.
        results.append({**detection, "id": number, "area": width * height, "iscrowd": 0})
    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = coco_class(), coco_class()
        truth.dataset = ground_truth
        truth.createIndex()
        found.dataset = {**ground_truth, "annotations": results}
        found.createIndex()
        counted = evaluator_class(truth, found, "bbox")
        counted.evaluate()
        counted.accumulate()
        counted.summarize()
    statistics = np.asarray(counted.stats, dtype=np.float64)
    # COCOeval marks what cannot be measured by -1.
    metrics = {
        name: float(statistics[place]) if statistics[place] >= 0 else math.nan
        for name, place in METRICS.items()
    }
    if categories:
        # By threshold, recall, category, range of areas (all of them first) and 1, 10 or 100.
        precision = np.asarray(counted.eval["precision"])[:, :, :, 0, -1]
        names = {category["id"]: category["name"] for category in ground_truth["categories"]}
        for k, category in enumerate(counted.params.catIds):
            values = precision[:, :, k][precision[:, :, k] >= 0]
            metrics[f"AP/{names[category]}"] = float(values.mean()) if values.size else math.nan
    return metrics
