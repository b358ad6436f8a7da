"""Detections of a data set, and what they are worth."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from hqod_ops.detection.data import DetectionDataset, collate
from hqod_ops.detection.data.dataset import Target
from hqod_ops.detection.evaluation import coco_results, evaluate_coco
from hqod_ops.detection.harmony import HarmonyReport, harmony_report
from hqod_ops.detection.models.detector import Detections, Detector
from hqod_ops.quant.observers import gather
from hqod_ops.training.batch import batch_images
from hqod_ops.training.data import workers_watched
from hqod_ops.training.engine import from_first, rank, world
from hqod_ops.training.progress import progress_bar

HEADINGS = {
    "pearson": "score-IoU correlation",
    "gap": "mean abs(score - IoU)",
    "score_shift": "score shift",
    "f1": "F1 at the float run's threshold",
}
"""What tables call a figure, where it is not its name."""

_NOT_OF_100 = ("num_matches", "pearson", "spearman", "gap")
_EVALUATION_BATCH = 64
_NOTHING = object()


@torch.no_grad()
def predict(
    model: Detector,
    dataset: Dataset[tuple[Tensor, Target]],
    *,
    workers: int = 0,
    progress: bool = True,
) -> tuple[list[Detections], list[Target]]:
    """Detections on every image of a data set.

    Args:
        model (Detector): the detector; it is put into eval mode.
        dataset (Dataset): images with targets, as a :class:`DetectionDataset` has them.
        workers (int): processes that load images. Default: 0
        progress (bool): show a progress bar where the output is a terminal. Default: True

    Returns:
        tuple: detections and targets of every image, in pixels of the network's input, on the CPU.
    """
    device = next(model.parameters()).device
    model.eval()
    loader = DataLoader(
        dataset, batch_size=_EVALUATION_BATCH, num_workers=workers, collate_fn=collate
    )
    outputs: list[Detections] = []
    truth: list[Target] = []
    with workers_watched(), progress_bar("evaluate", len(loader), enabled=progress) as advance:
        for images, targets in loader:
            found = model.detect(batch_images(images, device, model.stride))
            outputs += [_on_cpu(entry, image) for entry, image in zip(found, images, strict=True)]
            truth += targets
            advance("")
    return outputs, truth


def _on_cpu(found: Detections, image: Tensor) -> Detections:
    """Detections cut at the border of their image, which may be smaller than its batch."""
    limit = torch.tensor([image.shape[2], image.shape[1]] * 2, dtype=torch.float32)
    return {
        "boxes": torch.minimum(found["boxes"].cpu(), limit),
        "scores": found["scores"].cpu(),
        "labels": found["labels"].cpu(),
    }


def evaluate(
    model: Detector,
    dataset: DetectionDataset,
    *,
    workers: int = 0,
    progress: bool = True,
    categories: bool = False,
) -> tuple[dict[str, float], HarmonyReport]:
    """COCO's metrics and the agreement of scores and IoUs.

    In a distributed run every process calls it and looks at its share of the images; all get the
    same.

    Args:
        model (Detector): the detector.
        dataset (DetectionDataset): images with ground truth.
        workers (int): processes that load images. Default: 0
        progress (bool): show a progress bar where the output is a terminal. Default: True
        categories (bool): the AP of every category too. Default: False

    Returns:
        tuple: the metrics of :func:`hqod_ops.detection.evaluate_coco` with those of the
        harmony report, and that report.
    """
    first = rank() == 0
    mine = Subset(dataset, range(rank(), len(dataset), world()))
    found = predict(model, mine, workers=workers, progress=progress and first)
    parts = gather(found) if world() > 1 else [found]
    if not first:
        scored: tuple[dict[str, float], HarmonyReport] = from_first(None)
        return scored
    outputs, targets = ([*_interleaved([part[k] for part in parts])] for k in (0, 1))
    results = coco_results(outputs, targets)
    metrics = evaluate_coco(dataset.coco_ground_truth, results, categories=categories)
    harmony = harmony_report(outputs, targets)
    scored = {**metrics, **harmony.as_dict()}, harmony
    from_first(scored)
    return scored


def _interleaved(parts: Sequence[Sequence[Any]]) -> Iterator[Any]:
    """Every n-th item of each of n parts, in the order of the whole."""
    for row in itertools.zip_longest(*parts, fillvalue=_NOTHING):
        yield from (item for item in row if item is not _NOTHING)


def metric_lines(metrics: Mapping[str, float]) -> Iterator[str]:
    """The figures of :func:`evaluate` for people: COCO's of 100, with the words of the tables.

    Args:
        metrics (mapping): figures by name.

    Yields:
        str: a line each.

    Example:
        >>> from hqod_ops.training.evaluate import metric_lines
        >>> print(*metric_lines({"AP": 0.1992, "pearson": 0.7, "AP/cat": 0.25}), sep="\\n")
        AP                       19.9
        score-IoU correlation    0.700
        AP of cat                25.0
    """
    for name, value in metrics.items():
        kind, _, category = name.partition("/")
        words = f"{kind} of {category}" if category else HEADINGS.get(name, name)
        if isinstance(value, int) or value != value:
            shown = str(value) if value == value else "-"
        else:
            shown = f"{value:.3f}" if name in _NOT_OF_100 else f"{100 * value:.1f}"
        yield f"{words:24} {shown}"
