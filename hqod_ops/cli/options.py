"""Values of options."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def bits_or_float(text: str) -> int | str:
    try:
        return text if text == "float" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'expected a number or "float", got {text!r}') from None
