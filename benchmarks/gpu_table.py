#!/usr/bin/env python
"""What a GPU's results say in one table, for docs/benchmarks.md: ``--write`` puts it there.

python benchmarks/bench_ops.py --device cuda          # measures
python benchmarks/gpu_table.py                        # prints
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

# Last, so that an installed hqod_ops goes before the one in the tree.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import tables
from bench.documents import write_block

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "benchmarks.md"
FILES = ("nvidia-h200-losses.json", "nvidia-h200.json")


def _ratio(block: dict[str, Any] | None, peer: str) -> str:
    found = block["ratio"].get(peer) if block else None
    return f"{found['median']:.1f}x" if found else ""


def _time(block: dict[str, Any] | None) -> str:
    if block is None:
        return ""
    text = f"{block['us']['ours']['median']:.1f} µs"
    fraction = block.get("copy_fraction")
    return f"{text} ({fraction['median']:.2f})" if fraction else text


def table(result: dict[str, Any]) -> tables.Table:
    """The GPU's work for F, B and both of an entry, and both as a training script calls them."""
    found: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for block in result["blocks"]:
        found.setdefault(block["name"], {})[block["phase"], block["timing"]] = block
    columns = ["op", "forward", "backward", "both: eager ÷ ours", "compile ÷ ours"]
    columns += ["as called: eager ÷ ours", "compile ÷ ours", "torch's own ÷ ours"]
    rows = []
    for name, blocks in found.items():
        graph, stream = blocks.get(("FB", "graph")), blocks.get(("FB", "stream"))
        row = [name, _time(blocks.get(("F", "graph"))), _time(blocks.get(("B", "graph")))]
        row += [_ratio(graph, "eager"), _ratio(graph, "compile")]
        row += [_ratio(stream, peer) for peer in ("eager", "compile", "torch")]
        rows.append(row)
    return tables.Table("Work of the GPU, and forward + backward against others", columns, rows)


def text() -> str:
    """The tables of all result files, each with its machine and commit."""
    parts = []
    for name in FILES:
        result = json.loads((RESULTS / name).read_text(encoding="utf-8"))
        parts.append(f"From `benchmarks/results/{name}`: {tables.head(result)}")
        parts.append(tables.markdown(table(result)).strip())
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--write", action="store_true", help="put the tables into docs/benchmarks.md"
    )
    if parser.parse_args(argv).write:
        write_block(DOCUMENT, "gpu_table", text())
    else:
        print(text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
