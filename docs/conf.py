"""Sphinx: the pages of docs/, and the API from docstrings. ``make docs`` builds them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]

project = "hqod_ops"
author = "The authors of hqod_ops"
copyright = author
_text = (ROOT / "hqod_ops" / "_version.py").read_text(encoding="utf-8")
version = release = _text.split('"')[-2]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # a page that is part of another may begin at any level

highlight_language = "none"  # of blocks that name none, such as trees of files

html_theme = "furo"
html_title = f"hqod_ops {release}"
html_static_path = ["_static"]
html_css_files = ["hqod.css"]
html_math_renderer = "mathml"
html_show_sphinx = False
html_show_sourcelink = False
html_copy_source = False

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say types, with shapes
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Gradient", "notes_style"), ("Source", "notes_style")]

# Every reference to a name of ours leads somewhere (nitpicky); a type such as "Tensor[N, 4]", "None
# or tuple" is prose, and other projects' names have no pages here.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!hqod_ops\b).*")]

_OUTSIDE = {
    "../README.md": "index.md",
    "../CONTRIBUTING.md": "contributing.md",
    "../benchmarks/README.md": "measuring.md",
    "../recipes/README.md": "recipes.md",
}
_LINK = re.compile(rf"(?<=\]\()({'|'.join(map(re.escape, _OUTSIDE))})(?=[#)])")


def _inside(app: Sphinx, name: str, source: list[str]) -> None:
    """Links to pages elsewhere in the repository lead to the pages that hold their text here."""
    source[0] = _LINK.sub(lambda match: _OUTSIDE[match.group()], source[0])


def _inline(self: Any, node: nodes.math) -> None:
    self.body.append(latex2mathml.tex2mathml(node.astext()))
    raise nodes.SkipNode


def _display(self: Any, node: nodes.math_block) -> None:
    self.body.append(f'<div class="math">{latex2mathml.tex2mathml(node.astext(), True)}</div>\n')
    raise nodes.SkipNode


_TWO = re.compile(r"^(\s+\w+(?:, \w+)*) (\(.+\)),\s+(\w+) \2(?=[,:])", re.MULTILINE)


def _together(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Write "a (int), b (int): ..." as "a, b (int): ...", which is what napoleon reads."""
    text, count = "\n".join(lines), 1
    while count:
        text, count = _TWO.subn(r"\1, \3 \2", text)
    lines[:] = text.split("\n")


def setup(app: Sphinx) -> None:
    """Formulas as MathML, which browsers draw: no script, and nothing is fetched by a reader."""
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
    app.connect("source-read", _inside)
    app.connect("autodoc-process-docstring", _together, priority=100)  # before napoleon
