"""fake_quant and fake_quant_foreach: fake kernels, autograd, calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hqod_ops._register._autograd import (
    differentiable,
    direct_apply,
    look_at_saved,
    register,
    run,
    take_saved,
    wants_graph,
)
from hqod_ops._register._fake import fake_gradient, one_device

_ACTIVATIONS = {None: 0, "relu": 1, "relu6": 2}  # Activation in csrc/math/fake_quant.h

_op = torch.ops.hqod.fake_quant.default
_foreach_backward_op = torch.ops.hqod._fake_quant_foreach_backward.default


@torch.library.register_fake("hqod::fake_quant")
def _fake(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    ch_axis: int | None,
    grad_scale: float,
    lsq_grad_scale: bool,
    activation: int,
) -> Tensor:
    one_device(x, scale, zero_point)
    return torch.empty_like(x)


@torch.library.register_fake("hqod::_fake_quant_backward")
def _fake_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    ch_axis: int | None,
    grad_scale: float,
    lsq_grad_scale: bool,
    activation: int,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor]:
    one_device(grad, x, scale, zero_point)
    return (
        torch.empty_like(x) if wanted & 1 else x.new_empty(0),
        fake_gradient(scale, wanted & 2),
        fake_gradient(scale if zero_point is None else zero_point, wanted & 4),
    )


_call = differentiable("fake_quant", tensors=3, gradients=3)


def _factor(grad_scale: float | str | None) -> tuple[float, bool]:
    """The op's two arguments for a gradient scale: a factor, and whether LSQ's own is wanted."""
    if grad_scale == "lsq":
        return 1.0, True
    return 1.0 if grad_scale is None else float(grad_scale), False


def fake_quant(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    quant_min: int,
    quant_max: int,
    ch_axis: int | None = None,
    grad_scale: float | str | None = None,
    activation: str | None = None,
) -> Tensor:
    """See :func:`hqod_ops.fake_quant`."""
    options = (quant_min, quant_max, ch_axis, *_factor(grad_scale), _ACTIVATIONS[activation])
    y: Tensor = _call(options, x, scale, zero_point)
    return y


@torch.library.register_fake("hqod::fake_quant_foreach")
def _fake_foreach(
    xs: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    quant_min: Sequence[int],
    quant_max: Sequence[int],
    ch_axis: int | None,
    grad_scale: float,
    lsq_grad_scale: bool,
) -> list[Tensor]:
    one_device(*xs, *scales, *zero_points)
    return [torch.empty_like(x) for x in xs]


@torch.library.register_fake("hqod::_fake_quant_foreach_backward")
def _fake_foreach_backward(
    grads: Sequence[Tensor],
    xs: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    quant_min: Sequence[int],
    quant_max: Sequence[int],
    ch_axis: int | None,
    grad_scale: float,
    lsq_grad_scale: bool,
    wanted: int,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    one_device(*grads, *xs, *scales, *zero_points)
    return (
        [torch.empty_like(x) if wanted & 1 else x.new_empty(0) for x in xs],
        [fake_gradient(scale, wanted & 2) for scale in scales],
        [fake_gradient(zero, wanted & 4) for zero in (zero_points or scales)],
    )


def _foreach_gradients(
    grads: Sequence[Tensor],
    lists: Sequence[Sequence[Tensor]],
    options: tuple[Any, ...],
    needed: Sequence[Sequence[bool]],
) -> list[list[Tensor | None]]:
    """The gradients of xs, scales and zero points, None where not needed."""
    wanted = sum(1 << bit for bit, flags in enumerate(needed) if any(flags))
    tensors = [list(values) for values in lists]
    results = run(_foreach_backward_op, list(grads), *tensors, *options, wanted)
    return [
        [gradient if need else None for gradient, need in zip(gradients, flags, strict=False)]
        for gradients, flags in zip(results, needed, strict=True)
    ]


def _setup_foreach(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    lists, ctx.options = inputs[:3], inputs[3:]
    ctx.lengths = [len(values) for values in lists]
    ctx.save_for_backward(*(tensor for values in lists for tensor in values))


def _split(values: Sequence[Any], lengths: Sequence[int]) -> list[Sequence[Any]]:
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [values[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def _backward_foreach(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    lists = _split(ctx.saved_tensors, ctx.lengths)
    gradients = _foreach_gradients(grads, lists, ctx.options, ctx.needs_input_grad[:3])
    return *gradients, *[None] * 5


register("fake_quant_foreach", _setup_foreach, _backward_foreach)
_foreach_op = torch.ops.hqod.fake_quant_foreach.default


class _Foreach(torch.autograd.Function):
    """The lists flattened: autograd sees tensors among the arguments, not inside them."""

    @staticmethod
    def forward(
        ctx: Any, lengths: list[int], options: tuple[Any, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.lengths, ctx.options = lengths, options
        ctx.save_for_backward(*tensors)
        lists = [list(values) for values in _split(tensors, lengths)]
        return tuple(run(_foreach_op, *lists, *options))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        lists = _split(take_saved(ctx), ctx.lengths)
        needed = _split(ctx.needs_input_grad[2:], ctx.lengths)
        gradients = _foreach_gradients(grads, lists, ctx.options, needed)
        return None, None, *(gradient for values in gradients for gradient in values)

    @staticmethod
    def make_again(ctx: Any, index: int) -> Tensor:
        """One of the outputs, until the backward pass: for those who would keep it."""
        xs, scales, zero_points = _split(look_at_saved(ctx), ctx.lengths)
        quant_min, quant_max, *options = ctx.options
        zero_point = zero_points[index] if zero_points else None
        with torch.no_grad():
            y: Tensor = run(
                _op,
                xs[index],
                scales[index],
                zero_point,
                quant_min[index],
                quant_max[index],
                *options,
                0,
            )
        return y


_apply_foreach = direct_apply(_Foreach)


def fake_quant_foreach(
    xs: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor] | None = None,
    *,
    quant_min: Sequence[int],
    quant_max: Sequence[int],
    ch_axis: int | None = None,
    grad_scale: float | str | None = None,
) -> list[Tensor]:
    """See :func:`hqod_ops.fake_quant_foreach`."""
    lists = list(xs), list(scales), list(zero_points or ())
    options = list(quant_min), list(quant_max), ch_axis, *_factor(grad_scale)
    if not wants_graph():
        ys: list[Tensor] = run(_foreach_op, *lists, *options)
        return ys
    lengths = [len(values) for values in lists]
    return list(_apply_foreach(lengths, options, *(t for values in lists for t in values)))
