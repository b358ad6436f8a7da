"""What layers keep of their quantized input and weight for the backward pass.

A quantizer keeps its input and its scale for its own backward pass. The layer behind it can do
without a copy of the result: its backward pass has the op make it again, from the same values to
the same bits. It comes before that of the quantizer, which has not let go of them yet.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

SAVES = ("float", "codes")
"""How a layer may keep its quantized tensors."""

_autograd: Any = torch._C._autograd
_Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


def active_hooks() -> _Hooks | None:
    """Somebody's hooks of saved tensors around this code, as of activation checkpointing."""
    found: _Hooks | None = _autograd._top_saved_tensors_default_hooks(True)
    return found


def saving_codes(*tensors: Tensor) -> AbstractContextManager[Any]:
    """Within it, ops save no quantized tensor, nor a cast or a view of one.

    What else they save goes to the hooks around, or is kept as torch does.

    Args:
        *tensors (Tensor): what is read within. One that was changed after it was made is saved.
    """
    changed = any(_maker(tensor.grad_fn) is not None and tensor._version for tensor in tensors)
    if changed or not _autograd._saved_tensors_hooks_is_enabled():
        return nullcontext()
    around = active_hooks()
    if around is None:
        return saved_tensors_hooks(_pack, _unpack)
    pack, unpack = around
    return saved_tensors_hooks(
        lambda tensor: _made(tensor) or pack(tensor),
        lambda packed: packed.make() if isinstance(packed, _Made) else unpack(packed),
    )


def _maker(node: Any) -> Callable[[Any, int], Tensor] | None:
    """What makes an output of a node again; None if it cannot."""
    return getattr(getattr(node, "_forward_cls", None), "make_again", None)


class _Made:
    """Stands for a saved tensor: it knows the node that makes it, which has what it is made of."""

    __slots__ = ("_dtype", "_index", "_layout", "_node")

    def __init__(self, node: Any, index: int, tensor: Tensor) -> None:
        self._node, self._index, self._dtype = node, index, tensor.dtype
        self._layout = tensor.size(), tensor.stride(), tensor.storage_offset()

    @torch.no_grad()
    def make(self) -> Tensor:
        make_again = _maker(self._node)
        assert make_again is not None
        value = make_again(self._node, self._index).to(self._dtype)
        if (value.size(), value.stride(), value.storage_offset()) != self._layout:
            value = value.as_strided(*self._layout)  # as F.linear flattens its input
        return value


def _made(tensor: Tensor) -> _Made | None:
    """What stands for a tensor that an op saves; None if it cannot be made again."""
    base = tensor if tensor._base is None else tensor._base
    node, index = base.grad_fn, base.output_nr
    if type(node).__name__ == "ToCopyBackward0":  # under autocast
        assert node is not None
        node, index = node.next_functions[0]
    if _maker(node) is None or base._version:
        return None
    return _Made(node, index, tensor)


def _pack(tensor: Tensor) -> Any:
    return _made(tensor) or (tensor, tensor._version)


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, _Made):
        return packed.make()
    tensor: Tensor = packed[0]
    if tensor._version != packed[1]:  # torch looks only where there are no hooks
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: {tuple(tensor.shape)} is at version {tensor._version}; "
            f"expected version {packed[1]} instead"
        )
    return tensor
