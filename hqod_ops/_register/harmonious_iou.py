"""harmonious_iou_loss: fake kernel, autograd, call."""

from __future__ import annotations

import torch
from torch import Tensor

from hqod_ops._checks import REDUCTIONS
from hqod_ops._register._autograd import differentiable
from hqod_ops._register._fake import fake_gradient, fake_loss, one_device


@torch.library.register_fake("hqod::harmonious_iou_loss")
def _fake(
    pred: Tensor, target: Tensor, weight: Tensor | None, alpha: float, gamma: float, reduction: int
) -> Tensor:
    one_device(pred, target, weight)
    return fake_loss(pred, pred.shape[:-1], reduction)


@torch.library.register_fake("hqod::_harmonious_iou_loss_backward")
def _fake_backward(
    grad: Tensor,
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    alpha: float,
    gamma: float,
    reduction: int,
    wanted: int,
) -> tuple[Tensor, Tensor]:
    one_device(grad, pred, target, weight)
    return fake_gradient(pred, wanted & 1), fake_gradient(target, wanted & 2)


@torch.library.register_fake("hqod::_harmonious_iou_loss_and_grad")
def _fake_both(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    alpha: float,
    gamma: float,
    reduction: int,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = _fake(pred, target, weight, alpha, gamma, reduction)
    return loss, fake_gradient(pred, wanted & 1), fake_gradient(target, wanted & 2)


_call = differentiable("harmonious_iou_loss", tensors=3, gradients=2, reduction=5)


def harmonious_iou_loss(
    pred: Tensor,
    target: Tensor,
    alpha: float = 1.5,
    gamma: float = 0.8,
    weight: Tensor | None = None,
    reduction: str = "none",
) -> Tensor:
    """See :func:`hqod_ops.harmonious_iou_loss`."""
    loss: Tensor = _call((alpha, gamma, REDUCTIONS[reduction]), pred, target, weight)
    return loss
