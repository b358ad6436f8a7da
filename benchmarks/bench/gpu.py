"""Time and memory of an entry on a GPU, by events on its stream and by CUDA graphs.

A call is timed in two ways. ``stream``: as a training script calls it, one after the other, so that
the host's time for a call counts where it is the longer one. ``graph``: as a replay of calls
recorded before, so that nothing but the GPU's own work counts.

The calls go round several copies of the inputs, of more bytes than the L2 cache holds, and each
result lives until its copy's next turn: no call meets its data in a cache.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.entry import Call, Entry, Inputs, outputs
from bench.measure import OURS, Effort, Run, check_agreement, summary, time_rounds

TIMINGS = {"F": ("graph",), "B": ("graph",), "FB": ("stream", "graph")}
"""By phase, how it is timed."""

FULL = Effort(min_rounds=7, max_rounds=51, seconds=0.8, turn=3e-3)
QUICK = Effort(min_rounds=5, max_rounds=9, seconds=0.2, turn=1e-3)

CACHES = 4
"""The copies of the inputs have this many times the bytes of the L2 cache."""
MAX_COPIES = 16
CHAIN = 8
"""At least so many calls in a graph, whose own launch costs some microseconds."""


class Gpu:
    """What a measurement asks of the device. Everything runs on one stream, not the default one:
    backward passes follow their forward pass there, into a graph as well."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.cache_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
        self._stream = torch.cuda.Stream()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Work inside goes to the stream."""
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.synchronize()

    def turn(self, run: Run, calls: int) -> float:
        """Seconds per call, from the start of the first one's work to the end of the last one's."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(self._stream)
        for _ in range(calls):
            run()
        end.record(self._stream)
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / calls

    def record(self, run: Run) -> Run:
        """A graph of one call, to be replayed; it holds the memory of its results."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            run()
        return graph.replay

    def peak_bytes(self, run: Run) -> int:
        """Most bytes allocated at once beyond what there was; results and gradients count."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        run()
        return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before


def _tensors(values: Any) -> list[Tensor]:
    listed = values.values() if isinstance(values, dict) else [values]
    return [t for v in listed for t in (v if isinstance(v, list) else [v])]


def copies(inputs: Inputs, device: torch.device, cache_bytes: int) -> list[Inputs]:
    """The inputs on the device, as often as it takes not to meet them in its cache."""

    def place(tensor: Tensor) -> Tensor:
        moved = tensor.detach().to(device)
        moved = moved.clone() if moved.data_ptr() == tensor.data_ptr() else moved
        return moved.requires_grad_(tensor.requires_grad)

    def each(value: Any) -> Any:
        return [place(v) for v in value] if isinstance(value, list) else place(value)

    if inputs.upstream is None:  # a number, so that no variant has to make it
        inputs = Inputs(inputs.args, torch.ones(()))
    size = sum(t.nbytes for t in [*_tensors(inputs.args), *_tensors(inputs.upstream)])
    count = min(MAX_COPIES, max(2, math.ceil(CACHES * cache_bytes / max(size, 1))))
    return [
        Inputs({name: each(value) for name, value in inputs.args.items()}, each(inputs.upstream))
        for _ in range(count)
    ]


def _runner(call: Call, inputs: Inputs, phase: str) -> Callable[[], list[Tensor]]:
    """One call of one phase, which returns the results, then the gradients."""
    args, leaves = inputs.args, inputs.leaves()
    upstream = outputs(inputs.upstream)

    def gradients(results: list[Tensor], keep: bool) -> list[Tensor]:
        found = torch.autograd.grad(results, leaves, upstream, retain_graph=keep, allow_unused=True)
        return [gradient for gradient in found if gradient is not None]

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return outputs(call(**args))

    def both() -> list[Tensor]:
        results = outputs(call(**args))
        return [y.detach() for y in results] + gradients(results, keep=False)

    if phase != "B":
        return forward if phase == "F" else both
    kept = outputs(call(**args))
    return lambda: gradients(kept, keep=True)


def _copier(source: Tensor) -> Run:
    source = source.detach()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def in_turn(runs: list[Run]) -> Run:
    """Every call is that of the next entry; its result lives until that entry's next call."""
    results: list[Any] = [None] * len(runs)
    at = 0

    def run() -> Any:
        nonlocal at
        here, at = at, (at + 1) % len(runs)
        results[here] = runs[here]()
        return results[here]

    return run


