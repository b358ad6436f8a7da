"""aligned_box_iou: fake kernel, autograd, call."""

from __future__ import annotations

import torch
from torch import Tensor

from hqod_ops._register._autograd import differentiable
from hqod_ops._register._fake import fake_gradient, fake_loss, one_device


@torch.library.register_fake("hqod::aligned_box_iou")
def _fake(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    one_device(boxes1, boxes2)
    return fake_loss(boxes1, boxes1.shape[:-1], 0)


@torch.library.register_fake("hqod::_aligned_box_iou_backward")
def _fake_backward(
    grad: Tensor, boxes1: Tensor, boxes2: Tensor, wanted: int
) -> tuple[Tensor, Tensor]:
    one_device(grad, boxes1, boxes2)
    return fake_gradient(boxes1, wanted & 1), fake_gradient(boxes2, wanted & 2)


_call = differentiable("aligned_box_iou", tensors=2, gradients=2)


def aligned_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """See :func:`hqod_ops.aligned_box_iou`."""
    iou: Tensor = _call((), boxes1, boxes2)
    return iou
