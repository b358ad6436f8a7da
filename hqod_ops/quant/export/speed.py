"""How fast files run on this machine, and what in them runs in integers."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hqod_ops import checks
from hqod_ops.quant.export._extras import require
from hqod_ops.quant.export.evaluate import Evaluator, Feeds, OnnxRuntime, OpenVINO, first_line
from hqod_ops.tables import text_table

RUNTIMES = ("onnxruntime", "openvino")
"""What can run a file here, on the CPU."""

_INTEGER = ("QLinear", "QGemm", "Integer")
_PRODUCTS = ("Conv", "Gemm", "MatMul", "Convolution", "Deconvolution", "FullyConnected")
"""Parts of the names of operators that multiply: where the time goes."""


@dataclass(frozen=True)
class Speed:
    """One file in one runtime.

    Attributes:
        file (str): its name.
        runtime (str): with its version.
        milliseconds (float): median of a run.
        spread (tuple of 2 float): 20th and 80th percentile, in milliseconds.
        ratio (float): how many times as fast as the first file, the median of the rounds.
        integer (int): products (convolutions, matrix products) that run in integers.
        float_left (mapping of str to int): products that run in floating point, by operator.
        problem (str): why it does not run; else empty.
    """

    file: str
    runtime: str
    milliseconds: float = math.nan
    spread: tuple[float, float] = (math.nan, math.nan)
    ratio: float = math.nan
    integer: int = 0
    float_left: Mapping[str, int] | None = None
    problem: str = ""


def bench_export(
    files: Sequence[str | Path],
    *,
    runtimes: Sequence[str] | None = None,
    size: tuple[int, int] | None = None,
    threads: int = 1,
    rounds: int = 20,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Speed]:
    """Time ONNX files beside each other, and say which operators stayed in floating point.

    In every round each file runs once, on the same random input; the first file is what the others
    are compared with, such as the float model of a quantized one.

    Args:
        files (sequence of path): one input each.
        runtimes (sequence of str, optional): of ``"onnxruntime"`` and ``"openvino"``. Default:
            None, those that are installed
        size (tuple of 2 int, optional): height and width where a file leaves them open. Default:
            None, which such a file cannot do with
        threads (int): of the runtime. Default: 1
        rounds (int): that are timed. Default: 20
        clock (callable): seconds, such as ``time.process_time`` for those of the CPU, which work
            beside it does not stretch. Default: ``time.perf_counter``

    Returns:
        list of Speed: of every runtime and file. OpenVINO runs in float32 what is not quantized.

    Raises:
        ImportError: onnx or a runtime is missing.
        ValueError: no file, a file that is not there or leaves its size open, an unknown runtime.

    Example:
        >>> bench_export(["float.onnx", "w4a4.onnx"])  # doctest: +SKIP
    """
    paths = [Path(file) for file in files]
    checks.count("threads", threads)
    checks.count("rounds", rounds)
    if not paths:
        raise ValueError("files: expected at least one, got none")
    for path in paths:
        if not path.is_file():
            raise ValueError(f"files: there is no file {str(path)!r}")
    if runtimes is None:
        runtimes = [name for name in RUNTIMES if find_spec(name)] or RUNTIMES[:1]
    unknown = [name for name in runtimes if name not in RUNTIMES]
    if unknown:
        raise ValueError(f"runtimes: expected some of {', '.join(RUNTIMES)}, got {unknown[0]!r}")
    feeds = [_feeds(path, size) for path in paths]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # which the evaluators take over
    try:
        return [speed for name in runtimes for speed in _bench(name, paths, feeds, rounds, clock)]
    finally:
        torch.set_num_threads(before)


def speed_table(speeds: Sequence[Speed]) -> str:
    """The speeds as text, a row each."""
    rows = []
    for speed in speeds:
        if speed.problem:
            cells = ["-", "-", "-", "-", speed.problem]
        else:
            low, high = speed.spread
            left = ", ".join(f"{n} {name}" for name, n in (speed.float_left or {}).items())
            cells = [
                f"{speed.milliseconds:.1f}",
                f"{low:.1f} to {high:.1f}",
                "-" if math.isnan(speed.ratio) else f"{speed.ratio:.2f}x",
                str(speed.integer),
                left or "none",
            ]
        rows.append([speed.runtime, speed.file, *cells])
    head = ["runtime", "file", "ms", "20 to 80 %", "speed", "in integers", "left in float"]
    return text_table(head, rows, right=["ms", "20 to 80 %", "speed", "in integers"])


def _feeds(path: Path, size: tuple[int, int] | None) -> Feeds:
    """A random image a float input; batches of 1."""
    onnx = require("onnx")
    random = np.random.default_rng(0)
    graph = onnx.load(path, load_external_data=False).graph
    constants = {entry.name for entry in graph.initializer}
    feeds: Feeds = {}
    for entry in graph.input:
        if entry.name in constants:
            continue
        kind = entry.type.tensor_type
        shape = [dim.dim_value for dim in kind.shape.dim]
        shape[:1] = [shape[0] or 1] if shape else []
        if len(shape) == 4 and size is not None:
            shape[2:] = [known or wanted for known, wanted in zip(shape[2:], size, strict=True)]
        if not all(shape):
            raise ValueError(f"size: {path.name} leaves that of its input {entry.name!r} open")
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        feeds[entry.name] = random.random(shape).astype(dtype)
    return feeds


def _bench(
    runtime: str,
    paths: Sequence[Path],
    feeds: Sequence[Feeds],
    rounds: int,
    clock: Callable[[], float],
) -> list[Speed]:
    loaded: list[tuple[Evaluator, Counter[str]] | str] = []
    for path in paths:
        try:
            loaded.append(_load(runtime, path))
        except ImportError:
            raise
        except Exception as error:  # the runtimes' exceptions share no base class of their own
            loaded.append(first_line(error))
    times: list[list[float]] = [[] for _ in paths]
    for turn in range(rounds + 2):
        for found, inputs, mine in zip(loaded, feeds, times, strict=True):
            if isinstance(found, str):
                continue
            start = clock()
            found[0](inputs)
            if turn >= 2:  # the first runs still allocate
                mine.append(1e3 * (clock() - start))
    speeds = []
    for path, found, mine in zip(paths, loaded, times, strict=True):
        if isinstance(found, str):
            speeds.append(Speed(path.name, runtime, problem=found))
            continue
        run, operators = found
        integer = sum(n for name, n in operators.items() if name.startswith("integer "))
        ratios = [a / b for a, b in zip(times[0], mine, strict=False)] or [math.nan]
        low, high = np.percentile(mine, [20, 80])
        speeds.append(
            Speed(
                path.name,
                run.name,
                statistics.median(mine),
                (float(low), float(high)),
                statistics.median(ratios),
                integer,
                {name: n for name, n in operators.items() if not name.startswith("integer ")},
            )
        )
    return speeds


def _load(runtime: str, path: Path) -> tuple[Evaluator, Counter[str]]:
    """What runs a file, and the products that the runtime made of it."""
    model = str(path)
    if runtime == "openvino":
        openvino = OpenVINO(model)
        return openvino, _openvino_products(openvino.compiled)
    with tempfile.TemporaryDirectory() as folder:
        kept = str(Path(folder) / "optimized.onnx")
        OnnxRuntime(model, keep=kept)
        nodes = require("onnx").load(kept).graph.node
    names = [node.op_type for node in nodes if any(part in node.op_type for part in _PRODUCTS)]
    names += [node.op_type for node in nodes if node.op_type == "QGemm"]
    counted = Counter(
        f"integer {name}" if any(part in name for part in _INTEGER) else name for name in names
    )
    return OnnxRuntime(model), counted


def _openvino_products(compiled: Any) -> Counter[str]:
    found: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ordered_ops():
        facts = node.get_rt_info()
        kind, precision = str(facts["layerType"].value), str(facts["runtimePrecision"].value)
        if any(part in kind for part in _PRODUCTS):
            found[f"integer {kind}" if precision in ("i8", "u8") else kind] += 1
    return found
