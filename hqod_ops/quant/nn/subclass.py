"""Layers of a subclass: what stands around the convolution stays, its input and weight are
quantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from hqod_ops.quant.batches import evaluating
from hqod_ops.quant.nn.layers import QATLayer, as_leaf

_FUNCTIONS: dict[type[nn.Module], Any] = {
    nn.Conv2d: F.conv2d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.Linear: F.linear,
}


_MADE: dict[Any, Any] = {}
"""The twins of subclasses so far."""


class _Watching(TorchFunctionMode):
    """Finds the calls of a function with a layer's weight."""

    def __init__(self, function: Any, weight: Tensor) -> None:
        super().__init__()
        self.function, self.weight, self.calls = function, weight, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is self.function:
            named = dict(zip(("input", "weight"), args, strict=False)) | kwargs
            if named.get("weight") is self.weight:
                self.calls += 1
                return self.run(named.pop("input"), named.pop("weight"), *args[2:], **named)
        return func(*args, **kwargs)

    def run(self, x: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        """The call."""
        return self.function(x, weight, *args, **kwargs)


class _Quantizing(_Watching):
    """Quantizes there."""

    def __init__(self, layer: QATSubclass) -> None:
        super().__init__(_FUNCTIONS[layer.base], layer.weight)
        self._layer = layer

    def run(self, x: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        layer = self._layer
        if layer.upstream is None:
            x = layer.quantized_input(x)
        weight = layer.quantized_weight()
        with layer.saving(x, weight):
            return super().run(x, weight, *args, **kwargs)


class QATSubclass(QATLayer):
    """A twin that runs the forward of a subclass, and quantizes where that gives the weight to
    ``F.conv2d``, ``F.conv_transpose2d`` or ``F.linear``."""

    base: type[nn.Module]

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, fx.Proxy):
            return as_leaf(self, x, *args, **kwargs)
        if self.upstream is not None:
            x = self.upstream(x)
        with _Quantizing(self):
            return super().forward(x, *args, **kwargs)


def problem(layer: nn.Module, base: type[nn.Module]) -> str | None:
    """Why a layer of a subclass cannot be quantized; None if it can.

    Its forward is run on tensors without data, and must call the function of its base class once
    with the weight itself.
    """
    if type(layer).forward is base.forward:
        return None
    if parametrize.is_parametrized(layer):
        return "it has parametrizations"
    function = _FUNCTIONS[base]
    holder = _Holder(layer)
    tensors = {
        name: tensor.to("meta", copy=True)
        for name, tensor in (*holder.named_parameters(), *holder.named_buffers())
    }
    if "inner.weight" not in tensors:
        return "its weight is no parameter"
    shape = [2, getattr(layer, "in_features" if base is nn.Linear else "in_channels")]
    if base is not nn.Linear:
        size: Any = zip(layer.kernel_size, layer.dilation, strict=True)  # type: ignore[arg-type]
        shape += [(k - 1) * d + 3 for k, d in size]
    x = torch.empty(shape, dtype=tensors["inner.weight"].dtype, device="meta")
    watching = _Watching(function, tensors["inner.weight"])
    try:
        with torch.no_grad(), evaluating(layer), watching:
            torch.func.functional_call(holder, tensors, (x,))
    except Exception as error:  # whatever somebody's forward may raise
        return f"its forward cannot be run alone: {type(error).__name__}: {error}".partition("\n")[
            0
        ]
    if watching.calls != 1:
        return f"its forward does not give its weight to {function.__name__} once"
    return None


class _Holder(nn.Module):
    """Runs the forward of a layer without its hooks."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner.forward(x)


def subclass_twin(kind: Any, twin: Any) -> type[QATLayer]:
    """The twin of a subclass.

    Args:
        kind (type): the subclass.
        twin (type): that of its base class.
    """
    found: type[QATLayer] | None = _MADE.get((kind, twin))
    if found is not None:
        return found
    plain = kind.forward is twin.float_type.forward
    members: dict[str, Any] = {
        "float_type": kind,
        "twin": twin,
        "base": twin.float_type,
        "weight_ch_axis": twin.weight_ch_axis,
        "__module__": kind.__module__,
        "__reduce_ex__": _reduce,
    }
    made = type(f"QAT{kind.__name__}", (twin if plain else QATSubclass, kind), members)
    _MADE[kind, twin] = made
    return made


def _reduce(self: QATLayer, _protocol: int) -> Any:
    """How a copy or a pickle is made: the class has no name by which it could be found."""
    cls: Any = type(self)
    return _rebuild, (cls.float_type, cls.twin), vars(self)


def _rebuild(kind: type[nn.Module], twin: type[QATLayer]) -> nn.Module:
    cls = subclass_twin(kind, twin)
    return cls.__new__(cls)
