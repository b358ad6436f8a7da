#!/usr/bin/env python
"""Speed and memory of the ops, beside eager PyTorch, torch.compile and torch's own ops.

    python benchmarks/bench_ops.py                        # everything, some twenty minutes
    python benchmarks/bench_ops.py --quick                # a few entries, under a minute
    python benchmarks/bench_ops.py --filter 'hqod_loss.*FB' --threads 1
    python benchmarks/bench_ops.py --compare benchmarks/results/OLD.json
    python benchmarks/bench_ops.py --device cuda          # the same on a GPU

What the columns mean: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Last, so that an installed hqod_ops goes before the one in the tree.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from bench import gpu, machine, tables
from bench.compare import SAME, differences, key, regressions
from bench.entry import Entry
from bench.measure import FULL, QUICK, DisagreementError, measure
from bench.progress import progress
from bench.registry import all_entries

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PARTIAL_RESULTS = ROOT / "runs" / "bench"
"""Where --quick, --filter, --no-compile and --cpu-time write, which do not tell the whole story."""


class UpdateError(RuntimeError):
    """The earlier result says nothing of this device and code."""


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="See benchmarks/README.md."
    )
    parser.add_argument(
        "--filter", metavar="REGEX", type=_regex, help="entries to run, such as 'hqod_loss.*FB'"
    )
    parser.add_argument("--quick", action="store_true", help="a few entries and rounds")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--list", action="store_true", help="print the entries and end")
    parser.add_argument(
        "--threads", metavar="N", type=_count, nargs="+", help="default: 1 2, with --quick 1"
    )
    parser.add_argument(
        "--warm-malloc", action="store_true", help="let the allocator keep its memory"
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count CPU time, of one thread, not the clock's: for a machine that is busy",
    )
    parser.add_argument(
        "--seconds",
        metavar="S",
        type=float,
        help="on a GPU: time for a timing, in 5 to 21 rounds of 1 ms; default: 0.8, in 7 to 51",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--compare", metavar="OLD.json", type=_result, help="show what got slower")
    parser.add_argument("--output", metavar="PATH", type=Path, help="the result file to write")
    parser.add_argument(
        "--update",
        action="store_true",
        help="keep what the result file holds besides, if it is of the same device and code",
    )
    parser.add_argument(
        "--markdown",
        metavar="RESULT.json",
        nargs="?",
        const=True,
        type=_result,
        help="print Markdown; with a result file, its tables alone, and measure nothing",
    )
    args = parser.parse_args(argv)
    if args.device == "cuda":
        if args.threads is not None or args.warm_malloc or args.cpu_time:
            parser.error("--device cuda: --threads, --warm-malloc and --cpu-time are of the CPU")
        if not torch.cuda.is_available():
            parser.error("--device cuda: torch finds no CUDA device")
    if args.seconds is not None and not (args.device == "cuda" and 0 < args.seconds < 3600):
        parser.error("--seconds: expected --device cuda and more than 0, less than 3600")
    if args.threads is None:
        args.threads = [1] if args.quick or args.cpu_time else [1, 2]
    if args.cpu_time and args.threads != [1]:
        parser.error("--cpu-time: expected --threads 1: it counts one thread")
    return args


def _regex(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {count}")
    return count


def _result(text: str) -> dict[str, Any]:
    try:
        result = json.loads(Path(text).read_text(encoding="utf-8"))
        assert isinstance(result["machine"], dict) and isinstance(result["blocks"], list)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AssertionError):
        raise argparse.ArgumentTypeError(f"{text}: not a result of this program") from None
    return result


def _selected(args: argparse.Namespace) -> list[tuple[Entry, list[str]]]:
    chosen = []
    for entry in all_entries(args.device):
        phases = [
            phase
            for phase in entry.phases
            if args.filter is None or args.filter.search(f"{entry.name} {phase}")
        ]
        if phases and (entry.quick or not args.quick):
            chosen.append((entry, phases))
    return chosen


def _machine(args: argparse.Namespace) -> dict[str, object]:
    if args.device == "cuda":
        return machine.describe("cuda")
    return {**machine.describe(), "clock": "cpu" if args.cpu_time else "wall"}


def run(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Measure what the arguments select, on the CPU: the blocks of each entry."""
    selected = _selected(args)
    effort = QUICK if args.quick else FULL
    clock = time.thread_time_ns if args.cpu_time else time.perf_counter_ns
    total = sum(len(phases) for _, phases in selected) * len(args.threads)
    with progress(total) as step:
        for entry, phases in selected:
            inputs, blocks = entry.setup(), []
            for phase in phases:
                for count in args.threads:
                    step(f"{entry.name} {phase}, {count} thread{'s' * (count > 1)}")
                    block = measure(
                        entry,
                        phase,
                        inputs,
                        count,
                        effort,
                        clock,
                        with_compile=not args.no_compile,
                        with_memory=count == args.threads[0],
                    )
                    blocks.append(block)
            yield blocks


