"""How well a detector's scores tell the quality of its boxes: the score-IoU harmony report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from hqod_ops.detection.boxes import broadcast_iou
from hqod_ops.detection.data.dataset import Target

try:
    from hqod_ops._host import match_detections as _match_native
except ImportError:
    _match_native = None  # type: ignore[assignment]


def match_detections(
    det_boxes: ArrayLike,
    det_scores: ArrayLike,
    det_labels: ArrayLike,
    gt_boxes: ArrayLike,
    gt_labels: ArrayLike,
    iou_threshold: float = 0.5,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Match the detections of an image with its ground truth, each at most once, as COCO does.

    In order of descending score, a detection takes the free ground truth of its class with the
    highest IoU, if that is at least ``iou_threshold``. Detections of equal score keep their order;
    of equal IoU, the last ground truth is taken.

    Args:
        det_boxes (array[D, 4]): detected boxes (x1, y1, x2, y2) in pixels.
        det_scores (array[D]): their scores.
        det_labels (array[D]): their classes, whole numbers.
        gt_boxes (array[G, 4]): boxes of the ground truth.
        gt_labels (array[G]): their classes.
        iou_threshold (float): the least IoU of a match, in (0, 1]. Default: 0.5

    Returns:
        int64[D], float64[D]: index of each detection's ground truth, -1 for none; and its IoU with
        it, 0 for none.

    Raises:
        ValueError: a shape does not fit, a value is not finite, the threshold is out of range.

    Source: COCO (arXiv:1405.0312). Runs in C++ where ``hqod_ops._host`` is installed, else in NumPy
    with the same result.

    Example:
        >>> from hqod_ops.detection.harmony import match_detections
        >>> boxes = [[0, 0, 10, 10], [0, 0, 10, 8]]
        >>> match_detections(boxes, [0.6, 0.9], [1, 1], [[0, 0, 10, 10]], [1])
        (array([-1,  0]), array([0. , 0.8]))
    """
    match = _match_numpy if _match_native is None else _match_native
    return match(
        _boxes("det_boxes", det_boxes),
        _floats("det_scores", det_scores),
        _whole("det_labels", det_labels),
        _boxes("gt_boxes", gt_boxes),
        _whole("gt_labels", gt_labels),
        float(iou_threshold),
    )


def _floats(name: str, values: ArrayLike) -> NDArray[np.float64]:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected an array of numbers ({error})") from None


def _boxes(name: str, values: ArrayLike) -> NDArray[np.float64]:
    array = _floats(name, values)
    return array.reshape(0, 4) if array.shape == (0,) else array  # an empty list


def _whole(name: str, values: ArrayLike) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected whole numbers, got an array of {array.dtype}")
    return array.astype(np.int64)


def pairwise_iou(boxes1: NDArray[Any], boxes2: NDArray[Any]) -> NDArray[np.float64]:
    """IoU of all pairs of boxes, in float64.

    Args:
        boxes1 (array[N, 4]): x1, y1, x2, y2 in pixels.
        boxes2 (array[M, 4]): the others.

    Returns:
        float64[N, M]: values in [0, 1].
    """
    rows, columns = (torch.as_tensor(boxes, dtype=torch.float64) for boxes in (boxes1, boxes2))
    overlap: NDArray[np.float64] = broadcast_iou(rows[:, None], columns[None]).numpy()
    return overlap


def _rows(array: NDArray[Any]) -> int:
    return array.shape[0] if array.ndim else 0


