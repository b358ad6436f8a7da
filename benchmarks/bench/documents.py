"""Tables in documents: a script writes its own, between two comments that name it."""

from __future__ import annotations

from pathlib import Path


def _ends(name: str) -> tuple[str, str]:
    return f"<!-- {name}.py --write: begin -->\n", f"<!-- {name}.py --write: end -->\n"


def read_block(document: Path, name: str) -> str:
    """What stands in a document between the comments of a script.

    Raises:
        ValueError: there are none.
    """
    before, begun, rest = document.read_text(encoding="utf-8").partition(_ends(name)[0])
    text, ended, _ = rest.partition(_ends(name)[1])
    if not begun or not ended:
        raise ValueError(f"{document.name}: expected the comments of {name}.py --write")
    return text


def write_block(document: Path, name: str, text: str) -> None:
    """Replace it.

    Raises:
        ValueError: there is none.
    """
    old, (begin, end) = read_block(document, name), _ends(name)
    whole = document.read_text(encoding="utf-8")
    document.write_text(
        whole.replace(begin + old + end, f"{begin}{text.strip()}\n{end}"), encoding="utf-8"
    )
