"""What a result depends on besides the code: the machine, the versions, the allocator."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

import hqod_ops

KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "20000000000"}
"""With these in the environment glibc gives no memory back, so no page is faulted in twice."""


COMMIT = Path(__file__).resolve().parents[2] / "scripts" / "commit.sh"


def keeps_memory() -> bool:
    """Whether this process runs with memory kept by the allocator."""
    return all(os.environ.get(name) == value for name, value in KEEP_MEMORY.items())


def restart_keeping_memory() -> None:
    """Start this command anew with :data:`KEEP_MEMORY`, which glibc reads when a process starts."""
    if not keeps_memory():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})


def _processor() -> str:
    """Its name, with family and model: a virtual machine may call very different ones alike."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()

    def value(field: str) -> str | None:
        found = re.search(rf"^{field}\s*:\s*(.+)$", text, re.MULTILINE)
        return found.group(1).strip() if found else None

    name, family, model = value("model name"), value("cpu family"), value("model")
    if name is None:
        return platform.machine()
    return name if family is None else f"{name} (family {family}, model {model})"


def _output(*command: str) -> str:
    """The first line that a command prints, or "unknown"."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip().partition("\n")[0]


def _gpu() -> dict[str, object]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": properties.name,
        "processor": _processor(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
    }


def describe(device: str = "cpu") -> dict[str, object]:
    """The head of a result file of ``"cpu"`` or ``"cuda"``."""
    info = hqod_ops.build_info()
    found = {
        "device": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": info["python"],
        "hqod_ops": info["hqod_ops"],
        "backend": info["backend"],
        "isa": info.get("cpu isa", "none"),
        "commit": _output("bash", str(COMMIT)),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "malloc": "kept" if keeps_memory() else "default",
    }
    if device == "cuda":
        found |= {"malloc": "caching", "clock": "cuda events", **_gpu()}
    return found


def file_name(machine: dict[str, object]) -> str:
    """``<device>-<torch>.json``, with what else makes results incomparable; a GPU's name alone."""
    words = re.sub(r"\((r|tm)\)|\b(cpu|processor)\b|@.*", " ", str(machine["device"]).lower())
    device = re.sub(r"[^a-z0-9.]+", "-", words).strip("-")
    if "driver" in machine:
        return f"{device}.json"
    torch_version = str(machine["torch"]).partition("+")[0]
    kept = "-kept-memory" if machine["malloc"] == "kept" else ""
    return f"{device}-{machine['cores']}c-torch{torch_version}{kept}.json"
