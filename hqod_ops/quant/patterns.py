"""Layers by name: one pattern or several."""

from __future__ import annotations

from collections.abc import Sequence

Patterns = str | Sequence[str]
"""A full name of a layer or a glob, where ``*`` also crosses dots; or several of them."""


def as_tuple(patterns: Patterns) -> tuple[str, ...]:
    """One pattern or several, as a tuple."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)
