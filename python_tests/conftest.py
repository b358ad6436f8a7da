"""What a test needs beyond the core, where it runs, and the state that every test finds.

``@pytest.mark.require("ext", "torchvision", ...)`` names what a test needs: a name of
:data:`AVAILABLE` or an importable module. Where it is missing the test is deselected and the head
of the report says so; where ``HQOD_REQUIRE=ext,torchvision`` names it, that is an error.

``HQOD_TEST_DEVICE=cuda`` runs the op tests on the GPU: see :mod:`hqod_ops.testing.device`. What is
about the CPU kernels themselves has ``@pytest.mark.cpu_kernels`` and is deselected there, and where
the kernels of the GPU are emulated on the CPU (``HQOD_EMULATED=1``).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import hqod_ops
from hqod_ops.testing.device import DEVICE, cpu_kernels, emulated

if importlib.util.find_spec("hypothesis") is not None:  # a machine with a GPU may lack it
    import hypothesis

    hypothesis.settings.register_profile(
        "hqod", derandomize=True, deadline=None, max_examples=60, database=None
    )
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "hqod"))


def _ext() -> bool:
    # Without a library and without a wish for the reference, the tests must fail, not vanish.
    return os.environ.get("HQOD_BACKEND", "native") != "reference"


def _cuda() -> bool:
    """A GPU, and the library for it: a build without CUDA is a sound one on any machine."""
    loaded = not hqod_ops.build_info()["cuda library"].startswith("not loaded")
    return torch.cuda.is_available() and loaded


def _free_gpu_memory() -> float:
    """In GiB."""
    return torch.cuda.mem_get_info()[0] / 2**30 if _cuda() else 0.0


def _cuda_library() -> bool:
    path = Path(hqod_ops.__file__).parent / "lib" / "libhqod_ops_cuda.so"
    return path.exists() and not emulated()


AVAILABLE = {
    "ext": _ext,  # the native ops
    "cuda_library": _cuda_library,  # built, though there may be no GPU to run it
    "cuda": _cuda,
    "two_gpus": lambda: _cuda() and torch.cuda.device_count() > 1,
    "gpu_24gb": lambda: _free_gpu_memory() >= 24,
}
"""What tests ask for with ``require``, besides importable modules."""


def available(name: str) -> bool:
    """Whether what a test asks for with ``require`` is here."""
    known = AVAILABLE.get(name)
    return importlib.util.find_spec(name) is not None if known is None else known()


def _required() -> list[str]:
    names = os.environ.get("HQOD_REQUIRE", "").split(",")
    return [name.strip() for name in names if name.strip()]


def _why_no_cuda() -> str:
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return f"libhqod_ops_cuda.so is {hqod_ops.build_info()['cuda library']}"


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "require(*names): deselect the test where one is missing",
        "numeric: compares numbers; repeated under every CPU ISA",
        "cpu_kernels: about the CPU kernels; deselected on a device and where those are emulated",
        "sanitizer: small inputs through every kernel, for compute-sanitizer",
    ):
        config.addinivalue_line("markers", line)
    missing = [name for name in _required() if not available(name)]
    if missing:
        reason = f" ({_why_no_cuda()})" if "cuda" in missing else ""
        raise pytest.UsageError(
            f"HQOD_REQUIRE: {', '.join(missing)} must be here, but is missing{reason}"
        )
    if DEVICE.type == "cuda" and not (_cuda() or (torch.cuda.is_available() and not _ext())):
        raise pytest.UsageError(f"HQOD_TEST_DEVICE: expected a GPU, but {_why_no_cuda()}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    names = {n for item in items for mark in item.iter_markers("require") for n in mark.args}
    missing = {name for name in names if not available(name)}
    cpu = cpu_kernels()
    dropped = [
        item
        for item in items
        if any(missing & set(mark.args) for mark in item.iter_markers("require"))
        or (not cpu and item.get_closest_marker("cpu_kernels"))
    ]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in set(dropped)]
        config.stash[_MISSING] = sorted(missing)


_MISSING = pytest.StashKey[list[str]]()


def pytest_report_header() -> list[str]:
    kernels = ", the kernels of the GPU emulated" if emulated() else ""
    return [
        *(f"{name}: {value}" for name, value in hqod_ops.build_info().items()),
        f"op tests on: {DEVICE}{kernels}",
    ]


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
