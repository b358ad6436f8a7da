"""What stands in the way of a release is said."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "check_version.py"


def problems(*arguments: object) -> list[str]:
    spec = importlib.util.spec_from_file_location("check_version", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: list[str] = module.problems(*arguments)
    return found


@pytest.fixture
def ready(tmp_path: Path) -> Path:
    (tmp_path / "hqod_ops").mkdir()
    for name, text in {
        "hqod_ops/_version.py": '__version__ = "1.2.3"\n',
        "pyproject.toml": 'dynamic = ["version"]\nversion = { attr = "x" }\n',
        "CITATION.cff": "cff-version: 1.2.0\nversion: 1.2.3\n",
        "CHANGELOG.md": "## [Unreleased]\n\n## [1.2.3] - 2030-01-02\n",
    }.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_nothing_missing(ready: Path) -> None:
    assert problems(ready, ["dist/hqod_ops-1.2.3.tar.gz"]) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pyproject.toml", 'version = "1.2.3"\n'),
        ("CITATION.cff", "version: 1.2.2\n"),
        ("CHANGELOG.md", "## [Unreleased]\n"),
    ],
)
def test_what_is_missing(ready: Path, name: str, text: str) -> None:
    (ready / name).write_text(text)
    (found,) = problems(ready)
    assert found.startswith(f"{name}: ")


def test_a_file_of_another_version(ready: Path) -> None:
    assert len(problems(ready, ["dist/hqod_ops-1.2.2.tar.gz"])) == 1
