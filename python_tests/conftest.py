"""What a test needs beyond the core, and the state that every test finds.

``@pytest.mark.require("ext", "torchvision", ...)`` names what a test needs: ``ext`` (the native
ops), ``cuda`` (a GPU) or an importable module. Where it is missing the test is deselected and the
head of the report says so; where ``HQOD_REQUIRE=ext,torchvision`` names it, that is an error.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

import hqod_ops

hypothesis.settings.register_profile(
    "hqod", derandomize=True, deadline=None, max_examples=60, database=None
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "hqod"))


def available(name: str) -> bool:
    """Whether what a test asks for with ``require`` is here."""
    if name == "ext":
        # Without a library and without a wish for the reference, the tests must fail, not vanish.
        return os.environ.get("HQOD_BACKEND", "native") != "reference"
    if name == "cuda":
        return torch.cuda.is_available()
    return importlib.util.find_spec(name) is not None


def _required() -> list[str]:
    names = os.environ.get("HQOD_REQUIRE", "").split(",")
    return [name.strip() for name in names if name.strip()]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "require(*names): deselect the test where one is missing")
    config.addinivalue_line("markers", "numeric: compares numbers; repeated under every CPU ISA")
    missing = [name for name in _required() if not available(name)]
    if missing:
        raise pytest.UsageError(f"HQOD_REQUIRE: {', '.join(missing)} must be here, but is missing")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    names = {n for item in items for mark in item.iter_markers("require") for n in mark.args}
    missing = {name for name in names if not available(name)}
    dropped = [
        item
        for item in items
        if any(missing & set(mark.args) for mark in item.iter_markers("require"))
    ]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in set(dropped)]
        config.stash[_MISSING] = sorted(missing)


_MISSING = pytest.StashKey[list[str]]()


def pytest_report_header() -> list[str]:
    return [f"{name}: {value}" for name, value in hqod_ops.build_info().items()]


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    missing = config.stash.get(_MISSING, [])
    return [f"deselected for want of: {', '.join(missing)}"] if missing else []


@pytest.fixture(autouse=True)
def clean_state() -> Iterator[None]:
    """The same seed for every test, and one thread: test_autograd.py compares it with several.

    The inputs are small, and threads that wait for one another make a busy machine crawl.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    hqod_ops.debug(False)
