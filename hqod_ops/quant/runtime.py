"""What a prepared model keeps about itself, and the two hooks that act on it.

Everything is one :class:`Runtime` in the model's ``__dict__["_hqod"]``. The hooks are functions of
this module which find it on the model that they are given, so that a deepcopy, a pickle or an
average of the model has its own. Of the parts of a model only these carry something too: a layer in
its attributes ``shared_weight`` and ``upstream``, and what makes a tensor that is quantized there
(:mod:`hqod_ops.quant.dataflow.attach`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hqod_ops.quant.quantizers.calls import CountsCalls

_KEY = "_hqod"


@dataclass(eq=False)
class Runtime:
    """The state of a model whose forward passes are counted, such as a prepared one.

    Attributes:
        counting (list of CountsCalls): the modules that count their calls in a forward pass:
            quantizers of inputs, level norms.
        weights (WeightPool, optional): the weights that are quantized together.
        expected (ExpectedModules, optional): the modules that must not be replaced.
        placement (Placement, optional): what ``place_on_producers`` has done.
    """

    counting: list[CountsCalls] = field(default_factory=list)
    weights: Any = None
    expected: Any = None
    placement: Any = None


def find_runtime(model: nn.Module) -> Runtime | None:
    """The state of a model; None if it has none."""
    found: Runtime | None = model.__dict__.get(_KEY)
    return found


def runtime(model: nn.Module) -> Runtime:
    """The state of a model, which gets one, with its hooks, if it has none."""
    found = find_runtime(model)
    if found is None:
        # A plain attribute, not registered as submodules; deepcopy maps its entries to their
        # copies.
        found = model.__dict__[_KEY] = Runtime()
        model.register_forward_pre_hook(_before_forward)
        model.register_forward_hook(_after_forward, always_call=True)
    return found


def track_calls(model: nn.Module) -> Runtime:
    """Note which modules of a model count their calls.

    To be called again when quantizers were added or moved.

    Args:
        model (nn.Module): the model that the training loop calls.
    """
    state = runtime(model)
    # A weight is the same in every call of its layer.
    weights = {id(getattr(module, "weight_quantizer", None)) for module in model.modules()}
    state.counting = [
        module
        for module in model.modules()
        if isinstance(module, CountsCalls) and id(module) not in weights
    ]
    return state


def _before_forward(model: nn.Module, args: Any) -> None:
    if model.__dict__.get("_is_replica"):
        raise RuntimeError(
            "model: nn.DataParallel's copies share the quantizers' state with their original; use "
            "nn.parallel.DistributedDataParallel (torchrun), one process for each GPU"
        )
    state: Runtime = model.__dict__[_KEY]
    for module in state.counting:
        module.reset_level()
    if state.expected is not None:
        state.expected.verify(model)
    if state.weights is not None:
        state.weights.open()


def _after_forward(model: nn.Module, args: Any, output: Any) -> None:
    state: Runtime = model.__dict__[_KEY]
    if state.weights is not None:
        state.weights.close()