def _match_numpy(
    boxes: NDArray[np.float64],
    scores: NDArray[np.float64],
    labels: NDArray[np.int64],
    truth: NDArray[np.float64],
    truth_labels: NDArray[np.int64],
    iou_threshold: float,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The fallback of ``_host.match_detections``, with its checks."""
    for name, array, shape in (
        ("det_boxes", boxes, (_rows(boxes), 4)),
        ("det_scores", scores, (_rows(boxes),)),
        ("det_labels", labels, (_rows(boxes),)),
        ("gt_boxes", truth, (_rows(truth), 4)),
        ("gt_labels", truth_labels, (_rows(truth),)),
    ):
        if array.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(array.shape)}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: expected finite values")
    if not 0.0 < iou_threshold <= 1.0:
        raise ValueError(f"iou_threshold: expected a value in (0, 1], got {iou_threshold}")
    indices = np.full(len(boxes), -1, dtype=np.int64)
    ious = np.zeros(len(boxes))
    if len(truth) == 0:
        return indices, ious
    overlap = np.where(labels[:, None] == truth_labels, pairwise_iou(boxes, truth), -1.0)
    for d in np.argsort(-scores, kind="stable"):
        best = len(truth) - 1 - int(overlap[d, ::-1].argmax())
        if overlap[d, best] >= iou_threshold:
            indices[d], ious[d] = best, overlap[d, best]
            overlap[:, best] = -1.0
    return indices, ious


@dataclass(frozen=True)
class Found:
    """Detections of a data set and its ground truth, image after image; crowds are left out.

    Attributes:
        boxes (float32[D, 4]), scores (float32[D]), labels (int64[D]): the detections.
        counts (int64[I]): how many of them each image has.
        truth (float32[G, 4]), truth_labels (int64[G]), truth_counts (int64[I]): the ground truth.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    counts: NDArray[np.int64]
    truth: NDArray[np.float32]
    truth_labels: NDArray[np.int64]
    truth_counts: NDArray[np.int64]

    def same_images(self, other: Found) -> bool:
        """Whether the ground truth is the same, box by box."""
        names = ("truth", "truth_labels", "truth_counts")
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in names)

    def images(self) -> Iterator[tuple[NDArray[Any], ...]]:
        """Boxes, scores, labels, true boxes and true labels of one image after another."""
        ends, true_ends = self.counts.cumsum(), self.truth_counts.cumsum()
        for end, count, true_end, true_count in zip(
            ends, self.counts, true_ends, self.truth_counts, strict=True
        ):
            own, true = slice(end - count, end), slice(true_end - true_count, true_end)
            yield (
                *(self.boxes[own], self.scores[own], self.labels[own]),
                *(self.truth[true], self.truth_labels[true]),
            )

    def hits(self) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The detections' scores, and which of them take a ground truth of their own."""
        found = [
            match_detections(boxes, scores, labels, truth, true_labels, _SAME)[0] >= 0
            for boxes, scores, labels, truth, true_labels in self.images()
        ]
        return self.scores, np.concatenate([np.zeros(0, dtype=bool), *found])


_SAME = 0.5
"""The least IoU of two boxes that mean the same object."""

_SEEN = 0.05
"""Detections of the float model below this score are too many and too weak to be followed."""


@dataclass(frozen=True)
class ScoreFidelity:
    """Whether a model's scores mean what those of the float model mean.

    Attributes:
        shift (float): mean of s - s_f over the pairs; NaN without pairs.
        pairs (int): detections of the float model that the model makes too.
        threshold (float): the score at which the float model has its best F1; NaN without hits.
        f1 (float), float_f1 (float): F1 of the model and of the float model there, in [0, 1].
    """

    shift: float
    pairs: int
    threshold: float
    f1: float
    float_f1: float


def _f1(found: Found, threshold: float) -> float:
    scores, hits = found.hits()
    kept = scores >= threshold
    return 2.0 * float(hits[kept].sum()) / max(int(kept.sum()) + len(found.truth), 1)


def _best_threshold(found: Found) -> float:
    """The highest score that gives the best F1; NaN where nothing is found."""
    scores, hits = found.hits()
    if not hits.any():
        return math.nan
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    f1 = 2.0 * hits[order].cumsum() / (np.arange(1, len(order) + 1) + len(found.truth))
    f1[:-1][ranked[:-1] == ranked[1:]] = 0.0  # a threshold lets all of a score through
    return float(ranked[f1.argmax()])


