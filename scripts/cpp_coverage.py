"""List the lines of a folder that no test reached, from gcov's counters.

    python scripts/cpp_coverage.py BUILD FOLDER

A header is compiled into many objects, once for each instruction set and loss: a line counts as
reached if it was in one of them. Lines that the optimizer joined with others have no counter.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path


def counts(build: Path, folder: Path) -> dict[Path, dict[int, int]]:
    """How often each line ran, by file and number, over all objects."""
    found: dict[Path, dict[int, int]] = defaultdict(dict)
    for counters in sorted(build.rglob("*.gcda")):
        command = ["gcov", "--json-format", "--stdout", str(counters)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for line in text.splitlines():  # one document an object
            for file in json.loads(line)["files"]:
                path = Path(file["file"]).resolve()
                if folder not in path.parents:
                    continue
                for row in file["lines"]:
                    number = row["line_number"]
                    found[path][number] = found[path].get(number, 0) + row["count"]
    return found


def main(build: str, folder: str) -> int:
    inside = Path(folder).resolve()
    found = counts(Path(build), inside)
    if not found:
        print(f"{build}: no counters of {folder}; was it built with --coverage?", file=sys.stderr)
        return 1
    for path, lines in sorted(found.items()):
        missed = sorted(number for number, count in lines.items() if not count)
        share = 1 - len(missed) / len(lines)
        print(f"{path.relative_to(inside.parent)}: {share:.1%} of {len(lines)} lines")
        source = path.read_text(encoding="utf-8").splitlines()
        for number in missed:
            print(f"  {number:4}: {source[number - 1].strip()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
