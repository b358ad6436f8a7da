#!/usr/bin/env python
"""FastestDet quantized without training: AP on COCO images, and what each step brings.

    python benchmarks/accuracy/fastestdet.py --data DATA/coco_small --weights fastestdet_coco.pth

DATA has COCO's layout, with train2017 and val2017. Train images, without their labels, calibrate;
val images measure, and nothing is chosen on them. The result is written as JSON after every row.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Last, so that an installed hqod_ops goes before the one in the tree.
sys.path.append(str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from bench import machine
from coco_small import Split, measured
from fastestdet_model import FastestDet, load_fastestdet
from torch import nn

from hqod_ops.quant import QATConfig, calibrate, parameter_groups, prepare_qat
from hqod_ops.quant.tuning import (
    Distillation,
    calibrate_scores,
    correct_bias,
    learn_rounding,
    quantize,
    reestimate_batch_norm,
    search_bits,
    sensitivity,
)
from hqod_ops.quant.tuning.bits import average

ROOT = Path(__file__).resolve().parents[2]
FEATURES = ("backbone.stage2", "backbone.stage3", "backbone.stage4", "SPP")
HEADS = tuple(f"detect_head.{name}_layers" for name in ("obj", "reg", "cls"))
LOGITS = tuple(f"{head}.conv5x5.3" for head in HEADS if "reg" not in head)
ROWS = ("float", "W8A8", "W4A8", "search", "W4A4", "distill", "scores")


class Bench:
    """The data, the settings, and the rows measured so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.train, self.val = (Split(args.data, f"{name}2017") for name in ("train", "val"))
        self.batches = self.train.batches(slice(args.images))
        self.rows: list[dict[str, Any]] = []
        self.float_model = self.load()
        _, self.reference = measured(self.float_model, self.val)

    def load(self) -> FastestDet:
        return load_fastestdet(self.args.weights)

    def note(self, row: str, model: nn.Module, seconds: float = 0.0, **more: Any) -> None:
        """Measure a model, and write everything."""
        found, harmony = measured(model, self.val)
        scores = harmony.fidelity(self.reference)
        found |= {
            "f1": round(100 * scores.f1, 2),
            "float_f1": round(100 * scores.float_f1, 2),
            "score_shift": round(scores.shift, 4),
        }
        self.rows.append({"row": row, **found, "seconds": round(seconds, 1), **more})
        print(json.dumps(self.rows[-1]), flush=True)
        settings = {
            "calibration images": len(self.train.images[: self.args.images]),
            "measured on": f"{len(self.val.images)} val images",
            "steps": self.args.steps,
            "chosen on": "train images that were not calibrated on",
            "seed": 0,
        }
        self.args.output.parent.mkdir(parents=True, exist_ok=True)
        result = {"machine": machine.describe(), "settings": settings, "rows": self.rows}
        self.args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    def step(self, row: str, model: nn.Module, work: Callable[[], object]) -> None:
        start = time.monotonic()
        work()
        self.note(row, model, time.monotonic() - start)

    def post_training(self, name: str, config: QATConfig, learn: bool) -> FastestDet:
        """Calibrated, re-estimated, learned and corrected, measured after each."""
        original, batches = self.float_model, self.batches
        model = prepare_qat(self.load(), config)
        start = time.monotonic()
        calibrate(model, batches[:2], progress=False)
        self.note(f"{name} calibrated", model, time.monotonic() - start)
        self.step(
            f"{name} re-estimated",
            model,
            lambda: reestimate_batch_norm(model, batches, float_model=original),
        )

        def finish() -> None:
            if learn:
                learn_rounding(model, original, batches, steps=self.args.steps, progress=False)
                reestimate_batch_norm(model, batches, float_model=original)
            correct_bias(model, original, batches)

        self.step(f"{name} {'learned, ' * learn}corrected", model, finish)
        return model


def _config(weights: int, inputs: int) -> QATConfig:
    return QATConfig(weights, inputs, per_channel=True, weight_init="mse", act_init="mse")


def scores(bench: Bench) -> None:
    """Scores before and after their calibration, of models quantized in seconds."""
    for name in ("W8A8", "W4A8", "W4A4"):
        model = prepare_qat(bench.load(), _config(int(name[1]), int(name[3])))
        calibrate(model, bench.batches[:2], progress=False)
        reestimate_batch_norm(model, bench.batches, float_model=bench.float_model)
        bench.note(f"{name} re-estimated", model)
        start = time.monotonic()
        calibrate_scores(model, bench.float_model, bench.batches, layers=LOGITS)
        bench.note(f"{name} re-estimated, scores calibrated", model, time.monotonic() - start)


def search(bench: Bench) -> None:
    """Bits for every layer, 4.5 of a weight on average."""
    start = time.monotonic()
    some = [bench.batches[0][:8]]
    found = sensitivity(bench.load(), some, bits=(2, 3, 4, 5, 6, 8), kinds=("weight",))
    config = search_bits(found, average_bits=4.5)
    seconds = time.monotonic() - start
    bits = average(config, found.weights)
    model, _ = quantize(bench.load(), bench.batches, config, progress=False)
    rules = {str(rule.pattern): rule.weight_bits for rule in config.overrides}
    bench.note("search W4.5A8", model, seconds, average_bits=bits, bits=rules)


def distill(bench: Bench) -> None:
    """W4A4 with distillation from the float model on the train images, labels unused."""
    torch.manual_seed(0)
    start = time.monotonic()
    model = prepare_qat(bench.load(), _config(4, 4))
    calibrate(model, bench.batches[:2], progress=False)
    reestimate_batch_norm(model, bench.batches, float_model=bench.float_model)
    distillation = Distillation(model, bench.float_model, FEATURES, HEADS)
    optimizer = torch.optim.Adam(parameter_groups(model, weight_decay=0.0), lr=1e-3)
    epochs, images = bench.args.epochs, bench.train.images
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        model.train()
        for part in torch.randperm(len(images)).split(16):
            batch = images[part].float() / 255
            if torch.rand(()) < 0.5:
                batch = batch.flip(-1)
            optimizer.zero_grad()
            distillation(batch).backward()
            optimizer.step()
        schedule.step()
    distillation.close()
    reestimate_batch_norm(model, bench.batches, float_model=bench.float_model)
    bench.note("W4A4 distilled", model, time.monotonic() - start, epochs=epochs)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder in COCO's layout")
    parser.add_argument("--weights", type=Path, required=True, help="fastestdet_coco.pth")
    parser.add_argument("--images", type=int, default=258, help="calibration images; default: 258")
    parser.add_argument("--steps", type=int, default=300, help="of learned rounding; default: 300")
    parser.add_argument("--epochs", type=int, default=40, help="of distillation; default: 40")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="default: all")
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "benchmarks" / "results" / "accuracy" / "fastestdet.json",
    )
    bench = Bench(parser.parse_args())
    for row in bench.args.rows:
        if row == "float":
            bench.note("float", bench.float_model)
        elif row == "search":
            search(bench)
        elif row == "scores":
            scores(bench)
        elif row == "distill":
            distill(bench)
        else:
            weights, inputs = int(row[1]), int(row[3])
            model = bench.post_training(row, _config(weights, inputs), learn=weights < 8)
            if row == "W4A4":
                calibrate_scores(model, bench.float_model, bench.batches, layers=LOGITS)
                bench.note("W4A4 scores calibrated", model)


if __name__ == "__main__":
    main()
