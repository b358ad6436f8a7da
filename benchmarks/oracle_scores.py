"""How much of a detector's AP its scores cost: the same boxes, scored by an oracle.

    python benchmarks/oracle_scores.py runs/demo/seed0/w2 runs/demo/seed0/w2-hqod

Three lines a run: the detections as they are; each score multiplied by the true IoU of its box with
the nearest object of any class, which is the most that tying scores to overlaps can bring; and the
score replaced by the IoU with the nearest object of the box's own class, which forgives every
confusion of classes too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou

from hqod_ops.detection.evaluation import coco_results, evaluate_coco
from hqod_ops.training.build import load_detector
from hqod_ops.training.data import open_data
from hqod_ops.training.evaluate import predict


def nearest_iou(output: dict[str, Tensor], target: dict[str, Any], *, own_class: bool) -> Tensor:
    """The largest IoU of each detection with an object of the image; 0 without one."""
    boxes, objects = output["boxes"], target["boxes"]
    if not len(objects) or not len(boxes):
        return torch.zeros(len(boxes))
    iou = box_iou(boxes, objects.to(boxes))
    if own_class:
        iou = iou * (output["labels"][:, None] == target["labels"].to(output["labels"]))
    return iou.amax(dim=1)


def report(run: Path) -> None:
    """Print the three lines of a run."""
    model, config, _ = load_detector(run)
    dataset = open_data(config.data)
    outputs, targets = predict(model, dataset, progress=False)
    pairs = list(zip(outputs, targets, strict=True))
    rescored: dict[str, Sequence[Any]] = {
        "as it is": outputs,
        "times the IoU": [
            {**o, "scores": o["scores"] * nearest_iou(o, t, own_class=False)} for o, t in pairs
        ],
        "the class' IoU": [{**o, "scores": nearest_iou(o, t, own_class=True)} for o, t in pairs],
    }
    print(run)
    for name, detections in rescored.items():
        found = evaluate_coco(dataset.coco_ground_truth, coco_results(detections, targets))
        numbers = "  ".join(f"{key} {100 * found[key]:.1f}" for key in ("AP", "AP50", "AP75"))
        print(f"  {name:16} {numbers}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="directories of finished runs")
    for run in parser.parse_args().runs:
        report(run)


if __name__ == "__main__":
    main()
