"""Which backend runs, and what a user is told when the native library is not there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hqod_ops

ROOT = Path(hqod_ops.__file__).resolve().parents[1]
USE = """
import hqod_ops, torch
print("imported", hqod_ops.__version__)
boxes = torch.tensor([[0., 0., 2., 2.]])
info = hqod_ops.build_info()
print("backend", info["backend"], "|", info["cpu library"])
try:
    print("iou", hqod_ops.aligned_box_iou(boxes, boxes).item())
except ImportError as error:
    print(type(error).__module__, type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package without its libraries."""
    root = tmp_path_factory.mktemp("bare")
    ignore = shutil.ignore_patterns("lib", "__pycache__", "*.so")
    shutil.copytree(ROOT / "hqod_ops", root / "hqod_ops", ignore=ignore)
    return root


def use(root: Path, code: str = USE, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the code with the package found at root."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HQOD_", "PYTHONPATH"))}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=600,
        env={**environment, "PYTHONPATH": str(root), **env},
    )  # fmt: skip


def test_missing_library(bare: Path) -> None:
    """The import works; the first op says what is missing, where, and what to do."""
    result = use(bare)
    assert result.returncode == 0, result.stderr
    out = result.stdout
    assert f"imported {hqod_ops.__version__}" in out
    assert "backend none" in out
    for word in ("hqod_ops._loader BackendError", "libhqod_ops.so is not installed", "pip install",
                 "HQOD_BACKEND=reference", str(bare)):  # fmt: skip
        assert word in out, out
    assert "iou" not in out.split("BackendError")[0], "nothing is computed silently"


def test_broken_library(bare: Path, tmp_path: Path) -> None:
    """A library that cannot be loaded: the loader's own words are part of the message."""
    shutil.copytree(bare / "hqod_ops", tmp_path / "hqod_ops")
    (tmp_path / "hqod_ops" / "lib").mkdir()
    (tmp_path / "hqod_ops" / "lib" / "libhqod_ops.so").write_bytes(b"no library")
    out = use(tmp_path).stdout
    assert "BackendError" in out and "HQOD_BACKEND=reference" in out
    assert "libhqod_ops.so" in out and "not installed" not in out


def test_reference_backend(bare: Path) -> None:
    """Plain PyTorch is there for those who ask for it, and needs no library."""
    out = use(bare, HQOD_BACKEND="reference").stdout
    assert "backend reference" in out and "iou 1.0" in out


def test_unknown_backend(bare: Path) -> None:
    """Said by build_info, and by the first op."""
    message = "HQOD_BACKEND: expected 'native' or 'reference', got 'cuda'"
    lines = use(bare, HQOD_BACKEND="cuda").stdout.splitlines()
    assert lines[1:] == [
        f"backend {message} | not loaded: not asked",
        f"hqod_ops._loader BackendError {message}",
    ]


HQOD = "import sys; from hqod_ops.cli import main; sys.exit(main({}))"


@pytest.mark.require("torchvision")
@pytest.mark.parametrize(
    ("variable", "row"),
    [
        ("HQOD_BACKEND", "backend"),
        pytest.param("HQOD_CPU_ISA", "cpu isa", marks=pytest.mark.require("ext")),
    ],
)
def test_command_with_a_wrong_variable(variable: str, row: str) -> None:
    """The command that looks for faults shows it, the others say it in one line."""
    info = use(ROOT, HQOD.format(["info"]), **{variable: "foo"})
    assert info.returncode == 0 and not info.stderr, info.stderr
    (line,) = (line for line in info.stdout.splitlines() if line.startswith(row))
    assert f"{variable}: expected " in line and "'foo'" in line
    train = use(ROOT, HQOD.format(["train", "--name", "x"]), **{variable: "foo"})
    assert train.returncode == 2 and train.stderr.startswith(f"hqod: {variable}: expected ")
    assert train.stderr.count("\n") == 1


@pytest.mark.require("ext")
def test_empty_variables_count_as_unset() -> None:
    result = use(ROOT, HQOD_BACKEND="", HQOD_CPU_ISA="")
    assert "backend native" in result.stdout and "iou 1.0" in result.stdout, result.stderr


@pytest.mark.require("ext")
def test_native_backend() -> None:
    """By default the library is used, and said so."""
    result = use(ROOT)
    assert "backend native | libhqod_ops.so" in result.stdout, result.stdout + result.stderr
    assert "iou 1.0" in result.stdout


def test_build_info() -> None:
    info = hqod_ops.build_info()
    assert {"hqod_ops", "torch", "python", "backend", "cpu library", "cuda library"} <= set(info)
    assert all(isinstance(value, str) and value for value in info.values())


@pytest.mark.require("ext")
@pytest.mark.cpu_kernels
def test_instruction_set_is_named() -> None:
    assert hqod_ops.build_info()["cpu isa"] in ("baseline", "avx2", "avx512")


def test_light_import() -> None:
    """import hqod_ops needs torch and NumPy alone: the extras are loaded when they are used."""
    code = """
import sys, torch
before = set(sys.modules)
import hqod_ops
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"torchvision", "pycocotools", "sklearn", "matplotlib", "PIL", "scipy", "rich",
                    "tqdm", "onnx", "pandas", "triton"}))
print("torch._dynamo" in set(sys.modules) - before, "torch._inductor" in set(sys.modules) - before)
"""
    result = use(ROOT, code, HQOD_BACKEND=os.environ.get("HQOD_BACKEND", "native"))
    assert result.stdout.split("\n")[:2] == ["[]", "False False"], result.stdout + result.stderr
