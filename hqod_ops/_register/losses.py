"""The losses: a row each in :data:`LOSSES`, from which their fakes, gradients and calls come.

Most of a loss is said by its schema (``csrc/library.cpp``): its tensors come first; each ``Tensor``
has a gradient, and the weight, a ``Tensor?``, has none; then come its options, as its function in
:mod:`hqod_ops.reference` names them, some of them in code; and what is called ``reduction`` says
how it is reduced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hqod_ops import reference
from hqod_ops._register._autograd import differentiable
from hqod_ops._register._fake import fake_gradient, one_device
from hqod_ops.checks import REDUCTIONS, VARIANTS


@dataclass(frozen=True)
class Loss:
    """What a schema does not say of a loss."""

    name: str
    of_boxes: bool
    """Its first tensor is boxes [..., 4], so that it has a value a row; else it has one a value."""

    @cached_property
    def arguments(self) -> dict[str, str]:
        """The types of its op's arguments, by name."""
        schema = getattr(torch.ops.hqod, self.name).default._schema
        return {argument.name: str(argument.type) for argument in schema.arguments}

    @property
    def tensors(self) -> int:
        return sum("Tensor" in kind for kind in self.arguments.values())

    @property
    def gradients(self) -> int:
        return sum(kind == "Tensor" for kind in self.arguments.values())

    @property
    def reduction(self) -> int | None:
        """The index of the argument that says how to reduce."""
        names = list(self.arguments)
        return names.index("reduction") if "reduction" in names else None


LOSSES = (
    Loss("aligned_box_iou", of_boxes=True),
    Loss("harmonious_iou_loss", of_boxes=True),
    Loss("tcorr_loss", of_boxes=False),
    Loss("hqod_loss", of_boxes=True),
    Loss("generalized_box_iou_loss", of_boxes=True),
    Loss("distance_box_iou_loss", of_boxes=True),
    Loss("complete_box_iou_loss", of_boxes=True),
    Loss("efficient_box_iou_loss", of_boxes=True),
    Loss("scylla_box_iou_loss", of_boxes=True),
)

_CODES = {"variant": VARIANTS, "reduction": REDUCTIONS}
"""Options that are words for users and numbers for the kernels."""


def _register_fakes(loss: Loss) -> None:
    tensors, gradients, reduction = loss.tensors, loss.gradients, loss.reduction

    def value(*arguments: Any) -> Tensor:
        one_device(*arguments[:tensors])
        like = arguments[0]
        reduced = reduction is not None and arguments[reduction] != 0
        shape = () if reduced else like.shape[:-1] if loss.of_boxes else like.shape
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        result: Tensor = like.new_empty(shape, dtype=dtype)
        return result

    def gradients_of(inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
        wanted = inputs[-1]
        return tuple(fake_gradient(inputs[i], wanted >> i & 1) for i in range(gradients))

    def backward(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        one_device(grad, *inputs[:tensors])
        return gradients_of(inputs)

    def both(*inputs: Any) -> tuple[Tensor, ...]:
        return value(*inputs), *gradients_of(inputs)

    torch.library.register_fake(f"hqod::{loss.name}", value)
    torch.library.register_fake(f"hqod::_{loss.name}_backward", backward)
    if reduction is not None:
        torch.library.register_fake(f"hqod::_{loss.name}_and_grad", both)


def register(loss: Loss) -> Callable[..., Tensor]:
    """Make a loss differentiable, and return the function with its reference's signature.

    The function is compiled from the two signatures, as dataclasses are: a call then costs what one
    written by hand does, without a loop over its arguments.
    """
    _register_fakes(loss)
    call = differentiable(
        loss.name, tensors=loss.tensors, gradients=loss.gradients, reduction=loss.reduction
    )
    names = [f"_{name}[{name}]" if name in _CODES else name for name in loss.arguments]
    options = "".join(f"{name}, " for name in names[loss.tensors :])
    signature = inspect.signature(getattr(reference, loss.name))
    parameters = ", ".join(
        name if parameter.default is parameter.empty else f"{name}={parameter.default!r}"
        for name, parameter in signature.parameters.items()
    )
    source = (
        f"def {loss.name}({parameters}):\n"
        f'    """See :func:`hqod_ops.{loss.name}`."""\n'
        f"    return _call(({options}), {', '.join(names[: loss.tensors])})\n"
    )
    namespace: dict[str, Any] = {f"_{name}": codes for name, codes in _CODES.items()}
    namespace["_call"] = call
    exec(source, namespace)
    function: Callable[..., Tensor] = namespace[loss.name]
    return function


FUNCTIONS = {loss.name: register(loss) for loss in LOSSES}
