"""The CUDA library loads on a machine without a GPU, under any build of torch, and has every op."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import hqod_ops

LIBRARIES = Path(hqod_ops.__file__).parent / "lib"

PROGRAM = """
import sys, torch
for library in sys.argv[1:]:
    torch.ops.load_library(library)
has = torch._C._dispatch_has_kernel_for_dispatch_key
ops = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("hqod::")]
ops.remove("hqod::_cpu_isa")
assert len(ops) > 10 and all(has(name, "CPU") for name in ops)
print(*[name for name in ops if not has(name, "CUDA")])
"""


@pytest.mark.require("ext", "cuda_library")
def test_loads_and_has_every_op() -> None:
    paths = [str(LIBRARIES / name) for name in ("libhqod_ops.so", "libhqod_ops_cuda.so")]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *paths], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "", f"without a CUDA kernel: {done.stdout}"
