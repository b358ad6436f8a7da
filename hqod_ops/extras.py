"""Optional packages, imported when they are first used."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def requirer(extra: str) -> Callable[..., Any]:
    """The function by which a part of the package imports what an extra brings.

    Args:
        extra (str): the extra's name, such as ``"detection"``.

    Returns:
        callable: ``require(module, package=None)`` imports a module by its dotted name; package is
        the name that people know it by, if it is not the first part of that. It raises ImportError,
        naming the extra, where the module is not installed.

    Example:
        >>> from hqod_ops.extras import requirer
        >>> requirer("detection")("json").loads("[1]")
        [1]
    """

    def require(module: str, package: str | None = None) -> Any:
        try:
            return importlib.import_module(module)
        except ImportError as error:
            name = package or module.partition(".")[0]
            raise ImportError(
                f'{name} is needed here ({error}): pip install "hqod_ops[{extra}]"'
            ) from error

    return require
