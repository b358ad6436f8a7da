#!/usr/bin/env python
"""A training step of torchvision's RetinaNet: float, LSQ by the peers' ops, and by ours.

    python benchmarks/bench_step.py --device cuda         # RetinaNet-R50, 8 images of 640x640
    python benchmarks/bench_step.py                       # one image of 192x192, on the CPU
    python benchmarks/bench_step.py --quick               # a small one, to see that it works

It writes the result as JSON, and beside it the profiler's tables as text.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Last, so that an installed hqod_ops goes before the one in the tree.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from bench import machine, step, tables
from bench.progress import progress

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PARTIAL_RESULTS = ROOT / "runs" / "bench"


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="See benchmarks/README.md."
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--quick", action="store_true", help="a small model, two steps")
    parser.add_argument(
        "--amp",
        choices=("off", "on", "both"),
        default="both",
        help="mixed precision: float16 on a GPU, bfloat16 on the CPU; default: both",
    )
    parser.add_argument("--steps", metavar="N", type=int, help="rounds that are timed")
    parser.add_argument("--output", metavar="PATH", type=Path, help="the result file to write")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps: expected at least 1, got {args.steps}")
    return args


def run(
    settings: step.Settings, device: torch.device, amps: tuple[bool, ...]
) -> Iterator[tuple[list[dict[str, Any]], str]]:
    """Every variant, with and without mixed precision: the entries, and the profiler's tables."""
    with progress(len(amps) * (len(step.VARIANTS) + settings.steps)) as said:
        for amp in amps:
            entries, tables_of = step.measure(settings, device, amp, said=said)
            mixed = ", mixed precision" if amp else ""
            yield entries, "\n".join(f"{v}{mixed}\n\n{text}" for v, text in tables_of.items())
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def table(entries: list[dict[str, Any]]) -> tables.Table:
    """The result for a reader."""
    columns = ["entry", "mixed precision", "step", "p20 to p80", "over float", "p20 to p80"]
    columns += ["of the step", "peak memory", "saved", "our ops"]
    rows = []
    for entry in entries:
        ms, added = entry["ms"], entry["added_ms"]
        rows.append(
            [
                entry["variant"],
                "yes" if entry["amp"] else "no",
                f"{ms['median']:.1f} ms",
                f"{ms['p20']:.1f} to {ms['p80']:.1f} ms",
                f"{added['median']:.1f} ms",
                f"{added['p20']:.1f} to {added['p80']:.1f} ms",
                f"{100 * entry['share_added']:.1f} %",
                f"{entry['peak_bytes'] / 2**20:.0f} MiB",
                f"{entry['saved_bytes'] / 2**20:.0f} MiB",
                f"{100 * entry['share_of_our_ops']:.1f} %",
            ]
        )
    return tables.Table("A training step, and what quantization adds to it", columns, rows)


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    args = _arguments(argv)
    on_gpu = args.device == "cuda"
    settings = step.QUICK if args.quick else step.FULL if on_gpu else step.SMALL
    if args.steps is not None:
        settings = dataclasses.replace(settings, steps=args.steps)
    torch.backends.cudnn.benchmark = True
    amps = {"off": (False,), "on": (True,), "both": (False, True)}[args.amp]
    described = machine.describe(args.device)
    folder = PARTIAL_RESULTS if args.quick or args.steps or args.amp != "both" else RESULTS
    name = Path(machine.file_name(described)).stem
    path = args.output or folder / f"{name}-step.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    profiles: list[str] = []
    for found, profiled in run(settings, torch.device(args.device), amps):
        entries += found
        profiles.append(profiled)  # written each time, so that what was measured stays
        result = {"machine": described, "settings": dataclasses.asdict(settings), "steps": entries}
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".txt").write_text("\n".join(profiles), encoding="utf-8")
    tables.show(table(entries))
    print(f"written: {path} and {path.with_suffix('.txt').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
