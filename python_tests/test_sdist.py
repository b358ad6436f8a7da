"""The source distribution holds what its build reads."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_manifest_names_what_cmake_reads() -> None:
    """Every top-level directory of a path in CMakeLists.txt, or in a file it includes."""
    manifest = (ROOT / "MANIFEST.in").read_text(encoding="utf-8")
    grafted = set(re.findall(r"^graft (\S+)", manifest, re.MULTILINE))
    files = [ROOT / "CMakeLists.txt", *sorted((ROOT / "cmake").glob("*.cmake"))]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    read = {
        name
        for name in re.findall(r"(?<![\w./}-])(\w+)/\w", text)
        if (ROOT / name).is_dir() and name != "hqod_ops"
    }
    assert {"cmake", "csrc"} <= read <= grafted