def compiled(call: Call, inputs: Inputs) -> Call | str:
    """The call compiled for these inputs and their gradients, or why it cannot be."""
    import torch._dynamo
    import torch._functorch.config as functorch

    # A backward pass that is timed alone is repeated, and needs what it would give away.
    functorch.donated_buffer = False
    torch._dynamo.reset()
    made: Call = torch.compile(call, dynamic=False, fullgraph=True)
    try:
        _runner(made, inputs, "FB")()
    except RuntimeError as error:  # torch._dynamo's are
        return str(error).strip().partition("\n")[0]
    return made


def _runs(entry: Entry, phase: str, sets: list[Inputs], made: Call | None) -> dict[str, list[Run]]:
    """Of ours and every peer, one call for each copy of the inputs."""
    calls = {OURS: entry.ours, **entry.peers, **entry.others}
    if made is not None and phase != "F":
        calls["compile"] = made
    runs: dict[str, list[Run]] = {
        name: [_runner(call, inputs, phase) for inputs in sets] for name, call in calls.items()
    }
    if entry.copied is not None:
        runs["copy_"] = [_copier(inputs.args[entry.copied]) for inputs in sets]
    return runs


def _recorded(gpu: Gpu, runs: list[Run]) -> tuple[Run, int]:
    """A graph that goes round the copies, and how many calls it holds."""
    chain = runs * math.ceil(CHAIN / len(runs))
    kept: list[Any] = []

    def all_of_them() -> None:
        kept.extend(run() for run in chain)

    replay = gpu.record(all_of_them)

    def play() -> Any:
        replay()
        return kept  # as long as it may be replayed, its memory is its own

    return play, len(chain)


def _applies(peer: str, timing: str) -> bool:
    """Copies are compared by the GPU's work alone, all else by what a training script sees."""
    return (peer == "copy_") == (timing == "graph")


def measure(
    entry: Entry,
    phase: str,
    sets: list[Inputs],
    gpu: Gpu,
    effort: Effort,
    made: Call | str | None = None,
) -> list[dict[str, Any]]:
    """The blocks of the result file for an entry in one phase: one for each timing.

    Args:
        entry: the op, its peers.
        phase: "F", "B" or "FB".
        sets: of :func:`copies`.
        gpu: the device.
        effort: how long.
        made: of :func:`compiled`; None leaves ``torch.compile`` out.

    Raises:
        DisagreementError: a peer computes something else.
    """
    with gpu.working():
        runs = _runs(entry, phase, sets, None if isinstance(made, str) else made)
        first = {name: each[0] for name, each in runs.items()}
        check_agreement(entry, phase, first, lambda run: [t.clone() for t in outputs(run())])
        copied_bytes = 0 if entry.copied is None else 2 * sets[0].args[entry.copied].nbytes
        blocks = []
        for timing in TIMINGS[phase]:
            names = [n for n in runs if timing == "stream" or n not in entry.waiting]
            if timing == "stream":
                timed, length = (
                    {name: in_turn(runs[name]) for name in names},
                    dict.fromkeys(names, 1),
                )
            else:
                graphs = {name: _recorded(gpu, runs[name]) for name in names}
                timed = {name: graph for name, (graph, _) in graphs.items()}
                length = {name: calls for name, (_, calls) in graphs.items()}
            taken = time_rounds(timed, effort, gpu.turn)
            times = {name: [t / length[name] for t in taken[name]] for name in names}
            block = {"name": entry.name, "phase": phase, "timing": timing, "copies": len(sets)}
            block |= summary(entry, phase, times, copied_bytes)
            goals = block["goals"].items()
            block["goals"] = {peer: goal for peer, goal in goals if _applies(peer, timing)}
            if isinstance(made, str) and phase != "F":
                block["left_out"] = {"compile": made}
            if timing == "stream":
                peers = {name: run for name, run in first.items() if name != "copy_"}
                block["peak_bytes"] = {name: gpu.peak_bytes(run) for name, run in peers.items()}
                block["memory_unit"] = list(entry.memory_unit)
            blocks.append(block)
    return blocks