@dataclass(frozen=True)
class HarmonyReport:
    """Scores and IoUs of matched detections, and how they agree.

    Attributes:
        scores (float64[N]): score of each matched detection, in [0, 1].
        ious (float64[N]): its IoU with its ground truth, in [0, 1].
        bins (int): cells of :attr:`density` a side.
        found (Found, optional): all detections and the ground truth, for :meth:`fidelity`.
    """

    scores: NDArray[np.float64]
    ious: NDArray[np.float64]
    bins: int = 50
    found: Found | None = None

    @property
    def num_matches(self) -> int:
        """Number of matched detections."""
        return len(self.scores)

    @cached_property
    def pearson(self) -> float:
        """Linear correlation of score and IoU; NaN where one of them does not vary."""
        return _correlation(self.scores, self.ious)

    @cached_property
    def spearman(self) -> float:
        """Rank correlation of score and IoU; NaN where one of them does not vary."""
        return _correlation(_ranks(self.scores), _ranks(self.ious))

    @cached_property
    def gap(self) -> float:
        """Mean of abs(score - IoU); NaN without matches."""
        return float(np.abs(self.scores - self.ious).mean()) if self.num_matches else math.nan

    @cached_property
    def density(self) -> NDArray[np.float64]:
        """Histogram [bins (score), bins (IoU)] over the unit square; its integral is 1, or 0."""
        square = ((0.0, 1.0), (0.0, 1.0))
        counts, _, _ = np.histogram2d(self.scores, self.ious, bins=self.bins, range=square)
        density: NDArray[np.float64] = counts * (self.bins**2 / max(self.num_matches, 1))
        return density

    def as_dict(self) -> dict[str, float | int]:
        """The figures without the arrays, for tables and JSON."""
        return {
            "num_matches": self.num_matches,
            "pearson": self.pearson,
            "spearman": self.spearman,
            "gap": self.gap,
        }

    def fidelity(self, reference: HarmonyReport) -> ScoreFidelity:
        """How far these scores are from those of the float model on the same images.

        ``shift = mean (s - s_f)`` over pairs: in every image, in order of descending s, a detection
        takes the free one of the float model (``s_f >= 0.05``) of its class with the highest IoU,
        if that is at least 0.5. ``F1 = 2 TP / (D + G)`` of the D detections of at least a score,
        TP of which take one of the G true boxes (of their class, IoU at least 0.5, each once); the
        score is that at which the float model's F1 is best, for both.

        Args:
            reference (HarmonyReport): that of the float model.

        Returns:
            ScoreFidelity: the mean shift of the scores, and F1 of both.

        Raises:
            ValueError: the images of the two are not the same, or a report has no detections, such
                as one that an earlier version has written.

        Example:
            >>> import torch
            >>> from hqod_ops.detection.harmony import harmony_report
            >>> target = {"boxes": torch.tensor([[0., 0., 8., 8.]]), "labels": torch.tensor([0])}
            >>> model, reference = (
            ...     harmony_report([{**target, "scores": torch.tensor([score])}], [target])
            ...     for score in (0.5, 0.75)
            ... )
            >>> found = model.fidelity(reference)
            >>> found.shift, found.threshold, found.f1, found.float_f1
            (-0.25, 0.75, 0.0, 1.0)
        """
        own, other = self.found, reference.found
        if own is None or other is None:
            raise ValueError("reference: expected reports with detections, got one without")
        if not own.same_images(other):
            raise ValueError("reference: expected the same images, got another ground truth")
        shifts = [np.zeros(0)]
        for (boxes, scores, labels, *_), (its, its_scores, its_labels, *_) in zip(
            own.images(), other.images(), strict=True
        ):
            seen = its_scores >= _SEEN
            its, its_scores, its_labels = its[seen], its_scores[seen], its_labels[seen]
            pair, _ = match_detections(boxes, scores, labels, its, its_labels, _SAME)
            both = pair >= 0
            shifts.append(scores[both].astype(np.float64) - its_scores[pair[both]])
        shift, threshold = np.concatenate(shifts), _best_threshold(other)
        return ScoreFidelity(
            float(shift.mean()) if len(shift) else math.nan,
            len(shift),
            threshold,
            _f1(own, threshold),
            _f1(other, threshold),
        )

    def save(self, path: str | Path) -> None:
        """Write the report to a ``.npz`` file."""
        found = {} if self.found is None else {f"found_{k}": v for k, v in vars(self.found).items()}
        np.savez_compressed(path, scores=self.scores, ious=self.ious, bins=self.bins, **found)

    @classmethod
    def load(cls, path: str | Path) -> HarmonyReport:
        """Read a report that :meth:`save` has written."""
        with np.load(path) as data:
            names = [field.name for field in fields(Found)]
            whole = all(f"found_{name}" in data for name in names)  # earlier versions lack it
            found = Found(**{name: data[f"found_{name}"] for name in names}) if whole else None
            return cls(data["scores"], data["ious"], int(data["bins"]), found)


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    ranks: NDArray[np.float64] = (last - (counts + 1) / 2)[inverse]
    return ranks


