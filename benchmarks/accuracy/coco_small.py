"""A small COCO folder in memory: images for FastestDet, targets, and what a model finds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fastestdet_model import SIZE, decode
from torch import Tensor, nn

from hqod_ops.detection.data import CocoDataset
from hqod_ops.detection.data.files import Resize
from hqod_ops.detection.evaluation import coco_results, evaluate_coco
from hqod_ops.detection.harmony import HarmonyReport, harmony_report

BATCH = 32


class Split:
    """The images of a split as batches of BGR images in [0, 1], and its ground truth.

    Args:
        root (Path): a folder in COCO's layout.
        name (str): ``"train2017"`` or ``"val2017"``.
    """

    def __init__(self, root: Path, name: str) -> None:
        data = CocoDataset(root / f"annotations/instances_{name}.json", root / name, Resize(SIZE))
        pairs = [data[index] for index in range(len(data))]
        # Held as bytes: a quarter of the memory, and exact.
        self.images = torch.stack([(255 * image.flip(0)).round().byte() for image, _ in pairs])
        self.targets = [target for _, target in pairs]
        self.truth = data.coco_ground_truth

    def batches(self, indices: Sequence[int] | slice = slice(None)) -> list[Tensor]:
        """Images of these indices in batches."""
        return [part.float() / 255 for part in self.images[indices].split(BATCH)]

    def part(self, indices: Sequence[int]) -> Split:
        """Some of the images as a split of their own."""
        made = object.__new__(Split)
        made.images = self.images[list(indices)]
        made.targets = [self.targets[index] for index in indices]
        kept = {target["image_id"] for target in made.targets}
        made.truth = {
            **self.truth,
            "images": [image for image in self.truth["images"] if image["id"] in kept],
            "annotations": [n for n in self.truth["annotations"] if n["image_id"] in kept],
        }
        return made


@torch.no_grad()
def detect(model: nn.Module, split: Split) -> list[dict[str, Tensor]]:
    """The detections of a model in eval mode, one dict an image."""
    model.eval()
    return [found for batch in split.batches() for found in decode(model(batch))]


def measured(model: nn.Module, split: Split) -> tuple[dict[str, Any], HarmonyReport]:
    """COCO's metrics of a model, in percent, and what tells its scores from another's."""
    outputs = detect(model, split)
    found = evaluate_coco(split.truth, coco_results(outputs, split.targets))
    metrics = {key: round(100 * found[key], 2) for key in ("AP", "AP50")}
    return metrics, harmony_report(outputs, split.targets)
