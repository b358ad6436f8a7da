"""Time of an entry: ours and its peers turn by turn in the same rounds.

A shared machine changes speed by a third from one second to the next. Ratios are therefore taken
inside a round, where both sides met the same machine, and the median over the rounds is reported.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.entry import Call, Entry, Inputs, gradient_mode, outputs, runner
from bench.memory import peak_bytes

OURS = "ours"
Clock = Callable[[], int]
"""Nanoseconds from any starting point."""

Run = Callable[[], Any]
Turn = Callable[[Run, int], float]
"""Calls as often as it is told, and returns the seconds per call."""

TOLERANCE = 1e-2
"""Relative L2 distance between ours and a peer: another function is far beyond it. The gradient of
a scale is a long sum that cancels, so a float32 peer can be off by more than rounding."""


class DisagreementError(RuntimeError):
    """A peer does not compute what ours does, so that its time says nothing."""


@dataclass(frozen=True)
class Effort:
    """How long a block is measured."""

    min_rounds: int
    max_rounds: int
    seconds: float
    """No further round is started after this, but for min_rounds."""
    turn: float
    """Seconds that one variant runs in a round: short calls are repeated."""


FULL = Effort(min_rounds=7, max_rounds=101, seconds=3.0, turn=2e-3)
QUICK = Effort(min_rounds=5, max_rounds=25, seconds=0.5, turn=1e-3)


def quantile(values: list[float], q: float) -> float:
    """Linear interpolation between the sorted values."""
    values = sorted(values)
    position = q * (len(values) - 1)
    low = math.floor(position)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (position - low)


def spread(values: list[float], digits: int) -> dict[str, float]:
    """Median and the range of the middle three fifths."""
    return {
        "median": round(statistics.median(values), digits),
        "p20": round(quantile(values, 0.2), digits),
        "p80": round(quantile(values, 0.8), digits),
    }


def _results(run: Run, inputs: Inputs, phase: str) -> list[Tensor]:
    tensors = [tensor.detach().clone() for tensor in outputs(run())]
    if phase == "FB":
        tensors += [leaf.grad for leaf in inputs.leaves() if leaf.grad is not None]
    return tensors


def check_agreement(
    entry: Entry, phase: str, runs: dict[str, Run], results: Callable[[Run], list[Tensor]]
) -> None:
    """Raise DisagreementError where a peer's results or gradients are not ours.

    Args:
        entry: what is measured.
        phase: named in the message.
        runs: the calls by name.
        results: the results and gradients of a call.
    """
    expected = results(runs[OURS])
    for name in (*entry.peers, "compile"):
        if name not in runs:
            continue
        found = results(runs[name])
        if len(found) != len(expected):
            raise DisagreementError(
                f"{entry.name}, {phase}: {name} gives {len(found)} results and gradients,"
                f" ours {len(expected)}"
            )
        for index, (a, b) in enumerate(zip(expected, found, strict=True)):
            a, b = a.float(), b.float()
            distance = float((a - b).norm() / a.norm().clamp(min=1e-12))
            if not distance <= TOLERANCE:
                raise DisagreementError(
                    f"{entry.name}, {phase}: {name} differs from ours by {distance:.2g}"
                    f" (relative L2) in result or gradient {index}; expected at most {TOLERANCE:g}"
                )


def _copy(source: Tensor) -> Callable[[], Any]:
    with torch.no_grad():
        target, source = torch.zeros_like(source), source.detach()
    return lambda: target.copy_(source)


def _compiled(call: Call, phase: str, inputs: Inputs, threads: int) -> Call | str:
    """The call compiled for these inputs, or why it cannot be (no C++ compiler, say)."""
    import torch._dynamo
    import torch._inductor.config as inductor

    # The number of threads is compiled in; no worker processes beside what is being timed.
    inductor.cpp.threads = threads
    inductor.compile_threads = 1
    torch._dynamo.reset()
    compiled: Call = torch.compile(call, dynamic=False, fullgraph=True)
    try:
        runner(compiled, inputs, phase)()
    except torch._dynamo.exc.TorchDynamoException as error:
        return str(error).strip().partition("\n")[0]
    return compiled


def _runs(entry: Entry, phase: str, inputs: Inputs, compiled: Call | None) -> dict[str, Run]:
    calls = {OURS: entry.ours, **entry.peers, **entry.others}
    if compiled is not None:
        calls["compile"] = compiled
    runs = {name: runner(call, inputs, phase) for name, call in calls.items()}
    if entry.copied is not None:
        source = inputs.args[entry.copied]
        runs["copy_"] = _copy(source)
        if phase == "F":
            runs["clone"] = source.detach().clone
    return runs


def _calls_per_turn(run: Run, seconds: float, turn: Turn) -> int:
    """How often to call within a turn; the first calls, slow ones, are behind us afterwards."""
    run()
    calls = 1
    for _ in range(2):
        calls = max(1, math.ceil(seconds / turn(run, calls)))
    return calls


def timed_by(clock: Clock) -> Turn:
    """Turns whose end is their return."""

    def turn(run: Run, calls: int) -> float:
        start = clock()
        for _ in range(calls):
            run()
        return (clock() - start) / calls * 1e-9

    return turn


def time_rounds(runs: dict[str, Run], effort: Effort, turn: Turn) -> dict[str, list[float]]:
    """Seconds per call of every variant in every round."""
    calls = {name: _calls_per_turn(run, effort.turn, turn) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(effort.max_rounds):
            if done >= effort.min_rounds and time.perf_counter() - start > effort.seconds:
                break
            for name in order:
                times[name].append(turn(runs[name], calls[name]))
            # Nobody always follows the same one, with the caches as that one left them.
            order = order[1:] + order[:1] if done % 2 else order[::-1]
    finally:
        gc.enable()
    return times


def summary(
    entry: Entry, phase: str, times: dict[str, list[float]], copied_bytes: int
) -> dict[str, Any]:
    """What times say of ours and its peers, as a block of the result file holds it.

    Args:
        entry: what was measured.
        phase: the phase of it.
        times: seconds per call of every variant in every round.
        copied_bytes: bytes that the entry's ``copy_`` reads and writes.
    """
    found: dict[str, Any] = {
        "rounds": len(times[OURS]),
        "us": {name: spread([1e6 * t for t in taken], 3) for name, taken in times.items()},
        "ratio": {
            name: spread([t / o for t, o in zip(taken, times[OURS], strict=True)], 4)
            for name, taken in times.items()
            if name != OURS
        },
        "goals": {peer: goal for (at, peer), goal in entry.goals.items() if at == phase},
    }
    if phase in entry.traffic:
        found["bytes"] = entry.traffic[phase]
        if "copy_" in times:
            share = entry.traffic[phase] / copied_bytes
            ratio = found["ratio"]["copy_"]
            found["copy_fraction"] = {key: round(v * share, 4) for key, v in ratio.items()}
    return found


def measure(
    entry: Entry,
    phase: str,
    inputs: Inputs,
    threads: int,
    effort: Effort,
    clock: Clock = time.perf_counter_ns,
    *,
    with_compile: bool = True,
    with_memory: bool = True,
) -> dict[str, Any]:
    """One block of the result file: an entry in one phase with one number of threads.

    Raises:
        DisagreementError: a peer computes something else.
    """
    torch.set_num_threads(threads)
    with gradient_mode(phase):
        compiled: Call | str | None = None
        if with_compile and entry.compiled is not None:
            compiled = _compiled(entry.compiled, phase, inputs, threads)
        runs = _runs(entry, phase, inputs, None if isinstance(compiled, str) else compiled)
        check_agreement(entry, phase, runs, lambda run: _results(run, inputs, phase))
        times = time_rounds(runs, effort, timed_by(clock))
        memory = {}
        if with_memory and phase == "FB":
            memory = {n: peak_bytes(run, inputs) for n, run in runs.items() if n != "copy_"}
    for leaf in inputs.leaves():
        leaf.grad = None
    copied_bytes = 0 if entry.copied is None else 2 * inputs.args[entry.copied].nbytes
    block: dict[str, Any] = {"name": entry.name, "phase": phase, "threads": threads}
    block |= summary(entry, phase, times, copied_bytes)
    if isinstance(compiled, str):
        block["left_out"] = {"compile": compiled}
    if memory:
        block["peak_bytes"] = memory
        block["memory_unit"] = list(entry.memory_unit)
    return block
