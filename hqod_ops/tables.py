"""Plain-text tables."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()
) -> str:
    """A table with aligned columns.

    Args:
        head (sequence of str): titles of the columns.
        rows (sequence of sequence of str): one cell a column.
        right (sequence of str): titles of the columns that are aligned to the right. Default: none

    Example:
        >>> print(text_table(["name", "bits"], [["stem", "8"], ["head.conv", "4"]], right=["bits"]))
        name       bits
        ---------  ----
        stem          8
        head.conv     4
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if title in right else cell.ljust(width)
            for title, cell, width in zip(head, cells, widths, strict=True)
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(head), "  ".join("-" * width for width in widths), *map(line, rows)])


def bits_text(bits: int) -> str:
    """A number of bits, or "float" for 32.

    Example:
        >>> bits_text(4), bits_text(32)
        ('4', 'float')
    """
    return "float" if bits == 32 else str(bits)