def run_on_gpu(args: argparse.Namespace, device: gpu.Gpu) -> Iterator[list[dict[str, Any]]]:
    """Measure what the arguments select, on a GPU: the blocks of each entry."""
    selected = _selected(args)
    effort = gpu.QUICK if args.quick else gpu.FULL
    if args.seconds is not None:
        effort = gpu.Effort(min_rounds=5, max_rounds=21, seconds=args.seconds, turn=1e-3)
    with progress(sum(len(phases) for _, phases in selected)) as step:
        for entry, phases in selected:
            sets = gpu.copies(entry.setup(), device.device, device.cache_bytes)
            made, blocks = None, []
            if entry.compiled is not None and not args.no_compile and phases != ["F"]:
                with device.working():
                    made = gpu.compiled(entry.compiled, sets[0])
            for phase in phases:
                step(f"{entry.name} {phase}")
                blocks += gpu.measure(entry, phase, sets, device, effort, made)
            yield blocks


def _earlier(path: Path, now: dict[str, Any]) -> list[dict[str, Any]]:
    """The blocks of an earlier result of the same device and code.

    Raises:
        UpdateError: it was measured under other conditions.
    """
    if not path.exists():
        return []
    old = json.loads(path.read_text(encoding="utf-8"))
    apart = differences(old, {"machine": now}, (*SAME, "commit"))
    if apart:
        raise UpdateError(f"--update: {path} was measured under other conditions: {apart[0]}")
    blocks: list[dict[str, Any]] = old["blocks"]
    return blocks


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _show(result: dict[str, Any], as_markdown: bool) -> None:
    print(tables.head(result), end="\n\n")
    left_out = [block["left_out"]["compile"] for block in result["blocks"] if "left_out" in block]
    for reason in sorted(set(left_out)):
        print(f"torch.compile is left out where it failed: {reason}", end="\n\n")
    for table in tables.tables(result):
        if as_markdown:
            print(tables.markdown(table))
        else:
            tables.show(table)


def _compare(old: dict[str, Any], new: dict[str, Any], as_markdown: bool) -> int:
    for line in differences(old, new):
        print(f"Measured under other conditions: {line}")
    found = regressions(old, new)
    if not found:
        print("No ratio fell by more than 5 %.")
        return 0
    table = tables.comparison(found)
    if as_markdown:
        print(tables.markdown(table))
    else:
        tables.show(table)
    return int(any(entry["clear"] for entry in found))


def main(argv: list[str] | None = None) -> int:
    """The exit status: 1 where ``--compare`` found a clear regression, 2 for bad arguments."""
    args = _arguments(argv)
    if isinstance(args.markdown, dict):
        _show(args.markdown, as_markdown=True)
        return 0
    if args.list:
        for entry, phases in _selected(args):
            print(entry.name, *phases)
        return 0
    if args.warm_malloc:
        machine.restart_keeping_memory()
    if not _selected(args):
        print("error: no entry fits --filter; see --list for their names", file=sys.stderr)
        return 2
    described = _machine(args)
    partial = args.quick or args.filter or args.no_compile or args.cpu_time or args.seconds
    folder = PARTIAL_RESULTS if partial else RESULTS
    path = args.output or folder / machine.file_name(described)
    result: dict[str, Any] = {"machine": described, "blocks": []}
    try:
        earlier = _earlier(path, described) if args.update else []
        blocks: list[dict[str, Any]] = []
        for found in run_on_gpu(args, gpu.Gpu()) if args.device == "cuda" else run(args):
            blocks += found
            measured = {key(block) for block in blocks}
            result["blocks"] = [b for b in earlier if key(b) not in measured] + blocks
            _write(path, result)  # each time, so that what was measured stays
    except (UpdateError, DisagreementError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _show(result, as_markdown=args.markdown is not None)
    print(f"written: {path}")
    return 0 if args.compare is None else _compare(args.compare, result, args.markdown is not None)


if __name__ == "__main__":
    sys.exit(main())
