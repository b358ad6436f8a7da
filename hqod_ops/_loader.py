"""Finds and loads the native libraries, and says what to do when they are missing."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from hqod_ops._version import __version__

_HERE = Path(__file__).resolve().parent
LIBRARIES = {"cpu": "libhqod_ops.so", "cuda": "libhqod_ops_cuda.so"}

_errors: dict[str, str] = {}
_wrong_choice = ""
"""What is wrong with HQOD_BACKEND; kept, so that build_info can say it."""
_backend_module: ModuleType | None = None


class Backend(Protocol):
    """What a backend offers: the ops, with the arguments of :mod:`hqod_ops.reference`."""

    def fake_quant_foreach(self, *args: Any, **options: Any) -> list[Tensor]: ...
    def __getattr__(self, op: str) -> Callable[..., Tensor]: ...


class BackendError(ImportError):
    """The ops cannot run: no native library, or a wrong HQOD_BACKEND or HQOD_CPU_ISA."""


def _load(kind: str) -> bool:
    """Load one library; its failure is kept for the moment an op needs it."""
    path = _HERE / "lib" / LIBRARIES[kind]
    if not path.exists():
        _errors[kind] = f"{path.name} is not installed"
        return False
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        _errors[kind] = str(error)
        return False
    return True


def _choose() -> ModuleType | None:
    global _wrong_choice
    wanted = os.environ.get("HQOD_BACKEND") or "native"
    if wanted not in ("native", "reference"):
        _wrong_choice = f"HQOD_BACKEND: expected 'native' or 'reference', got {wanted!r}"
        return None
    if wanted == "reference":
        return importlib.import_module("hqod_ops.reference")
    if not _load("cpu"):
        return None
    if torch.version.cuda is None:
        _errors["cuda"] = "this torch is built without CUDA"
    else:
        _load("cuda")
    return importlib.import_module("hqod_ops._register")


def backend() -> Backend:
    """The module that runs the ops: the native one, or the reference when it was asked for.

    Raises:
        BackendError: the native library is missing, or HQOD_BACKEND names no backend; the message
            says what to do.
    """
    if _backend_module is None and _wrong_choice:
        raise BackendError(_wrong_choice)
    if _backend_module is None:
        raise BackendError(
            f"The native library of hqod_ops {__version__} cannot be loaded: {_errors['cpu']}.\n"
            f"  torch {torch.__version__}, Python {sys.version.split()[0]}, {_HERE}\n"
            "Reinstall it where a C++20 compiler is at hand:\n"
            "  pip install --no-build-isolation --force-reinstall --no-deps .\n"
            "or choose the slow plain PyTorch implementation: HQOD_BACKEND=reference"
        )
    return cast(Backend, _backend_module)


def check_environment() -> None:
    """Raise BackendError if HQOD_BACKEND or HQOD_CPU_ISA is wrong, before anything is computed."""
    if _wrong_choice:
        raise BackendError(_wrong_choice)
    try:
        _cpu_isa()
    except RuntimeError as error:
        raise BackendError(_first_line(error)) from None


def _native() -> bool:
    return _backend_module is not None and _backend_module.__name__ == "hqod_ops._register"


def _cpu_isa() -> str:
    names = ("baseline", "avx2", "avx512")
    return names[torch.ops.hqod._cpu_isa()] if _native() else ""


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def build_info() -> dict[str, str]:
    """What is installed and in use: versions, backend, libraries, the CPU's instruction set.

    Example:
        >>> import hqod_ops
        >>> hqod_ops.build_info()["hqod_ops"] == hqod_ops.__version__
        True
    """
    info = {
        "hqod_ops": __version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "backend": _wrong_choice or ("native" if _native() else "none"),
    }
    if _backend_module is not None and not _native():
        info["backend"] = "reference"
    for kind, name in LIBRARIES.items():
        loaded = _native() and kind not in _errors
        info[f"{kind} library"] = (
            name if loaded else f"not loaded: {_errors.get(kind, 'not asked')}"
        )
    if _native():
        try:
            info["cpu isa"] = _cpu_isa()
        except RuntimeError as error:
            info["cpu isa"] = f"none: {_first_line(error)}"
    return info


_backend_module = _choose()
