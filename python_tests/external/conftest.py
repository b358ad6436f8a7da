"""The marks of torchvision's tests, which its own conftest.py makes known."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    for mark in ("needs_cuda", "needs_mps", "dont_collect", "opcheck_only_one"):
        config.addinivalue_line("markers", f"{mark}: of torchvision's tests")
