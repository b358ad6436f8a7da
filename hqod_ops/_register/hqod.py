"""hqod_loss: fake kernel, autograd, call."""

from __future__ import annotations

import torch
from torch import Tensor

from hqod_ops._checks import REDUCTIONS, VARIANTS
from hqod_ops._register._autograd import differentiable
from hqod_ops._register._fake import fake_gradient, fake_loss, one_device


@torch.library.register_fake("hqod::hqod_loss")
def _fake(
    pred: Tensor,
    target: Tensor,
    scores: Tensor,
    weight: Tensor | None,
    logits: bool,
    variant: int,
    alpha: float,
    gamma: float,
    hiou_weight: float,
    tcorr_weight: float,
    reduction: int,
    avg_factor: float | None,
) -> Tensor:
    one_device(pred, target, scores, weight)
    return fake_loss(pred, pred.shape[:-1], reduction)


@torch.library.register_fake("hqod::_hqod_loss_backward")
def _fake_backward(
    grad: Tensor,
    pred: Tensor,
    target: Tensor,
    scores: Tensor,
    weight: Tensor | None,
    logits: bool,
    variant: int,
    alpha: float,
    gamma: float,
    hiou_weight: float,
    tcorr_weight: float,
    reduction: int,
    avg_factor: float | None,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor]:
    one_device(grad, pred, target, scores, weight)
    return _fake_gradients(pred, target, scores, wanted)


def _fake_gradients(
    pred: Tensor, target: Tensor, scores: Tensor, wanted: int
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        fake_gradient(pred, wanted & 1),
        fake_gradient(target, wanted & 2),
        fake_gradient(scores, wanted & 4),
    )


@torch.library.register_fake("hqod::_hqod_loss_and_grad")
def _fake_both(
    pred: Tensor,
    target: Tensor,
    scores: Tensor,
    weight: Tensor | None,
    logits: bool,
    variant: int,
    alpha: float,
    gamma: float,
    hiou_weight: float,
    tcorr_weight: float,
    reduction: int,
    avg_factor: float | None,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    one_device(pred, target, scores, weight)
    loss = fake_loss(pred, pred.shape[:-1], reduction)
    return loss, *_fake_gradients(pred, target, scores, wanted)


_call = differentiable("hqod_loss", tensors=4, gradients=3, reduction=10)


def hqod_loss(
    pred: Tensor,
    target: Tensor,
    scores: Tensor,
    logits: bool = False,
    alpha: float = 1.5,
    gamma: float = 0.8,
    variant: str = "official",
    hiou_weight: float = 1.0,
    tcorr_weight: float = 1.0,
    weight: Tensor | None = None,
    avg_factor: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """See :func:`hqod_ops.hqod_loss`."""
    terms = logits, VARIANTS[variant], alpha, gamma, hiou_weight, tcorr_weight
    options = *terms, REDUCTIONS[reduction], avg_factor
    loss: Tensor = _call(options, pred, target, scores, weight)
    return loss
