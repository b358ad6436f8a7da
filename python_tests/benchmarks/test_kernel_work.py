"""How much of what the fake-quant kernels compute is of use, by the layout that host code sets."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from bench import quant

SOURCES = Path(__file__).resolve().parents[2] / "csrc"

PROGRAM = r"""
#include <cstdio>

#include "kernels/cuda/fake_quant.h"

// Elements of whole warps that have some of `width` elements, `vector` a thread.
long warps(long width, long vector) { return hqod::ceil_div(width, 32 * vector) * 32 * vector; }

int main() {
  int dtype;
  long outer, channels, inner;
  while (std::scanf("%d %ld %ld %ld", &dtype, &outer, &channels, &inner) == 4) {
    hqod::FakeQuantCall call{};
    call.dtype = static_cast<hqod::Dtype>(dtype);
    call.outer = outer, call.channels = channels, call.inner = inner;
    const auto layout = hqod::cuda_layout(call);
    const long vector = hqod::cuda_vector(call, layout.rows);
    long computed = 0, longest = 0, shortest = layout.numel;
    for (long i = 0; i < layout.units; ++i) {
      const auto unit = hqod::fake_quant_unit(layout, i);
      for (long k = 0; k < unit.steps; ++k) {
        const long left = layout.numel - unit.start - k * layout.stride;
        const long width = layout.rows || left > unit.width ? unit.width : left;
        computed += warps(width, vector);
      }
      longest = std::max<long>(longest, unit.width);
      shortest = std::min<long>(shortest, unit.width);
    }
    std::printf("%ld %ld %ld\n", computed, longest, shortest);
  }
}
"""
DTYPES = {"float32": 0, "bfloat16": 2}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None or not SOURCES.exists():
        pytest.skip("needs a C++ compiler and the sources")
    place = tmp_path_factory.mktemp("work")
    (place / "work.cpp").write_text(PROGRAM)
    command = [compiler, "-std=c++20", "-I", str(SOURCES), str(place / "work.cpp")]
    subprocess.run([*command, "-o", str(place / "work")], check=True)
    return place / "work"


def shapes() -> dict[str, tuple[int, int, int]]:
    """What the benchmarks quantize, as [outer, channels, inner]."""
    found = {}
    for shape in (*quant.WEIGHTS, quant.SMALL_ACTIVATION, quant.LARGE_ACTIVATION):
        for axis in (None, 0, 1):
            sizes = (1, 1, math.prod(shape))
            if axis is not None:
                sizes = (math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]))
            found[f"{shape} axis {axis}"] = sizes
        last = (shape[0] * math.prod(shape[2:]), shape[1], 1)
        found[f"{shape} channels last"] = last
    found["rows of 1,600"] = (8, 256, 1600)
    found["rows of 4,608"] = (1, 512, 4608)
    return found


def test_computed_elements_are_of_use(program: Path) -> None:
    """At most a third more than there are: whole warps that have nothing to do do nothing."""
    cases = [(name, d, sizes) for name, sizes in shapes().items() for d in DTYPES]
    lines = "\n".join(" ".join(map(str, (DTYPES[d], *sizes))) for _, d, sizes in cases)
    done = subprocess.run([program], input=lines, capture_output=True, text=True, check=True)
    wasted = {}
    for (name, dtype, sizes), line in zip(cases, done.stdout.splitlines(), strict=True):
        computed = int(line.split()[0]) / math.prod(sizes)
        print(f"{name:40} {dtype:9} {computed:.2f}")
        assert computed >= 1, (name, dtype)
        if computed > 1.34:  # a row of 576 halves is three warps of 256
            wasted[name, dtype] = computed
    assert not wasted


def test_rows_are_cut_evenly(program: Path) -> None:
    """4,608 floats of 16 images are two units of about as many, not 4,096 and a rest."""
    done = subprocess.run(
        [program], input="0 16 512 4608", capture_output=True, text=True, check=True
    )
    _, longest, shortest = map(int, done.stdout.split())
    assert longest <= 1.2 * shortest


def test_a_row_of_a_weight_is_one_unit(program: Path) -> None:
    """Its sum is its gradient: no partial sums, and no launch for them."""
    done = subprocess.run(
        [program], input="0 1 512 4608", capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[1:] == ["4608", "4608"]
