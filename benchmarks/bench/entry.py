"""An entry of the benchmark as data: inputs, our call, its peers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Call = Callable[..., Any]
"""Takes the arguments of :class:`Inputs` by name, returns a tensor or a list of tensors."""

PHASES = ("F", "FB")
"""Forward without gradients; forward and backward."""

GPU_PHASES = ("F", "B", "FB")
"""The same, and the backward alone, whose kernels a GPU's graph can hold without the forward's."""


@dataclass
class Inputs:
    """The tensors of one entry."""

    args: dict[str, Any]
    """Arguments by name: tensors, lists of tensors."""
    upstream: Any = None
    """Gradient of the output: like the output, or None where that is one number."""

    def leaves(self) -> list[Tensor]:
        """The tensors that get a gradient."""
        values = self.args.values()
        flat = [t for value in values for t in (value if isinstance(value, list) else [value])]
        return [t for t in flat if t.requires_grad]


@dataclass(frozen=True)
class Entry:
    """One op on inputs of one size, and what it is compared with."""

    name: str
    """family/size, such as ``hqod_loss/N=256``."""
    setup: Callable[[], Inputs]
    ours: Call
    peers: Mapping[str, Call] = field(default_factory=dict)
    """The same function by other means; their agreement with ours is checked before timing."""
    others: Mapping[str, Call] = field(default_factory=dict)
    """Other functions, for orientation."""
    compiled: Call | None = None
    """What ``torch.compile`` gets; it is checked like a peer."""
    copied: str | None = None
    """For memory-bound ops: the argument whose ``copy_`` and ``clone`` are timed beside the op."""
    traffic: Mapping[str, int] = field(default_factory=dict)
    """By phase, the bytes that must be read or written at least, each tensor once."""
    memory_unit: tuple[str, int] = ("bytes", 1)
    """Peak memory is shown as a multiple of this many bytes."""
    goals: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """By phase and peer, the ratio to reach."""
    waiting: frozenset[str] = frozenset()
    """Peers that wait for the device, so that no CUDA graph can hold them."""
    phases: tuple[str, ...] = PHASES
    quick: bool = False
    """Whether ``--quick`` runs it."""

    @property
    def family(self) -> str:
        """The part of the name before the size."""
        return self.name.partition("/")[0]


def outputs(result: Any) -> list[Tensor]:
    """The tensors that a call returned."""
    return list(result) if isinstance(result, (list, tuple)) else [result]


def runner(call: Call, inputs: Inputs, phase: str) -> Callable[[], Any]:
    """One call of one phase, as a training step makes it: the gradients are dropped before."""
    args, upstream, leaves = inputs.args, inputs.upstream, inputs.leaves()

    def forward() -> Any:
        return call(**args)

    def both() -> Any:
        for leaf in leaves:
            leaf.grad = None
        result = call(**args)
        result.backward(upstream)
        return result

    def both_of_list() -> Any:
        for leaf in leaves:
            leaf.grad = None
        result = call(**args)
        torch.autograd.backward(result, upstream)
        return result

    if phase == "F":
        return forward
    return both_of_list if isinstance(upstream, list) else both


def gradient_mode(phase: str) -> contextlib.AbstractContextManager[Any]:
    """What a phase is run under: F builds no graph."""
    return torch.no_grad() if phase == "F" else contextlib.nullcontext()
