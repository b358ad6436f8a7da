"""The CPU kernels of every instruction set, chosen with HQOD_CPU_ISA in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hqod_ops

pytestmark = [pytest.mark.require("ext"), pytest.mark.cpu_kernels]
ROOT = Path(__file__).resolve().parents[2]
ISAS = ("baseline", "avx2", "avx512")


def here() -> set[str]:
    """The instruction sets of this machine."""
    best = torch.backends.cpu.get_cpu_capability().lower()
    known = {"avx2": {"avx2"}, "avx512": {"avx2", "avx512"}}
    return {"baseline"} | known.get(best, set())


def python(code: list[str], isa: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HQOD_CPU_ISA": isa, "OMP_NUM_THREADS": "2"}
    return subprocess.run(
        [sys.executable, *code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600
    )


SHOW = "import torch, hqod_ops; print(hqod_ops.build_info()['cpu isa'])"
CALL = SHOW + "; b = torch.ones(1, 4); print(hqod_ops.aligned_box_iou(b, b).item())"


@pytest.mark.parametrize("isa", ISAS)
def test_numbers(isa: str) -> None:
    """The numeric tests pass under an instruction set; one that the machine lacks is refused."""
    if isa not in here():
        result = python(["-c", CALL], isa)
        assert result.returncode != 0
        assert "HQOD_CPU_ISA" in result.stderr and isa in result.stderr
        return
    assert python(["-c", SHOW], isa).stdout.strip() == isa
    if isa == hqod_ops.build_info()["cpu isa"]:
        return  # the tests of this very process
    files = [
        f"python_tests/ops/test_{name}.py"
        for name in ("contract", "losses", "fake_quant", "foreach")
    ]
    result = python(
        ["-m", "pytest", "-q", "--tb=line", "-m", "numeric", "-p", "no:cacheprovider", *files], isa
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


def test_unknown_name() -> None:
    result = python(["-c", CALL], "sse9")
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    for word in ("HQOD_CPU_ISA", "sse9", *ISAS):
        assert word in result.stderr, last
