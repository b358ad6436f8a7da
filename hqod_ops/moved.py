"""Modules under the names that they had in 0.1."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def moved(module: str, *homes: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module whose names are elsewhere now.

    Args:
        module (str): its name, for the error.
        *homes (str): the modules to look into, which are imported when a name is asked for.

    Example:
        >>> moved("old", "hqod_ops.reference", "math")("sqrt")(4.0)
        2.0
    """

    def find(name: str) -> Any:
        for home in homes:
            found = importlib.import_module(home)
            if not name.startswith("_") and hasattr(found, name):
                return getattr(found, name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return find
