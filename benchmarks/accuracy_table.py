#!/usr/bin/env python
"""What detectors in few bits reach, beside their goals: ``--write`` puts it in docs/accuracy.md.

    python benchmarks/accuracy_table.py --write

The numbers are those of ``benchmarks/results/accuracy``; this measures nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Last, so that an installed hqod_ops goes before the one in the tree.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench.documents import write_block

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "accuracy"
DOCUMENT = ROOT / "docs" / "accuracy.md"

FASTESTDET = (
    ("W8A8", "W8A8 calibrated", 15.2),
    ("W4A8", "W4A8 learned, corrected", 14.0),
    ("W4A4", "W4A4 learned, corrected", 9.0),
    ("W4A4 distilled", "W4A4 distilled", 13.0),
    ("bits searched, at most 4.5 of a weight, A8", "search W4.5A8", 14.5),
)
"""What is asked for, the row that answers, and the least AP in percent."""

MOST_DROP, MOST_SHIFT, MOST_F1 = 3.0, 0.01, 0.5
"""AP50 points below float; mean shift of the scores; points of F1."""

Row = dict[str, Any]


def load(name: str) -> dict[str, Any]:
    """A result file."""
    content: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return content


def _met(reached: bool) -> str:
    return "yes" if reached else "**no**"


def fastestdet(result: dict[str, Any]) -> list[str]:
    """AP of FastestDet beside the goals."""
    found = {row["row"]: row for row in result["rows"]}
    lines = [
        "| FastestDet on 252 COCO val images | AP | goal | reached |",
        "| --- | ---: | ---: | --- |",
        f"| float | {found['float']['AP']:.1f} | | |",
    ]
    for text, row, goal in FASTESTDET:
        value = found[row]["AP"]
        lines.append(f"| {text} | {value:.1f} | {goal:.1f} | {_met(value >= goal)} |")
    return lines


def neu_det(rows: Sequence[Row]) -> list[str]:
    """AP50 of the demonstration's ATSS in 2 bits beside its own float model."""
    lines = [
        "| ATSS on NEU-DET | float AP50 | W2A2 AP50 | difference | goal | reached | "
        "float, trained on |",
        "| --- | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    seeds = sorted({row["seed"] for row in rows})
    found = {(row["row"], row["seed"]): row["AP50"] for row in rows}
    names = ("float", "W2A2", "float trained on")
    values = [tuple(found.get((name, seed)) for name in names) for seed in seeds]
    means = [
        None if None in column else statistics.fmean(column) for column in zip(*values, strict=True)
    ]
    for name, (whole, low, more) in zip(
        [*(f"seed {seed}" for seed in seeds), "mean"], [*values, means], strict=True
    ):
        drop = round(low - whole, 2)
        lines.append(
            f"| {name} | {whole:.1f} | {low:.1f} | {drop:+.1f} | -{MOST_DROP:.1f} | "
            f"{_met(drop >= -MOST_DROP)} | {'' if more is None else format(more, '.1f')} |"
        )
    return lines


def scores(rows: Sequence[tuple[str, Row, float]]) -> list[str]:
    """Shift of the scores and F1 beside the goals; the last entry is the float model's F1."""
    lines = [
        "| calibrate_scores | score shift | goal | F1 | float F1 | goal | reached |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, row, whole in rows:
        shift, f1 = row["score_shift"], row["f1"]
        reached = abs(shift) <= MOST_SHIFT and round(abs(f1 - whole), 2) <= MOST_F1
        lines.append(
            f"| {name} | {shift:+.3f} | ±{MOST_SHIFT} | {f1:.1f} | {whole:.1f} | ±{MOST_F1} | "
            f"{_met(reached)} |"
        )
    return lines


def _source(name: str, script: str, result: dict[str, Any]) -> str:
    m = result["machine"]
    return (
        f"From `benchmarks/results/accuracy/{name}` (`python benchmarks/accuracy/{script}`): "
        f"{m['device']}, one thread, torch {m['torch']}, hqod_ops {m['hqod_ops']} "
        f"({m['backend']}, {m['isa']}) at {m['commit']}, {m['date'][:10]}"
    )


def text() -> str:
    """The tables of all result files, each with its machine and commit."""
    coco, again = load("fastestdet.json"), load("fastestdet-scores.json")
    steel = load("neu_det.json")
    compared = [
        (f"FastestDet {row['row'].partition(' ')[0]}, {when}", row, row["float_f1"])
        for row in again["rows"]
        for when in [("after" if "scores calibrated" in row["row"] else "before")]
    ]
    floats = {row["seed"]: row["f1"] for row in steel["rows"] if row["row"] == "float"}
    compared += [
        (
            f"ATSS W2A2, seed {row['seed']}, {'before' if row['row'] == 'W2A2' else 'after'}",
            row,
            floats[row["seed"]],
        )
        for row in steel["rows"]
        if row["row"].startswith("W2A2")
    ]
    parts = [
        _source("fastestdet.json", "fastestdet.py", coco),
        "\n".join(fastestdet(coco)),
        _source("neu_det.json", "neu_det.py", steel),
        "\n".join(neu_det(steel["rows"])),
        _source("fastestdet-scores.json", "fastestdet.py --rows scores", again),
        "\n".join(scores(compared)),
    ]
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/accuracy.md")
    if parser.parse_args(argv).write:
        write_block(DOCUMENT, "accuracy_table", text())
    else:
        print(text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
