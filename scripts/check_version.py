"""Check that a version can be released: one number everywhere, and an entry in CHANGELOG.md.

    python scripts/check_version.py [FILE of dist/]...

The version is that of hqod_ops/_version.py, and no other file has one of its own but CITATION.cff,
which must agree, as must the names of the files.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def problems(root: Path, files: Sequence[str] = ()) -> list[str]:
    """What stands in the way of a release, a line each."""
    found = []

    def text(name: str) -> str:
        return (root / name).read_text(encoding="utf-8")

    (version,) = re.findall(r'^__version__ = "(.+)"$', text("hqod_ops/_version.py"), re.MULTILINE)
    if re.search(r"^version\s*=\s*[\"']", text("pyproject.toml"), re.MULTILINE):
        found.append("pyproject.toml: has a version of its own; expected dynamic")
    cited = re.findall(r"^version: (.+)$", text("CITATION.cff"), re.MULTILINE)
    if cited != [version]:
        found.append(f"CITATION.cff: expected version {version}, got {', '.join(cited) or 'none'}")
    entry = rf"^## \[{re.escape(version)}\] - \d{{4}}-\d{{2}}-\d{{2}}$"
    if not re.search(entry, text("CHANGELOG.md"), re.MULTILINE):
        found.append(f"CHANGELOG.md: expected an entry '## [{version}] - YYYY-MM-DD'")
    for file in files:
        if not Path(file).name.startswith(f"hqod_ops-{version}"):
            found.append(f"{file}: expected a file of version {version}")
    return found


if __name__ == "__main__":
    lines = problems(ROOT, sys.argv[1:])
    print("\n".join(lines), file=sys.stderr)
    sys.exit(bool(lines))