def harmony_report(
    outputs: Sequence[dict[str, Tensor]],
    targets: Sequence[Target],
    *,
    min_score: float = 0.05,
    min_iou: float = 0.1,
    one_to_one: bool = False,
    bins: int = 50,
) -> HarmonyReport:
    """Compare the scores of a detector with the IoUs of its boxes.

    Each detection meets the ground truth of its class that it overlaps most, crowds left out. In a
    harmonious detector the score tells the IoU: the correlation is near 1, the gap near 0.

    Args:
        outputs (sequence of dict): one for an image, with ``"boxes"`` ``Tensor[D, 4]``,
            ``"scores"`` ``Tensor[D]`` and ``"labels"`` ``Tensor[D]``, after suppression (NMS).
        targets (sequence of dict): the targets of the same images, in the same pixels.
        min_score (float): detections below it are left out. Default: 0.05
        min_iou (float): detections whose IoU is below it are left out. Default: 0.1
        one_to_one (bool): let each ground truth be matched only once, by
            :func:`match_detections`. Default: False
        bins (int): cells of the density a side. Default: 50

    Returns:
        HarmonyReport: the matched pairs and their correlation.

    Raises:
        ValueError: the numbers of outputs and targets differ, or a threshold is out of [0, 1].

    Source: the score-IoU correlation that HQOD (arXiv:2408.02561) raises.

    Example:
        >>> import torch
        >>> from hqod_ops.detection.harmony import harmony_report
        >>> boxes = torch.tensor([[0., 0., 8., 8.], [8., 8., 16., 16.]])
        >>> target = {"boxes": boxes, "labels": torch.tensor([0, 1])}
        >>> harmony_report([{**target, "scores": torch.tensor([0.75, 1.0])}], [target]).gap
        0.125
    """
    if len(outputs) != len(targets):
        raise ValueError(
            f"outputs and targets: expected as many, got {len(outputs)} and {len(targets)}"
        )
    for name, value in (("min_score", min_score), ("min_iou", min_iou)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name}: expected a value in [0, 1], got {value}")
    all_scores, all_ious = [np.zeros(0)], [np.zeros(0)]
    images: list[tuple[NDArray[Any], ...]] = []
    for output, target in zip(outputs, targets, strict=True):
        boxes, scores, labels = (to_array(output[key]) for key in ("boxes", "scores", "labels"))
        truth, truth_labels = to_array(target["boxes"]), to_array(target["labels"])
        if "iscrowd" in target:
            single = to_array(target["iscrowd"]) == 0
            truth, truth_labels = truth[single], truth_labels[single]
        images.append((boxes, scores, labels, truth, truth_labels))
        if one_to_one:
            threshold = max(min_iou, 1e-12)
            _, ious = match_detections(boxes, scores, labels, truth, truth_labels, threshold)
        else:
            same = labels[:, None] == truth_labels[None]
            ious = np.where(same, pairwise_iou(boxes, truth), 0.0).max(axis=1, initial=0.0)
        kept = (scores >= min_score) & (ious >= min_iou) & (ious > 0.0)
        all_scores.append(scores[kept].astype(np.float64))
        all_ious.append(ious[kept])
    return HarmonyReport(
        np.concatenate(all_scores), np.concatenate(all_ious), bins, _gathered(images)
    )


def _gathered(images: Sequence[tuple[NDArray[Any], ...]]) -> Found:
    empty = (np.zeros((0, 4)), np.zeros(0), np.zeros(0), np.zeros((0, 4)), np.zeros(0))
    columns = [np.concatenate(column) for column in zip(empty, *images, strict=True)]
    counts, true_counts = (np.array([len(image[k]) for image in images], np.int64) for k in (1, 4))
    boxes, scores, labels, truth, true_labels = columns
    return Found(
        boxes.astype(np.float32),
        scores.astype(np.float32),
        labels.astype(np.int64),
        counts,
        truth.astype(np.float32),
        true_labels.astype(np.int64),
        true_counts,
    )


def to_array(values: Tensor) -> NDArray[Any]:
    """A tensor of any device as a NumPy array; half precision, which NumPy lacks, as float32."""
    values = values.detach().cpu()
    half = values.dtype in (torch.bfloat16, torch.float16)
    array: NDArray[Any] = (values.float() if half else values).numpy()
    return array
