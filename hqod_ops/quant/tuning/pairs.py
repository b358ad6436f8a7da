"""A model beside its float original: the same layers by name, and what follows what."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hqod_ops.quant.nn.attention import QATMultiheadAttention
from hqod_ops.quant.nn.layers import QATLayer


def quantized_layers(model: nn.Module) -> dict[str, QATLayer]:
    """The quantized layers by name; without the projections of attention, which the float model
    does not call as modules.

    Raises:
        ValueError: there is none.
    """
    attention = [m for m in model.modules() if isinstance(m, QATMultiheadAttention)]
    within = {part for module in attention for part in module.children()}
    found = {
        name: m for name, m in model.named_modules() if isinstance(m, QATLayer) and m not in within
    }
    if not found:
        raise ValueError("model: expected a model from prepare_qat, it has no quantized layer")
    return found


def check_same(model: nn.Module, float_model: nn.Module, names: Iterable[str]) -> None:
    """Check that a float model has modules of these names and of the same size.

    Raises:
        ValueError: it lacks one, or the weight of one differs in shape; the first that does.
        TypeError: float_model is no module.
    """
    if not isinstance(float_model, nn.Module):
        raise TypeError(f"float_model: expected an nn.Module, got {type(float_model).__name__}")
    others = dict(float_model.named_modules())
    for name in names:
        own, other = model.get_submodule(name), others.get(name)
        if other is None:
            raise ValueError(
                f"float_model: expected the model that was prepared, but it has no {name!r}"
            )
        shapes = [_shape(module) for module in (own, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"float_model: expected the model that was prepared, but the weight of {name!r} "
                f"is {shapes[1]}, not {shapes[0]}"
            )


def _shape(module: nn.Module) -> tuple[int, ...] | None:
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) else None


def channel_axis(module: nn.Module) -> int:
    """The axis of a module's output that counts its channels."""
    if isinstance(module, nn.Linear):
        return -1
    return -3 if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) else 1


class Followers:
    """Which modules read the very tensors that others returned.

    Attributes:
        after (dict of str to set of str): the readers of each module's outputs, by name.
    """

    def __init__(self) -> None:
        self.after: dict[str, set[str]] = {}
        self._made: dict[int, tuple[str, weakref.ref[Tensor]]] = {}

    def made(self, name: str, output: Any) -> None:
        """A module returned this."""
        if isinstance(output, Tensor):
            self._made[id(output)] = name, weakref.ref(output)

    def read(self, name: str, x: Any) -> None:
        """A module reads this."""
        source, tensor = self._made.get(id(x), ("", None))
        # An id may be that of an earlier tensor, which is gone.
        if tensor is not None and tensor() is x:
            self.after.setdefault(source, set()).add(name)


@contextmanager
def hooked(
    modules: Mapping[str, nn.Module],
    *,
    before: Callable[[str, Any], Any] | None = None,
    after: Callable[[str, Any, Any], Any] | None = None,
) -> Iterator[None]:
    """Functions called with a module's name and arguments, and then with its output too.

    What ``after`` returns, if not None, is taken for the output.
    """

    def pre_hook(name: str) -> Callable[..., None]:
        return lambda module, args: before(name, args) if before is not None else None

    def hook(name: str) -> Callable[..., Any]:
        return lambda module, args, output: after(name, args, output) if after is not None else None

    handles = []
    for name, module in modules.items():
        if before is not None:
            handles.append(module.register_forward_pre_hook(pre_hook(name)))
        if after is not None:
            handles.append(module.register_forward_hook(hook(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
