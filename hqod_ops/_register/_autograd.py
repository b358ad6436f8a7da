"""Ties a native op to its backward op: one formula for eager code, compilers and exporters.

Every op here takes its tensors first and its options after them, and ``_<op>_backward`` takes the
upstream gradient, the same arguments and a bit mask of the gradients that are wanted.

A small call is as slow as the Python around it, so what runs at every call has no loop over
arguments here, and ``op._op`` stands for ``op`` where no compiler looks: it is what that calls.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter)  # with values to look at, which a FakeTensor has not
_below_autograd = torch._C._AutoDispatchBelowAutograd
_transforms_active = torch._C._are_functorch_transforms_active


def _not_twice(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(f"{ctx.op_name} is not differentiable twice")


def register(
    name: str,
    setup_context: Callable[[Any, Any, Any], None],
    backward: Callable[..., tuple[Any, ...]],
) -> None:
    """Register the gradient of ``hqod::name``, and that its gradient has none."""

    def setup_backward(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.op_name = f"hqod_ops.{name}"

    torch.library.register_autograd(f"hqod::{name}", backward, setup_context=setup_context)
    torch.library.register_autograd(
        f"hqod::_{name}_backward", _not_twice, setup_context=setup_backward
    )


def _is_one(grad: Tensor) -> bool:
    try:
        return grad.item() == 1.0
    except RuntimeError:  # a batch of gradients has no item
        return False


def wants_graph() -> bool:
    """Whether an eager call is to be recorded by autograd."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def run(op: Any, *args: Any) -> Any:
    """Call an op, past its registered autograd where there is nothing to record.

    A compiler records what it sees, so it must see the op whole. In a backward pass gradients are
    enabled by ``create_graph=True`` alone, which then meets the "not differentiable twice" above.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*args)
    with _below_autograd():
        return op._op(*args)


def look_at_saved(ctx: Any) -> tuple[Tensor | None, ...]:
    """What a function has saved, before its backward pass, which takes it by :func:`take_saved`.

    Hooks of saved tensors may unpack each once a pass (activation checkpointing), so it is kept.
    """
    saved = take_saved(ctx)
    ctx.unpacked = saved, [None if tensor is None else tensor._version for tensor in saved]
    return saved


def take_saved(ctx: Any) -> tuple[Tensor | None, ...]:
    """``ctx.saved_tensors``, also after a look at them."""
    known = vars(ctx).pop("unpacked", None)
    if known is not None and all(
        tensor is None or tensor._version == version for tensor, version in zip(*known, strict=True)
    ):
        found: tuple[Tensor | None, ...] = known[0]
        return found
    saved: tuple[Tensor | None, ...] = ctx.saved_tensors  # which says what was changed
    return saved


def direct_apply(function: Any, transformable: Any = None) -> Callable[..., Any]:
    """``function.apply`` without its handling of functorch's wrappers, where none are active.

    Where some are (``torch.func``), ``transformable.apply``, if there is one.
    """
    transformed = (transformable or function).apply
    direct = super(torch.autograd.Function, function).apply

    def apply(*args: Any) -> Any:
        return transformed(*args) if _transforms_active() else direct(*args)

    return apply


def transformable(
    op: Any, backward_op: Any, gradients: int, recompute: Callable[..., tuple[Any, ...]]
) -> Any:
    """The function of an op for ``torch.func`` and batched gradients, which ask for a certain form.

    Called as the others are, with the options first. Differentiable once, as they are.
    """

    class Backward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(arguments: tuple[Any, ...], *tensors: Tensor | None) -> Any:
            with _below_autograd():
                return backward_op._op(*tensors, *arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.op_name = backward_op.name()

        backward = staticmethod(_not_twice)

    class Forward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(options: tuple[Any, ...], *inputs: Tensor | None) -> Any:
            with _below_autograd():
                return op._op(*inputs, *options)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.options = inputs[0]
            ctx.save_for_backward(*inputs[1:])

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
            needed = ctx.needs_input_grad[1:]
            found = recompute(ctx, grad, ctx.saved_tensors, needed[:gradients], Backward.apply)
            return None, *found, *[None] * (len(needed) - gradients)

    return Forward


def differentiable(
    name: str, *, tensors: int, gradients: int, reduction: int | None = None
) -> Callable[..., Any]:
    """Make ``hqod::name`` differentiable, and return the function to call.

    It is called as ``function(options, *tensors)``, with the options in a tuple.

    The registered formula serves ``torch.ops.hqod`` callers, ``torch.compile`` and
    ``torch.export``. In eager mode the function goes through a Python ``autograd.Function``: the
    dispatcher then has no boxed trip back into Python, the larger part of a small call's time.

    On the CPU a loss that is reduced computes its gradients in the forward pass, which has all that
    they need in registers, and its backward pass only returns them, scaled when the upstream
    gradient is not 1. The backward pass recomputes from the inputs where that will not do: on other
    devices, where looking at the upstream gradient would synchronise; for half inputs, whose
    gradients must not be rounded (nor underflow) before a loss scale reaches them; without a
    reduction.

    Args:
        name (str): the op; the backward op is ``_<name>_backward``.
        tensors (int): how many of its arguments are tensors; they come first.
        gradients (int): how many of those have a gradient; they come first.
        reduction (int, optional): the index of the argument that says how to reduce, for an op with
            a twin ``_<name>_and_grad``, which returns the loss and its gradients.
    """
    op = getattr(torch.ops.hqod, name).default
    backward_op = getattr(torch.ops.hqod, f"_{name}_backward").default

    # For every combination of inputs that need a gradient: the bit mask, and what picks a gradient
    # or None for each of them out of None and the op's results.
    plans = {
        needed: (
            sum(need << i for i, need in enumerate(needed)),
            operator.itemgetter(*[need * (i + 1) for i, need in enumerate(needed)]),
        )
        for needed in product((False, True), repeat=gradients)
    }

    def run_backward(arguments: tuple[Any, ...], *tensors: Tensor | None) -> Any:
        return run(backward_op, *tensors, *arguments)

    def recompute(
        ctx: Any,
        grad: Tensor,
        inputs: Any,
        needed: tuple[bool, ...],
        call: Callable[..., Any] = run_backward,
    ) -> tuple[Any, ...]:
        mask, pick = plans[needed]
        found: tuple[Any, ...] = pick((None, *call((*ctx.options, mask), grad, *inputs)))
        return found

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:tensors])
        ctx.options = inputs[tensors:]

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad
        found = recompute(ctx, grad, ctx.saved_tensors, needed[:gradients])
        return *found, *[None] * (len(needed) - gradients)

    register(name, setup_context, backward)

    # Below, the options come first, in a tuple: few arguments, which autograd looks at one by one.
    mine = slice(1, gradients + 1)
    others = (None,) * (tensors - gradients)

    class Recomputing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, options: tuple[Any, ...], *inputs: Tensor | None) -> Any:
            ctx.save_for_backward(*inputs)
            ctx.options = options
            with _below_autograd():
                return op._op(*inputs, *options)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
            found = recompute(ctx, grad, take_saved(ctx), ctx.needs_input_grad[mine])
            return None, *found, *others

        @staticmethod
        def make_again(ctx: Any, index: int) -> Tensor:
            """The output, until the backward pass: for those who would keep it."""
            inputs = look_at_saved(ctx)  # first: checkpointing records a graph to find them
            with _below_autograd():
                output: Tensor = op._op(*inputs, *ctx.options)
            return output

    transformed = transformable(op, backward_op, gradients, recompute)
    apply_recomputing = direct_apply(Recomputing, transformed)
    if reduction is None:

        def call(options: tuple[Any, ...], *inputs: Any) -> Any:
            if wants_graph():
                return apply_recomputing(options, *inputs)
            return run(op, *inputs, *options)

        return call

    both_op = getattr(torch.ops.hqod, f"_{name}_and_grad").default

    class Saving(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, options: tuple[Any, ...], *inputs: Tensor | None) -> Any:
            mask, ctx.pick = plans[ctx.needs_input_grad[mine]]
            # Gradients are off in here, and this op has no registered autograd to be called past.
            results = both_op._op(*inputs, *options, mask)
            ctx.save_for_backward(*results[1:], *inputs)
            ctx.options = options
            return results[0]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
            saved = ctx.saved_tensors
            if torch.is_grad_enabled():
                found = recompute(ctx, grad, saved[gradients:], ctx.needs_input_grad[mine])
            else:
                found = ctx.pick((None, *saved))
                if not _is_one(grad):
                    found = tuple([None if x is None else x * grad for x in found])
            return None, *found, *others

    apply_saving = direct_apply(Saving, transformed)

    def call_loss(options: tuple[Any, ...], *inputs: Any) -> Any:
        if not wants_graph():
            return run(op, *inputs, *options)
        first = inputs[0]
        if (
            options[reduction - tensors] != 0
            and first.is_cpu
            and first.dtype not in _HALF
            and type(first) in _PLAIN
        ):
            return apply_saving(options, *inputs)
        return apply_recomputing(options, *inputs)

    return call_loss
