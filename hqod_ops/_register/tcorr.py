"""tcorr_loss: fake kernel, autograd, call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hqod_ops._checks import REDUCTIONS, VARIANTS
from hqod_ops._register._autograd import differentiable, needs
from hqod_ops._register._fake import fake_gradient, fake_loss

_backward_op = torch.ops.hqod._tcorr_loss_backward.default


@torch.library.register_fake("hqod::tcorr_loss")
def _fake(
    scores: Tensor, ious: Tensor, weight: Tensor | None, logits: bool, variant: int, reduction: int
) -> Tensor:
    return fake_loss(scores, scores.shape, reduction)


@torch.library.register_fake("hqod::_tcorr_loss_backward")
def _fake_backward(
    grad: Tensor,
    scores: Tensor,
    ious: Tensor,
    weight: Tensor | None,
    logits: bool,
    variant: int,
    reduction: int,
    wanted: int,
) -> tuple[Tensor, Tensor]:
    return fake_gradient(scores, wanted & 1), fake_gradient(ious, wanted & 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = needs(ctx, 0, 1)
    d_scores, d_ious = _backward_op(grad, *ctx.saved_tensors, *ctx.options, wanted)
    return d_scores if wanted & 1 else None, d_ious if wanted & 2 else None, *[None] * 4


_call = differentiable("tcorr_loss", _setup_context, _backward)


def tcorr_loss(
    scores: Tensor,
    ious: Tensor,
    *,
    logits: bool = False,
    variant: str = "official",
    weight: Tensor | None = None,
    reduction: str = "none",
) -> Tensor:
    """See :func:`hqod_ops.tcorr_loss`."""
    loss: Tensor = _call(scores, ious, weight, logits, VARIANTS[variant], REDUCTIONS[reduction])
    return loss
