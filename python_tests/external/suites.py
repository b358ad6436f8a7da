"""Where the test suites of others lie; nothing of theirs is here."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest


def suite(variable: str, file: str) -> ModuleType:
    """A module of tests in a checkout that an environment variable names; skips without one.

    Args:
        variable (str): the environment variable.
        file (str): the module, below the checkout.
    """
    root = os.environ.get(variable)
    if not root:
        pytest.skip(f"{variable}: names no checkout", allow_module_level=True)
    path = Path(root, file)
    if not path.is_file():
        pytest.fail(f"{variable}: {path} is missing")
    name = f"external_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))  # its own helpers lie beside it
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module
