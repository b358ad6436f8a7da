"""The quantized weight of a layer for one forward pass, however often the layer is called."""

from __future__ import annotations

import torch
from torch import Tensor

from hqod_ops.quant.nn.saved import active_hooks
from hqod_ops.quant.quantizers.calls import in_backward


class SharedWeight:
    """The quantized weight of a layer, for all its calls in one forward pass.

    After the pass it is kept for activation checkpointing alone, which repeats calls during the
    backward pass: where a call had hooks of saved tensors around it. Copies and pickles of it are
    empty, as in a model that is not running.
    """

    def __init__(self) -> None:
        self._value: Tensor | None = None
        self._repeat: Tensor | None = None
        self._recorded = self._without_graph = self._hooked = False
        self._used = [False]

    def __reduce__(self) -> tuple[type[SharedWeight], tuple[()]]:
        return SharedWeight, ()

    def open(self, value: Tensor, used: list[bool] | None = None) -> None:
        """Hand out value from now on; ``used[0]`` gets True at the first time."""
        self._value, self._repeat = value, None
        self._recorded, self._without_graph = torch.is_grad_enabled(), False
        self._hooked = False
        self._used = [False] if used is None else used

    def close(self) -> None:
        """The forward pass is over."""
        value, self._value = self._value, None
        # Reentrant checkpointing runs without a graph, and then a backward pass for each of its
        # segments: these cannot share the one graph from weight to quantized weight.
        shared = value is not None and value.requires_grad and not self._without_graph
        self._repeat = value if shared and self._hooked else None

    def take(self) -> Tensor | None:
        """The quantized weight, or None outside of a forward pass of the prepared model."""
        value = self._value
        if value is None:
            return self._repeat if self._repeat is not None and in_backward() else None
        if torch.is_grad_enabled():
            if not self._recorded:
                return None  # gradients were off when the pass began
            self._used[0] = True
            if not torch.compiler.is_compiling():
                self._hooked = self._hooked or active_hooks() is not None
        elif value.requires_grad:
            self._without_graph = True
        return value
