"""The optional packages of the export, imported when they are first used."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str) -> Any:
    """Import an optional module, or say what to install.

    Args:
        module (str): dotted name of the module, such as ``"onnx.helper"``.

    Returns:
        module: the imported module.

    Raises:
        ImportError: it is not installed; the message names the extra that brings it.

    Example:
        >>> from hqod_ops.quant.export._extras import require
        >>> require("json").loads("[1]")
        [1]
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise ImportError(f'{name} is needed here ({error}): pip install "hqod_ops[export]"') from (
            error
        )
