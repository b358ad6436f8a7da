"""Which machine code and PTX the CUDA library has, from the CMake code that says it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / "cmake" / "architectures.cmake"
DEVICES = (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121, 130)  # and one that is to come


def flags(tmp_path: Path, code: str) -> list[str]:
    """What CMake code leaves in the variable ``flags``."""
    cmake = shutil.which("cmake")
    if cmake is None or not FILE.exists():
        pytest.skip("needs CMake and the sources")
    script = tmp_path / "flags.cmake"
    script.write_text(f'include("{FILE}")\n{code}\nmessage("flags:${{flags}}")\n')
    done = subprocess.run([cmake, "-P", str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr)
    return done.stderr.partition("flags:")[2].strip().split(";")


def coverage(flags: list[str]) -> tuple[list[int], list[int]]:
    """The architectures of machine code, and those of PTX."""
    found = [
        re.fullmatch(r"--generate-code=arch=compute_(\d+),code=(sm|compute)_\1", f) for f in flags
    ]
    assert all(found)
    pairs = [(one[2], int(one[1])) for one in found if one]
    return [n for kind, n in pairs if kind == "sm"], [n for kind, n in pairs if kind == "compute"]


@pytest.mark.parametrize("nvcc", ["12.8", "13.0.88"])
def test_every_gpu_finds_code(tmp_path: Path, nvcc: str) -> None:
    """Machine code is for its major version from its minor one on, PTX for all that is newer."""
    code = f'hqod_default_architectures({nvcc} list)\nhqod_architecture_flags("${{list}}" flags)'
    machine, ptx = coverage(flags(tmp_path, code))
    for device in DEVICES:
        own = any(a // 10 == device // 10 and a <= device for a in machine)
        assert own or any(a <= device for a in ptx), device
    # Not only that of the newest, which nothing older can run.
    assert min(ptx) <= min(a for a in machine if a // 10 > min(machine) // 10)
    assert (110 in machine) == (nvcc >= "13")


def test_lists(tmp_path: Path) -> None:
    """As for torch's own extensions, families and single architectures too."""
    found = flags(tmp_path, 'hqod_architecture_flags("8.6 9.0a, 10.0f;12.0+PTX" flags)')
    ends = ["86,code=sm_86", "90a,code=sm_90a", "100f,code=sm_100f", "120,code=sm_120"]
    ends.append("120,code=compute_120")
    assert found == [f"--generate-code=arch=compute_{end}" for end in ends]


def test_a_wrong_name_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected entries such as 9.0") as error:
        flags(tmp_path, 'hqod_architecture_flags("Hopper" flags)')
    assert "got Hopper" in " ".join(str(error.value).split())
