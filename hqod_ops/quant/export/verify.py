"""Whether a file computes what the model does."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from hqod_ops.quant.export._extras import require
from hqod_ops.quant.export.cut import cut, forced_input
from hqod_ops.quant.export.evaluate import (
    EXACT_SUMS,
    Evaluator,
    Feeds,
    OpenVINO,
    evaluator,
    to_bytes,
)
from hqod_ops.quant.export.grid import Array, Grid
from hqod_ops.quant.export.lowering import Lowered
from hqod_ops.quant.export.record import Recording

FLOAT_TOLERANCE = {"onnxruntime": 1e-3, "openvino": 5e-3}
"""Of an output that no quantizer follows: largest difference from identical inputs, as a share of
the output's largest absolute value. Sums in another order differ by a thousandth of that; OpenVINO
approximates exponentials too."""

TIE = 1e-3
"""A value this close to the middle of two codes, in steps, may get either."""

MAX_FLIPPED = 0.01
"""Largest share of a tensor's codes that may differ from identical inputs, by their one step,
without optimizations: with them, runtimes round biases to the grid of 32-bit sums."""

FEW = 16
"""So many of a tensor's codes may always do so: a small tensor has no shares to speak of, and where
a normalisation divides by a variance of 0, as of single values, it is rounding errors alone."""


@dataclass(frozen=True)
class Verification:
    """How far a file is from its model, on one example. See :class:`ExportReport`."""

    evaluator: str
    difference: float
    relative_difference: float
    output_steps: tuple[float | None, ...]
    steps: int
    flipped: float


class ExportError(RuntimeError):
    """The exported file does not compute what the model does; nothing was written."""


def check_expressible(recording: Recording, grids: Sequence[Grid]) -> None:
    """Check that ONNX's formula gives what each activation quantizer of the model gave.

    Raises:
        ValueError: one gave something else, other than in the middle between two codes.
    """
    for grid in grids:
        if grid.codes is not None or grid.name not in recording.before:
            continue
        quantizer, level = recording.calls[grid.name]
        problem = quantizer.onnx_problem(level)
        if problem is not None:
            raise ValueError(f"{grid.name}: {problem}")
        x, y = recording.before[grid.name], recording.after[grid.name]
        steps = np.abs(grid.steps(grid.dequantize(grid.quantize(x)) - y))
        position = np.abs(grid.steps(x)) % 1.0
        tie = np.abs(position - 0.5) < TIE
        if not (steps < np.where(tie, 1 + TIE, TIE)).all():
            raise ValueError(
                f"{grid.name}: ONNX cannot express this quantizer: QuantizeLinear and "
                f"DequantizeLinear with its scale and zero point are {np.nanmax(steps):.3g} steps "
                "away from it"
            )


def verify(
    lowered: Lowered,
    file: bytes,
    recording: Recording,
    feeds: Feeds,
    max_steps: int,
    runtime: str = "onnxruntime",
) -> Verification:
    """Compare a file with its model, see :func:`hqod_ops.quant.export.export_onnx`.

    Args:
        lowered (Lowered): the graph of the file.
        file (bytes): the file.
        recording (Recording): of the model.
        feeds (dict of str to array): the example, by the names of the graph's inputs.
        max_steps (int): largest difference of a code from identical inputs.
        runtime (str): that users run the file with; ONNX Runtime takes the place of one that is not
            installed. Default: ``"onnxruntime"``

    Raises:
        ExportError: they differ.
    """
    _check_constants(lowered, file)
    forced = {forced_input(c): recording.before[c.grid.name] for c in lowered.chains}
    names = [output.name for output in lowered.model.graph.outputs]
    shown = [*names, *(c.output for c in lowered.chains if c.output not in names)]
    parts = to_bytes(cut(lowered))

    def compare(run: Evaluator, share: float) -> tuple[int, float]:
        results = run({**feeds, **forced})
        values = dict(zip(shown, results, strict=True))
        found = _compare_codes(run, lowered, values, recording, max_steps, share)
        pairs = _pairs(run, names, results[: len(names)], recording)
        _compare_outputs(run, pairs, "from identical inputs")
        return found

    compare(evaluator(parts, optimized=False)[0], MAX_FLIPPED)
    if runtime == "openvino" and find_spec("openvino") is not None:
        steps, flipped = compare(OpenVINO(parts), 1.0)
        whole: Evaluator = OpenVINO(file)
    else:
        steps, flipped, whole = _verify_in_onnxruntime(parts, file, compare)
    pairs = _pairs(whole, names, whole(feeds), recording)
    if not flipped:
        _compare_outputs(whole, pairs, "although no code differs")
    grids = {chain.output: chain.grid for chain in lowered.chains}
    return Verification(
        evaluator=whole.name,
        difference=max((_largest(_difference(*pair)) for _, *pair in pairs), default=0.0),
        relative_difference=max((_l2(*pair) for _, *pair in pairs), default=0.0),
        output_steps=tuple(
            _largest(grids[name].steps(ours - theirs)) if name in grids else None
            for name, ours, theirs in pairs
        ),
        steps=steps,
        flipped=flipped,
    )


def _verify_in_onnxruntime(
    parts: bytes, file: bytes, compare: Callable[[Evaluator, float], tuple[int, float]]
) -> tuple[int, float, Evaluator]:
    """The largest difference of a code, the share of codes with one, and what runs the file."""
    exact_sums = False
    try:
        steps, flipped = compare(evaluator(parts)[0], 1.0)
    except ExportError as error:
        exact_sums = True
        try:
            steps, flipped = compare(evaluator(parts, exact_sums=True)[0], 1.0)
        except ExportError:
            raise error from None
        _warn_of_overflow(error)
    whole, problem = evaluator(file, exact_sums=exact_sums)
    if problem:
        warnings.warn(
            f"onnxruntime cannot load the exported model as users will, {whole.name} checks it; "
            f"a target other than 'smallest' may help ({problem})",
            stacklevel=4,
        )
    return steps, flipped, whole


def _warn_of_overflow(error: ExportError) -> None:
    warnings.warn(
        "the exported file is right, but ONNX Runtime's default kernels overflow on this "
        f"processor, as on any x86 without VNNI ({error}). Set "
        f"add_session_config_entry({EXACT_SUMS!r}, '1') in the SessionOptions that run it, or "
        "export with unsigned_weights=True",
        stacklevel=5,
    )


def _check_constants(lowered: Lowered, file: bytes) -> None:
    """Check that a file has codes of weights, scales and zero points as the model has them."""
    to_array = require("onnx.numpy_helper").to_array
    graph = require("onnx").load_model_from_string(file).graph
    stored = {entry.name: to_array(entry) for entry in graph.initializer}
    producers = {node.output[0]: node for node in graph.node}
    pairs = [*lowered.weights.items(), *((c.output, c.grid) for c in lowered.chains)]
    for output, grid in pairs:
        while producers[output].op_type != "DequantizeLinear":  # held in its place
            output = producers[output].input[0]
        codes, scale, zero_point = producers[output].input
        while codes in producers and grid.codes is not None:  # packed
            codes = producers[codes].input[0]
        parts = [("scale", scale, grid.scale), ("zero_point", zero_point, grid.zero_point)]
        if grid.codes is not None:
            parts.append(("codes", codes, grid.codes))
        for name, entry, value in parts:
            if not np.array_equal(stored[entry], value):
                raise ExportError(f"{grid.name}: the file has another {name} than the model")


def _compare_codes(
    run: Evaluator,
    lowered: Lowered,
    values: dict[str, Array],
    recording: Recording,
    max_steps: int,
    share: float,
) -> tuple[int, float]:
    """The largest difference of a code from identical inputs, and the share of codes with one."""
    largest = different = total = 0
    for chain in lowered.chains:
        grid = chain.grid
        steps = np.rint(np.abs(grid.steps(values[chain.output] - recording.after[grid.name])))
        worst, flips = _largest(np.nan_to_num(steps, nan=np.inf)), int((steps > 0).sum())
        if worst > max_steps or flips > max(FEW, share * steps.size):
            raise ExportError(
                f"{grid.name}: from identical inputs, {flips} of {steps.size} codes of {run.name} "
                f"differ from the model's, by up to {worst:g} steps"
            )
        largest, different, total = max(largest, int(worst)), different + flips, total + steps.size
    return largest, different / max(total, 1)


def _pairs(
    run: Evaluator, names: list[str], outputs: list[Array], recording: Recording
) -> list[tuple[str, Array, Array]]:
    """The outputs by name, the file's and the model's."""
    if len(outputs) != len(recording.outputs):
        raise ExportError(
            f"the model returns {len(recording.outputs)} tensors, the file {len(outputs)}"
        )
    pairs = list(zip(names, outputs, recording.outputs, strict=True))
    for name, ours, theirs in pairs:
        if ours.shape != theirs.shape:
            raise ExportError(
                f"output {name!r}: expected shape {theirs.shape}, {run.name} gives {ours.shape}"
            )
    return pairs


def _compare_outputs(run: Evaluator, pairs: list[tuple[str, Array, Array]], when: str) -> None:
    tolerance = FLOAT_TOLERANCE.get(run.name.partition(" ")[0], 1e-3)
    for name, ours, theirs in pairs:
        difference = _largest(_difference(ours, theirs))
        size = _largest(theirs) if theirs.dtype.kind == "f" else 0.0
        if not difference <= tolerance * size:
            raise ExportError(
                f"output {name!r}: {run.name} and the model differ by {difference:.3g} {when}, "
                f"with values up to {size:.3g}"
            )


def _difference(ours: Array, theirs: Array) -> Array:
    return np.asarray(ours.astype(np.float64) - theirs.astype(np.float64))


def _largest(values: Array) -> float:
    return float(np.abs(values).max(initial=0))


def _l2(ours: Array, theirs: Array) -> float:
    size = float(np.linalg.norm(theirs.astype(np.float64)))
    difference = float(np.linalg.norm(_difference(ours, theirs)))
    return difference / size if size else difference
