#!/usr/bin/env python3
"""What adding something to the package took: its own files, and where shared ones name it.

    python scripts/cost_of_adding.py generalized_box_iou

The name is met in any spelling: generalized_box_iou_loss, GeneralizedBoxIoULoss. Only what git
tracks counts, results of benchmarks aside. A shared list counts as one row, however many lines the
row has; the lines are printed, so that a second row shows.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

LISTS = (
    "csrc/kernels/loss_list.h",
    "csrc/library.cpp",
    "hqod_ops/__init__.py",
    "hqod_ops/_register/losses.py",
    "hqod_ops/testing/cases.py",
    "hqod_ops/testing/quantizers.py",
    "hqod_ops/quant/adapters.py",
    "hqod_ops/quant/observers/registry.py",
    "hqod_ops/quant/quantizers/registry.py",
)
"""The lists that CONTRIBUTING.md names."""


def _plain(text: str) -> str:
    return text.replace("_", "").lower()


def lines_naming(path: Path, name: str) -> list[int]:
    """The numbers of the lines with a word that contains the name."""
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError:  # an image
        return []
    return [
        number
        for number, line in enumerate(lines, start=1)
        if any(_plain(name) in _plain(word) for word in re.findall(r"\w+", line))
    ]


def main(arguments: list[str] | None = None) -> None:
    """Print the files of its own, the shared lists, and whatever else names it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="the stem of its files, such as generalized_box_iou")
    name = parser.parse_args(arguments).name
    command = ["git", "ls-files", "--", ".", ":!benchmarks/results", ":!scripts/cost_of_adding.py"]
    tracked = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    found: dict[str, list[str]] = {"files of its own": [], "shared lists": [], "named in": []}
    for path in tracked.stdout.splitlines():
        lines = lines_naming(ROOT / path, name)
        if _plain(name) in _plain(Path(path).stem):
            found["files of its own"].append(path)
        elif lines:
            numbers = ", ".join(map(str, lines))
            kind = "shared lists" if path in LISTS else "named in"
            found[kind].append(f"{path}: {numbers}")
    for kind, paths in found.items():
        print(f"{kind}: {len(paths)}", *paths, sep="\n  ")


if __name__ == "__main__":
    main()
