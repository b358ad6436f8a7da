"""aligned_box_iou: fake kernel, autograd, call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hqod_ops._register._autograd import differentiable, needs
from hqod_ops._register._fake import fake_gradient, fake_loss

_backward_op = torch.ops.hqod._aligned_box_iou_backward.default


@torch.library.register_fake("hqod::aligned_box_iou")
def _fake(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    return fake_loss(boxes1, boxes1.shape[:-1], 0)


@torch.library.register_fake("hqod::_aligned_box_iou_backward")
def _fake_backward(
    grad: Tensor, boxes1: Tensor, boxes2: Tensor, wanted: int
) -> tuple[Tensor, Tensor]:
    return fake_gradient(boxes1, wanted & 1), fake_gradient(boxes2, wanted & 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = needs(ctx, 0, 1)
    d_boxes1, d_boxes2 = _backward_op(grad, *ctx.saved_tensors, wanted)
    return d_boxes1 if wanted & 1 else None, d_boxes2 if wanted & 2 else None


aligned_box_iou = differentiable("aligned_box_iou", _setup_context, _backward)
