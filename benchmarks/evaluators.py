"""COCO's metrics of a set of COCO's size: seconds and memory of each evaluator, and their numbers.

    python benchmarks/evaluators.py --output benchmarks/results/evaluators.json

5,000 images of 7 objects and 100 detections, drawn by a seed. Each evaluator counts in a process of
its own, in turns; the time is that of the processor, since these machines are shared.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import machine

from hqod_ops.detection.evaluation import EVALUATORS, evaluate_coco

CLASSES, OBJECTS, DETECTIONS = 80, 7, 100


def boxes_of(n: int, draw: np.random.Generator) -> np.ndarray[Any, Any]:
    """x, y, width and height in an image of 640 x 480."""
    return np.concatenate([draw.random((n, 2)) * 400, draw.random((n, 2)) * 200 + 5], axis=1)


def scene(images: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ground truth, and detections of which the first ones are near to it."""
    draw = np.random.default_rng(0)
    truth: dict[str, Any] = {
        "images": [{"id": i, "width": 640, "height": 480} for i in range(images)],
        "categories": [{"id": c, "name": str(c)} for c in range(CLASSES)],
        "annotations": [],
    }
    found: list[dict[str, Any]] = []
    for image in range(images):
        objects, guesses = boxes_of(OBJECTS, draw), boxes_of(DETECTIONS, draw)
        labels, guessed = (draw.integers(0, CLASSES, n) for n in (OBJECTS, DETECTIONS))
        guesses[:OBJECTS] = objects + draw.normal(0, 4, objects.shape)
        guessed[:OBJECTS] = labels
        for box, label in zip(objects.tolist(), labels.tolist(), strict=True):
            number = len(truth["annotations"]) + 1
            truth["annotations"].append(
                {"id": number, "image_id": image, "category_id": label, "bbox": box}
                | {"area": box[2] * box[3], "iscrowd": 0}
            )
        scores = draw.random(DETECTIONS).tolist()
        found += [
            {"image_id": image, "category_id": label, "bbox": box, "score": score}
            for box, label, score in zip(guesses.tolist(), guessed.tolist(), scores, strict=True)
        ]
    return truth, found


def peak() -> int:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def count(evaluator: str, images: int) -> dict[str, Any]:
    """One evaluator, in this process."""
    data, before = scene(images), peak()
    started = time.process_time()
    metrics = evaluate_coco(*data, categories=True, evaluator=evaluator)
    seconds = time.process_time() - started
    return {"seconds": seconds, "bytes": peak() - before, "metrics": metrics}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", choices=EVALUATORS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(count(arguments.one, arguments.images)))
        return
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in EVALUATORS}
    for _ in range(arguments.rounds):
        for name in EVALUATORS:
            command = [sys.executable, __file__, "--one", name, "--images", str(arguments.images)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rounds[name].append(json.loads(done.stdout))
    fast, slow = (rounds[name][0]["metrics"] for name in EVALUATORS)
    results = {
        "images": arguments.images,
        "rounds": arguments.rounds,
        "largest_difference": max(abs(fast[name] - slow[name]) for name in slow),
        "AP": slow["AP"],
        "evaluators": {
            name: {key: statistics.median(r[key] for r in of) for key in ("seconds", "bytes")}
            for name, of in rounds.items()
        },
    }
    text = json.dumps({"machine": machine.describe(), **results}, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
