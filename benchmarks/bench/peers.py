"""The ops as a training script writes them in plain PyTorch: what ours are compared with.

:mod:`hqod_ops.reference` defines the corner cases too, which costs it speed; these do not, so that
the comparison is with the faster of the two.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps


def aligned_iou(pred: Tensor, target: Tensor) -> Tensor:
    """IoU of corresponding boxes."""
    area1 = (pred[:, 2] - pred[:, 0]) * (pred[:, 3] - pred[:, 1])
    area2 = (target[:, 2] - target[:, 0]) * (target[:, 3] - target[:, 1])
    top_left = torch.max(pred[:, :2], target[:, :2])
    bottom_right = torch.min(pred[:, 2:], target[:, 2:])
    size = (bottom_right - top_left).clamp(min=0)
    overlap = size[:, 0] * size[:, 1]
    return overlap / (area1 + area2 - overlap).clamp(min=1e-6)


def harmonious(iou: Tensor) -> Tensor:
    """HIoU of every sample."""
    return 1.5 * (1 - iou) * (1 + iou) ** 0.8


def tcorr(scores: Tensor, ious: Tensor) -> Tensor:
    """TCorr of every sample."""
    agreement = (scores + EPS) ** ious * (ious + EPS) ** scores - EPS
    return (1 + (scores - ious).abs().detach()) * (torch.exp(-agreement) - math.exp(-1))


def harmonious_iou_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Mean HIoU."""
    return harmonious(aligned_iou(pred, target)).mean()


def tcorr_loss(scores: Tensor, ious: Tensor) -> Tensor:
    """Mean TCorr."""
    return tcorr(scores, ious).mean()


def hqod_loss(pred: Tensor, target: Tensor, scores: Tensor) -> Tensor:
    """Mean of HIoU + TCorr."""
    iou = aligned_iou(pred, target)
    return (harmonious(iou) + tcorr(scores, iou)).mean()


def hqod_loss_of_logits(pred: Tensor, target: Tensor, scores: Tensor) -> Tensor:
    """Mean of HIoU + TCorr, the score being a logit."""
    return hqod_loss(pred, target, scores.sigmoid())


def _scale_grad(x: Tensor, factor: float) -> Tensor:
    scaled = x * factor
    return (x - scaled).detach() + scaled


def _round_pass(x: Tensor) -> Tensor:
    return (x.round() - x).detach() + x


def _clamp_levels(x: Tensor, low: int, high: int) -> Tensor:
    """To between two levels, before rounding, with the gradient of x at them.

    torch.clamp has it there before 2.14 alone, so its bounds lie a rounding error further out.
    """
    margin = 2 * torch.finfo(x.dtype).eps
    return x.clamp(low - margin * max(abs(low), 1), high + margin * max(abs(high), 1))


def lsq(
    x: Tensor, scale: Tensor, quant_min: int, quant_max: int, ch_axis: int | None, factor: float
) -> Tensor:
    """Learned step size quantization with detach tricks; a half x meets a float32 scale."""
    scale = _scale_grad(scale, factor)
    if ch_axis is not None:
        scale = scale.reshape([-1 if axis == ch_axis else 1 for axis in range(x.dim())])
    return (_round_pass(_clamp_levels(x / scale, quant_min, quant_max)) * scale).to(x.dtype)


def torch_learnable(
    x: Tensor, scale: Tensor, quant_min: int, quant_max: int, ch_axis: int | None, factor: float
) -> Tensor:
    """torch's own op with a learnable scale, with the zero point it asks for."""
    zero_point = torch.zeros_like(scale)
    if ch_axis is None:
        return torch._fake_quantize_learnable_per_tensor_affine(
            x, scale, zero_point, quant_min, quant_max, factor
        )
    return torch._fake_quantize_learnable_per_channel_affine(
        x, scale, zero_point, ch_axis, quant_min, quant_max, factor
    )
