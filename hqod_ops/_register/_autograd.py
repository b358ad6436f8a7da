"""Ties a native op to its backward op: one formula for eager code, compilers and exporters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | list[Tensor] | None, ...]]


def needs(ctx: Any, *inputs: int) -> int:
    """Bit i is set when inputs[i] wants a gradient: the ``wanted`` argument of the backward ops."""
    return sum(1 << bit for bit, index in enumerate(inputs) if ctx.needs_input_grad[index])


def _not_twice(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(f"{ctx.op_name} is not differentiable twice")


def register(
    name: str, setup_context: Callable[[Any, Any, Any], None], backward: Backward
) -> None:
    """Register the gradient of ``hqod::name``, and that its gradient has none."""

    def setup_backward(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.op_name = f"hqod_ops.{name}"

    torch.library.register_autograd(f"hqod::{name}", backward, setup_context=setup_context)
    torch.library.register_autograd(
        f"hqod::_{name}_backward", _not_twice, setup_context=setup_backward
    )


def through_op() -> bool:
    """Whether to call the op itself: no graph is wanted, or a compiler records one."""
    return torch.compiler.is_compiling() or not torch.is_grad_enabled()


def differentiable(
    name: str, setup_context: Callable[[Any, Any, Any], None], backward: Backward
) -> Callable[..., Any]:
    """Make ``hqod::name`` differentiable, and return the function to call.

    The registered formula serves ``torch.ops.hqod`` callers, ``torch.compile`` and ``torch.export``.
    In eager mode the function goes through a Python ``autograd.Function`` with the same formula:
    autograd then needs no boxed trip back into Python, which is the larger part of a small call.
    """
    op = getattr(torch.ops.hqod, name).default
    register(name, setup_context, backward)

    def forward(ctx: Any, *args: Any) -> Any:
        output = op(*args)
        setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    eager: Any = type(name, (torch.autograd.Function,), methods)

    def call(*args: Any) -> Any:
        return op(*args) if through_op() else eager.apply(*args)

    return call
