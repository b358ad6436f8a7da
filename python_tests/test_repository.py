"""What stands in more than one file of the repository is the same everywhere."""

from __future__ import annotations

import re
from pathlib import Path

import hqod_ops

ROOT = Path(__file__).parents[1]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_linters_of_commits_are_those_of_make_lint() -> None:
    pinned = set(re.findall(r'"([\w-]+==[\d.]+)"', read("pyproject.toml")))
    hooks = re.findall(r'\["([\w-]+==[\d.]+)"\]', read(".pre-commit-config.yaml"))
    assert len(hooks) == 3 and set(hooks) <= pinned


def test_version_to_cite() -> None:
    cited = re.search(r"^version: (\S+)$", read("CITATION.cff"), re.MULTILINE)
    assert cited is not None and cited[1] == hqod_ops.__version__
