"""tcorr_loss: fake kernel, autograd, call."""

from __future__ import annotations

import torch
from torch import Tensor

from hqod_ops._checks import REDUCTIONS, VARIANTS
from hqod_ops._register._autograd import differentiable
from hqod_ops._register._fake import fake_gradient, fake_loss, one_device


@torch.library.register_fake("hqod::tcorr_loss")
def _fake(
    scores: Tensor, ious: Tensor, weight: Tensor | None, logits: bool, variant: int, reduction: int
) -> Tensor:
    one_device(scores, ious, weight)
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
    one_device(grad, scores, ious, weight)
    return fake_gradient(scores, wanted & 1), fake_gradient(ious, wanted & 2)


@torch.library.register_fake("hqod::_tcorr_loss_and_grad")
def _fake_both(
    scores: Tensor,
    ious: Tensor,
    weight: Tensor | None,
    logits: bool,
    variant: int,
    reduction: int,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = _fake(scores, ious, weight, logits, variant, reduction)
    return loss, fake_gradient(scores, wanted & 1), fake_gradient(ious, wanted & 2)


_call = differentiable("tcorr_loss", tensors=3, gradients=2, reduction=5)


def tcorr_loss(
    scores: Tensor,
    ious: Tensor,
    logits: bool = False,
    variant: str = "official",
    weight: Tensor | None = None,
    reduction: str = "none",
) -> Tensor:
    """See :func:`hqod_ops.tcorr_loss`."""
    options = logits, VARIANTS[variant], REDUCTIONS[reduction]
    loss: Tensor = _call(options, scores, ious, weight)
    return loss
