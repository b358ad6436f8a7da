#!/usr/bin/env python
"""The demo's ATSS on steel defects, W2A2 against its own float: AP50 over seeds.

    python benchmarks/accuracy/neu_det.py --data DATA/neu_det --runs runs

DATA/neu_det has Pascal VOC's layout (NEU-DET, 1,440 images to train on, 360 to test on). The float
model is trained from scratch, and a quantized one from it. Settings are those of the command line,
chosen before any test image was looked at; the result is that of the last epoch. A finished run is
kept and a stopped one resumed. The result is written as JSON after every run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

# Last, so that an installed hqod_ops goes before the one in the tree.
sys.path.append(str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from bench import machine

from hqod_ops.training.files import CHECKPOINT, is_finished, read_result
from hqod_ops.training.run import Run
from hqod_ops.training.settings import DataConfig, RunConfig, ScheduleConfig

ROOT = Path(__file__).resolve().parents[2]


def float_config(args: argparse.Namespace, seed: int) -> RunConfig:
    """The float model, from scratch."""
    return RunConfig(
        name=f"neu_det/seed{seed}/float",
        seed=seed,
        device="cpu",
        data=DataConfig(source=str(args.data), size=args.size),
        schedule=ScheduleConfig(epochs=args.epochs, batch_size=16),
    )


def finish(config: RunConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Train what is not trained yet; its result."""
    run = Run(config, args.runs, resume=True)
    if not is_finished(run.directory):
        run.train(progress=False)
    return read_result(run.directory)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder in VOC's layout")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="default: runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", type=int, default=128, help="of the images; default: 128")
    parser.add_argument("--epochs", type=int, default=30, help="in float; default: 30")
    args = parser.parse_args()
    for seed in args.seeds:
        found = finish(float_config(args, seed), args)
        print(json.dumps({k: found[k] for k in ("AP", "AP50", "seconds")}), flush=True)


if __name__ == "__main__":
    main()
