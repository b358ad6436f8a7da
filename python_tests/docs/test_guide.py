"""The examples of README.md and docs/ run and print what the text says; links lead somewhere."""

from __future__ import annotations

import contextlib
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
