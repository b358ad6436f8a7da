#!/usr/bin/env python
"""What a training step of RetinaNet-R50 keeps for its backward pass: float, and quantized.

    python benchmarks/bench_saved.py                   # about half an hour on two cores
    python benchmarks/bench_saved.py --quick           # a small one, to see that it works
    python benchmarks/bench_saved.py --write           # docs/benchmarks.md from the result

Quantized tensors are kept in float, as without further settings, or with ``save="codes"``. In
float32 both give the same gradients, bit for bit, or the run ends with an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Last, so that an installed hqod_ops goes before the one in the tree.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from bench import machine, step, tables
from bench.documents import write_block
from bench.measure import spread
from bench.progress import progress

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "saved-retinanet-r50.json"
PARTIAL_RESULT = ROOT / "runs" / "bench" / "saved-retinanet-r50.json"
DOCUMENT = ROOT / "docs" / "benchmarks.md"

GOALS = {"hqod_w2a2": 1.07, "hqod_w4a4": 1.12, "w8a8": 1.20}
"""Most bytes over those of the float model, at :data:`GOAL_SIZE`."""
GOAL_SIZE = 640
STEP_GOAL = 1.05
"""Longest step over one that keeps quantized tensors in float."""
KEPT = {"float": "ours", "codes": "ours, saved as codes"}
BITS = {"hqod_w2a2": "2", "hqod_w4a4": "4", "w8a8": "8"}


@dataclasses.dataclass(frozen=True)
class Effort:
    """What is measured."""

    backbone: str = "resnet50"
    sizes: tuple[int, ...] = (256, 640)
    """Sides of the image whose saved bytes are counted."""
    amp_size: int = 640
    step_size: int = 192
    """Of the image of the timed steps."""
    rounds: int = 15

    @property
    def work(self) -> int:
        """How often progress is told."""
        return len(self.sizes) * (2 + 2 * len(GOALS)) + 3 + self.rounds

    def settings(self, size: int, config: str = "hqod_w4a4") -> step.Settings:
        return dataclasses.replace(
            step.SMALL, backbone=self.backbone, size=size, config=config, warmup=1
        )


FULL = Effort()
QUICK = Effort(backbone="resnet18", sizes=(64,), amp_size=64, step_size=64, rounds=2)


def _trial(variant: str, settings: step.Settings, amp: bool = False) -> step.Trial:
    device = torch.device("cpu")
    gc.collect()
    return step.Trial(variant, settings, step.make_batch(settings, device), device, amp)


def _gradients(trial: step.Trial) -> list[torch.Tensor | None]:
    trial.backward()
    found = [parameter.grad for parameter in trial.model.parameters()]
    trial.drop_gradients()
    return found


def _same(a: list[torch.Tensor | None], b: list[torch.Tensor | None]) -> bool:
    pairs = list(zip(a, b, strict=True))
    none = all((x is None) == (y is None) for x, y in pairs)
    return none and all(torch.equal(x, y) for x, y in pairs if x is not None and y is not None)


def count(effort: Effort, said: Callable[[str], None]) -> list[dict[str, Any]]:
    """Bytes that are kept, and the most that there are at once, by size, bits and way of saving.

    Raises:
        RuntimeError: the gradients differ.
    """
    found = []

    def entry(size: int, amp: bool, variant: str, config: str) -> list[torch.Tensor | None]:
        said(f"{size} pixels, {variant}, {config}")
        trial = _trial(variant, effort.settings(size, config), amp)
        found.append(
            {
                "size": size,
                "amp": amp,
                "config": None if variant == "float" else config,
                "variant": variant,
                "saved_bytes": trial.saved_bytes(),
                "peak_bytes": trial.peak_bytes(),
            }
        )
        return _gradients(trial)

    def both(size: int, amp: bool, config: str) -> None:
        kept = [entry(size, amp, variant, config) for variant in KEPT.values()]
        # In bfloat16 torch's own convolution of one pixel differs from run to run on some CPUs.
        if not amp and not _same(*kept):
            raise RuntimeError(f"{config}, {size} pixels: the gradients are not the same bits")

    for size in effort.sizes:
        entry(size, False, "float", "hqod_w4a4")
        for config in GOALS:
            both(size, False, config)
        entry(size, False, "ours, saved as codes, on producers", "hqod_w4a4")
    entry(effort.amp_size, True, "float", "hqod_w4a4")
    both(effort.amp_size, True, "hqod_w4a4")
    return found


def time_steps(effort: Effort, said: Callable[[str], None]) -> dict[str, Any]:
    """Steps of both ways of saving, taking turns: CPU time, and their ratio inside a round."""
    settings = effort.settings(effort.step_size)
    trials = [_trial(variant, settings) for variant in KEPT.values()]
    for trial in trials:
        trial.warm_up(settings.warmup)
    seconds: dict[str, list[float]] = {trial.variant: [] for trial in trials}
    for k in range(effort.rounds):
        said(f"round {k + 1}")
        for trial in trials if k % 2 else trials[::-1]:
            start = time.process_time()
            trial.step()
            seconds[trial.variant].append(time.process_time() - start)
            trial.drop_gradients()
    own = [seconds[variant] for variant in KEPT.values()]
    ratios = [codes / plain for plain, codes in zip(*own, strict=True)]
    return {
        "size": effort.step_size,
        "config": settings.config,
        "threads": torch.get_num_threads(),
        "rounds": effort.rounds,
        "cpu_ms": {name: spread([1e3 * s for s in times], 3) for name, times in seconds.items()},
        "ratio": spread(ratios, 4),
    }


def _mib(entry: dict[str, Any], key: str) -> str:
    return f"{entry[key] / 2**20:,.0f} MiB"


def _found(result: dict[str, Any], **wanted: Any) -> dict[str, Any] | None:
    rows = result["saved"]
    return next((r for r in rows if all(r[k] == v for k, v in wanted.items())), None)


def saved_table(result: dict[str, Any]) -> tables.Table:
    """Bytes that are kept, beside their goals."""
    columns = ["what", "size", "float", "quantized, in float", 'save="codes"', "over float"]
    columns += ["goal", "peak memory: float", "in float", 'save="codes"']
    rows, missed = [], set()
    keys = dict.fromkeys((e["size"], e["amp"], e["config"]) for e in result["saved"] if e["config"])
    for size, amp, config in keys:
        plain = _found(result, size=size, amp=amp, variant="float")
        kept = _found(result, size=size, amp=amp, config=config, variant=KEPT["float"])
        codes = _found(result, size=size, amp=amp, config=config, variant=KEPT["codes"])
        if plain is None or kept is None or codes is None:
            continue
        ratio = codes["saved_bytes"] / plain["saved_bytes"]
        goal = GOALS[config] if size == GOAL_SIZE and not amp else None
        if goal is not None and ratio > goal:
            missed.add((len(rows), 5))
        saved = [_mib(entry, "saved_bytes") for entry in (plain, kept, codes)]
        peaks = [_mib(entry, "peak_bytes") for entry in (plain, kept, codes)]
        words = f"{BITS[config]} bits{', bfloat16' if amp else ''}"
        over = [f"{ratio:.3f}x", "" if goal is None else f"{goal:.2f}x"]
        rows.append([words, f"{size} px", *saved, *over, *peaks])
    for entry in result["saved"]:
        if not entry["variant"].endswith("on producers"):
            continue
        plain = _found(result, size=entry["size"], amp=entry["amp"], variant="float")
        assert plain is not None
        ratio = entry["saved_bytes"] / plain["saved_bytes"]
        saved = [_mib(plain, "saved_bytes"), "", _mib(entry, "saved_bytes")]
        peaks = [_mib(plain, "peak_bytes"), "", _mib(entry, "peak_bytes")]
        words = f"{BITS[entry['config']]} bits, on producers"
        rows.append([words, f"{entry['size']} px", *saved, f"{ratio:.3f}x", "", *peaks])
    title = "RetinaNet-R50, batch 1: kept for the backward pass"
    return tables.Table(title, columns, rows, frozenset(missed))


def step_table(result: dict[str, Any]) -> tables.Table:
    """What it costs in time."""
    found = result["step"]
    ratio = found["ratio"]
    columns = ["what", "in float", 'save="codes"', "codes ÷ float", "p20 to p80", "goal"]
    ms = [f"{found['cpu_ms'][variant]['median']:,.0f} ms" for variant in KEPT.values()]
    row = [f"step, {found['size']} px, 4 bits, {found['threads']} thread(s), CPU time", *ms]
    row += [f"{ratio['median']:.3f}x", f"{ratio['p20']:.3f} to {ratio['p80']:.3f}"]
    row += [f"{STEP_GOAL:.2f}x"]
    missed = {(0, 3)} if ratio["median"] > STEP_GOAL else set()
    return tables.Table("What it costs in time", columns, [row], frozenset(missed))


def _block(result: dict[str, Any]) -> str:
    made = [saved_table(result), step_table(result)]
    source = f"From `benchmarks/results/{RESULT.name}` (`python benchmarks/bench_saved.py`):"
    return "\n".join([source, tables.head(result), "", *(tables.markdown(t) for t in made)])


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small model, two rounds")
    parser.add_argument("--output", metavar="PATH", type=Path, help="the result file to write")
    parser.add_argument("--write", action="store_true", help="measure nothing, write the document")
    args = parser.parse_args(argv)
    path = args.output or (PARTIAL_RESULT if args.quick else RESULT)
    if args.write:
        result = json.loads(path.read_text(encoding="utf-8"))
        write_block(DOCUMENT, "bench_saved", _block(result))
        return 0
    effort = QUICK if args.quick else FULL
    with progress(effort.work) as said:
        result = {
            "machine": machine.describe() | {"clock": "cpu"},
            "settings": dataclasses.asdict(effort),
            "saved": count(effort, said),
            "step": time_steps(effort, said),
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    tables.show(saved_table(result))
    tables.show(step_table(result))
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
