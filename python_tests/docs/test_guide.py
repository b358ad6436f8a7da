"""The examples of README.md and docs/ run and print what the text says; links lead somewhere."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NEEDS = {
    "README": ("torchvision", "onnx", "onnxruntime", "onnxscript"),
    "quantize": ("torchvision", "ultralytics", "onnx", "onnxruntime", "onnxscript"),
    "your_script": ("torchvision", "ultralytics", "transformers", "scipy"),
    "data": ("torchvision", "pycocotools", "sklearn"),
    "low_bits": (
        "torchvision",
        "pycocotools",
        "sklearn",
        "msgspec",
        "rich",
        "onnx",
        "onnxruntime",
        "onnxscript",
    ),
    "questions": ("torchvision",),
}
"""What the examples of a page need beyond the core."""
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#]+)")


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=pytest.mark.require(*NEEDS.get(page.stem, ())))
        for page in PAGES
        if page.parent.name != "api"
    ],
)
def test_examples(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run in order, in one namespace; a text block after one is its output."""
    monkeypatch.chdir(tmp_path)  # for files that examples write
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, object] = {"__name__": "__main__"}
    for match in BLOCK.finditer(text):
        code, expected = match.groups()
        line = text.count("\n", 0, match.start()) + 1
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * line + code, str(page), "exec"), namespace)
        if expected is not None:
            assert printed.getvalue() == expected, f"{page.name}:{line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links(page: Path) -> None:
    """Links to files of the repository lead somewhere."""
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    paths = [page.parent / target for target in targets if "://" not in target]
    assert [path for path in paths if not path.exists()] == []


def rows(page: Path) -> dict[str, list[str]]:
    """The rows of a page's tables, by their first cell."""
    lines = re.findall(r"^\| (.+) \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    split = ([cell.strip() for cell in line.split("|")] for line in lines)
    return {cells[0]: cells[1:] for cells in split}


def test_numbers_of_the_readme_are_those_of_the_benchmarks() -> None:
    """README repeats some cells of the tables in docs/benchmarks.md."""
    whole = rows(ROOT / "docs" / "benchmarks.md")
    shown = {name: cells for name, cells in rows(PAGES[0]).items() if re.search(r"\d", cells[0])}
    assert shown
    for name, cells in shown.items():
        for cell in cells:
            assert any(
                full.startswith(re.sub(" (bytes|tensors).*", "", cell)) for full in whole[name]
            ), name


@pytest.mark.require("torchvision", "pycocotools", "sklearn", "matplotlib")
@pytest.mark.parametrize("module", ["", ".quant", ".quant.tuning", ".integrations", ".detection"])
def test_every_public_name_is_in_the_api(module: str) -> None:
    text = "".join(
        page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md")
    )
    names = set(importlib.import_module(f"hqod_ops{module}").__all__) - {"__version__"}
    assert names <= set(re.findall(r"^\.\. \w+:: (?:[\w.]+\.)?(\w+)$", text, re.MULTILINE))
