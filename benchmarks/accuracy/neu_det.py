#!/usr/bin/env python
"""The demonstration's ATSS on steel defects (NEU-DET): 2 bits against its own float model.

    python benchmarks/accuracy/neu_det.py --data DATA/neu_det --runs RUNS

DATA has Pascal VOC's layout, with the lists train and val; RUNS keeps what is trained. For every
seed a float model is trained, and from it one of 2 bits; then its scores are calibrated on training
images, without labels. Since the 2 bits are trained for longer than their float model, so is, at
last, the float model itself. Settings were chosen with --held-out, which trains on four fifths of
the training images and tests on the rest: val images measure, and nothing is chosen on them. The
result is written as JSON after every row; what was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

# Last, so that an installed hqod_ops goes before the one in the tree.
sys.path.append(str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from bench import machine

from hqod_ops.detection.harmony import HarmonyReport
from hqod_ops.quant import QATConfig
from hqod_ops.quant.tuning import calibrate_scores
from hqod_ops.training.build import load_detector, sample_batches
from hqod_ops.training.data import open_data
from hqod_ops.training.evaluate import evaluate
from hqod_ops.training.files import HARMONY, is_finished, read_result
from hqod_ops.training.run import Run
from hqod_ops.training.settings import DataConfig, DistillConfig, RunConfig, ScheduleConfig

ROOT = Path(__file__).resolve().parents[2]
LOGITS = ("head.cls_pred", "head.centerness_pred")


def configs(args: argparse.Namespace, data: Path, seed: int) -> tuple[RunConfig, RunConfig]:
    """The float run and the 2-bit run of a seed."""
    base = RunConfig(
        name=f"float-{seed}",
        seed=seed,
        device="cpu",
        data=DataConfig(source=str(data), size=128),
        schedule=ScheduleConfig(epochs=args.float_epochs, batch_size=16, lr=4e-3),
    )
    start = str(args.runs / base.name)
    low = replace(
        base,
        name=f"w2a2-{seed}",
        init=start,
        quant=QATConfig(2, 2, weight_init="lsq"),
        distill=DistillConfig(teacher=start),
        schedule=replace(base.schedule, epochs=args.epochs, lr=3e-3, ema=0.99),
    )
    return base, low


def held_out(source: Path, folder: Path) -> Path:
    """A folder of the same layout: four fifths of the training images, and the rest as val."""
    lists = folder / "ImageSets" / "Main"
    lists.mkdir(parents=True, exist_ok=True)
    for name in ("Annotations", "JPEGImages"):
        if not (folder / name).exists():
            (folder / name).symlink_to((source / name).resolve())
    names = (source / "ImageSets" / "Main" / "train.txt").read_text(encoding="utf-8").split()
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    rest = set(order[: len(names) // 5])
    for split, kept in (("val", rest), ("train", set(order) - rest)):
        (lists / f"{split}.txt").write_text("".join(f"{names[i]}\n" for i in sorted(kept)))
    return folder


class Bench:
    """The settings, and the rows measured so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.data = held_out(args.data, args.runs / "data") if args.held_out else args.data
        self.rows: list[dict[str, Any]] = []

    def note(
        self,
        row: str,
        seed: int,
        metrics: dict[str, Any],
        harmony: HarmonyReport,
        reference: HarmonyReport,
        seconds: float = 0.0,
    ) -> None:
        """Add a row, and write everything."""
        found = harmony.fidelity(reference)
        entry: dict[str, Any] = {"row": row, "seed": seed}
        entry |= {name: round(100 * metrics[name], 2) for name in ("AP", "AP50")}
        entry |= {"f1": round(100 * found.f1, 2), "threshold": round(found.threshold, 3)}
        if row != "float":
            entry |= {"score_shift": round(found.shift, 4), "pairs": found.pairs}
        self.rows.append(entry | {"seconds": round(seconds, 1)})
        print(json.dumps(self.rows[-1]), flush=True)
        args = self.args
        settings = {
            "measured on": "a fifth of the train images" if args.held_out else "val images",
            "chosen on": "a fifth of the train images, which the others do not hold",
            "size": 128,
            "float epochs": args.float_epochs,
            "W2A2 epochs": args.epochs,
            "W2A2": "LSQ, edge layers 8 bits, distilled beside labels, ema 0.99",
            "seeds": args.seeds,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        result = {"machine": machine.describe(), "settings": settings, "rows": self.rows}
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    def run(self, config: RunConfig) -> tuple[dict[str, Any], HarmonyReport]:
        """Train a run, unless it is finished; its result, and its detections."""
        run = Run(config, self.args.runs, resume=True)
        if not is_finished(run.directory):
            run.train(progress=False)
        return read_result(run.directory), HarmonyReport.load(run.directory / HARMONY)

    def seed(self, seed: int) -> None:
        """Float, 2 bits, and 2 bits with calibrated scores."""
        base, low = configs(self.args, self.data, seed)
        result, reference = self.run(base)
        self.note("float", seed, result, reference, reference, result["seconds"])
        result, harmony = self.run(low)
        self.note("W2A2", seed, result, harmony, reference, result["seconds"])
        model, config, _ = load_detector(self.args.runs / low.name)
        original, _, _ = load_detector(self.args.runs / base.name)
        images = sample_batches(
            open_data(config.data, train=True), config, torch.device("cpu"), model.stride
        )
        calibrate_scores(model.network, original.network, images, layers=LOGITS)
        metrics, harmony = evaluate(model, open_data(config.data), progress=False)
        self.note("W2A2 scores calibrated", seed, metrics, harmony, reference)

    def trained_on(self, seed: int) -> None:
        """The float model with the epochs, the teacher and the average that the 2 bits get."""
        base, low = configs(self.args, self.data, seed)
        _, reference = self.run(base)
        more = replace(low, name=f"float-more-{seed}", quant=base.quant)
        result, harmony = self.run(more)
        self.note("float trained on", seed, result, harmony, reference, result["seconds"])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder in VOC's layout")
    parser.add_argument("--runs", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--float-epochs", type=int, default=60, help="default: 60")
    parser.add_argument("--epochs", type=int, default=20, help="of 2 bits; default: 20")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--held-out", action="store_true", help="measure on train images")
    results = ROOT / "benchmarks" / "results" / "accuracy"
    parser.add_argument("--output", type=Path, default=results / "neu_det.json")
    bench = Bench(parser.parse_args())
    torch.set_num_threads(bench.args.threads)
    for seed in bench.args.seeds:
        bench.seed(seed)
    for seed in bench.args.seeds:
        bench.trained_on(seed)


if __name__ == "__main__":
    main()
