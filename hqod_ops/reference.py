"""The mathematics of every op in plain PyTorch: the definition, and the oracle of the tests.

Each function has the signature of its twin in :mod:`hqod_ops.functional` and is differentiable by
ordinary autograd, so it can be read as the specification, run in float64 as the oracle, and chosen
as the backend with ``HQOD_BACKEND=reference`` where no native library can be had. It favours being
obviously right over being fast.

Source: X. Huang et al., *HQOD: Harmonious Quantization for Object Detection*, ICME 2024
(arXiv:2408.02561), with the details of the authors' code; S. K. Esser et al., *Learned Step Size
Quantization*, ICLR 2020 (arXiv:1902.08153); Y. Bhalgat et al., *LSQ+*, CVPRW 2020
(arXiv:2004.09576); H. Rezatofighi et al., *Generalized Intersection over Union*, CVPR 2019
(arXiv:1902.09630); Z. Zheng et al., *Distance-IoU Loss*, AAAI 2020 (arXiv:1911.08287); Y.-F. Zhang
et al., *Focal and Efficient IOU Loss* (arXiv:2101.08158); Z. Gevorgyan, *SIoU Loss*
(arXiv:2205.12740).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

IOU_EPS = 1e-6
"""Lower bound of the union of two boxes, in squared coordinate units."""

LOG_EPS = 2.220446049250313e-16
"""Added to a score or an IoU before its logarithm (the float64 machine epsilon, as published)."""

GRAD_GUARD = 1e-6
"""Below this value the derivative of a logarithm is taken as 1 / GRAD_GUARD, which bounds TCorr's
gradient by 4e4 where the published formula reaches 5e13."""

LARGE_SIDE = 2.0**60
"""Boxes with a longer side are scaled by ``SHRINK`` first, so that no area overflows float32."""

SHRINK = 2.0**-70

SHRUNK_EPS = 1e-30
"""Lower bound of the union of such boxes, after ``SHRINK``."""


def _clamp(x: Tensor, low: float | Tensor, high: float = math.inf) -> Tensor:
    """x within [low, high], with the gradient of x at the bounds (torch.clamp's went in 2.14)."""
    return torch.where(x < low, low, torch.where(x > high, high, x))


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _reduce(
    loss: Tensor, weight: Tensor | None, reduction: str, avg_factor: float | Tensor | None = None
) -> Tensor:
    if weight is not None:
        loss = loss * weight.to(loss.dtype)
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    if loss.numel() == 0:  # 0, whatever avg_factor is, which stays in the graph
        return total if avg_factor is None else total * avg_factor
    return total / (loss.numel() if avg_factor is None else avg_factor)


def _sizes(boxes1: Tensor, boxes2: Tensor) -> list[Tensor]:
    """Width and height of either box and of their intersection, negative where there is none."""
    overlap = torch.minimum(boxes1[..., 2:], boxes2[..., 2:]) - torch.maximum(
        boxes1[..., :2], boxes2[..., :2]
    )
    return [boxes1[..., 2:] - boxes1[..., :2], boxes2[..., 2:] - boxes2[..., :2], overlap]


def _areas(sizes: Sequence[Tensor], longest: Tensor, eps: float) -> tuple[list[Tensor], Tensor]:
    """Intersection, union and the areas of further sizes, and eps, in units that fit float32."""
    with torch.no_grad():
        longest = longest.amax(dim=-1, keepdim=True)
        large = longest > LARGE_SIDE
        shrink = torch.where(large, SHRINK, 1.0).to(longest.dtype)
        # A tensor: where() of two numbers would round them to the default dtype.
        least = torch.where(large, longest.new_full((), SHRUNK_EPS), eps)[..., 0]
    area1, area2, inter, *more = (_clamp(size * shrink, 0.0).prod(dim=-1) for size in sizes)
    # The difference is 0, or NaN where a side is infinite: no loss that hides a NaN gradient.
    return [inter, area1 + area2 - inter + (longest - longest)[..., 0], *more], least


def aligned_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """See :func:`hqod_ops.aligned_box_iou`."""
    dtype = _compute_dtype(boxes1)
    boxes1, boxes2 = boxes1.to(dtype), boxes2.to(dtype)
    sizes = _sizes(boxes1, boxes2)
    (inter, union), eps = _areas(sizes, longest=torch.cat(sizes[:2], dim=-1), eps=IOU_EPS)
    return inter / _clamp(union, eps)


def _harmonious(iou: Tensor, alpha: float, gamma: float) -> Tensor:
    return alpha * (1 - iou) * (1 + iou) ** gamma


def _guarded_log(x: Tensor) -> Tensor:
    """log(x + LOG_EPS), its derivative held at 1 / GRAD_GUARD below GRAD_GUARD."""
    held = (x.detach() + LOG_EPS).log() + (x - x.detach()) / GRAD_GUARD
    return torch.where(x < GRAD_GUARD, held, (_clamp(x, GRAD_GUARD) + LOG_EPS).log())


def _tcorr(score: Tensor, iou: Tensor, variant: str, logits: bool) -> Tensor:
    p, u = (score.sigmoid() if logits else _clamp(score, 0.0, 1.0)), _clamp(iou, 0.0, 1.0)
    # The sigmoid's own derivative p (1 - p) bounds that of the logarithm: no guard for logits.
    log_p = (p + LOG_EPS).log() if logits else _guarded_log(p)
    log_u = _guarded_log(u)
    if variant == "official":
        agreement = (u * log_p + p * log_u).exp() - LOG_EPS
    else:
        agreement = (0.5 * (log_p + log_u)).exp()
    return (1 + (p - u).detach().abs()) * ((-agreement).exp() - math.exp(-1))


def harmonious_iou_loss(
    pred: Tensor,
    target: Tensor,
    alpha: float = 1.5,
    gamma: float = 0.8,
    weight: Tensor | None = None,
    reduction: str = "none",
) -> Tensor:
    """See :func:`hqod_ops.harmonious_iou_loss`."""
    return _reduce(_harmonious(aligned_box_iou(pred, target), alpha, gamma), weight, reduction)


def generalized_box_iou_loss(
    boxes1: Tensor,
    boxes2: Tensor,
    reduction: str = "none",
    eps: float = 1e-7,
    weight: Tensor | None = None,
) -> Tensor:
    """See :func:`hqod_ops.generalized_box_iou_loss`."""
    dtype = _compute_dtype(boxes1)
    boxes1, boxes2 = boxes1.to(dtype), boxes2.to(dtype)
    hull = torch.maximum(boxes1[..., 2:], boxes2[..., 2:]) - torch.minimum(
        boxes1[..., :2], boxes2[..., :2]
    )
    (inter, union, around), least = _areas([*_sizes(boxes1, boxes2), hull], longest=hull, eps=eps)
    loss = 1 - inter / (union + least) + (around - union) / (around + least)
    return _reduce(loss, weight, reduction)


class _Pair(NamedTuple):
    """Two boxes as the losses of the IoU family see them, in units that fit float32."""

    iou: Tensor
    """Of the union plus eps; NaN for an infinite coordinate."""
    centre: Tensor
    """[..., 2]: the first one's less the second one's."""
    hull: Tensor
    """[..., 2]: the sides of the smallest box around both, at least as long as centre."""
    size1: Tensor
    size2: Tensor
    """[..., 2]: sides of at least 0."""
    eps: Tensor


def _pair(boxes1: Tensor, boxes2: Tensor, eps: float) -> _Pair:
    dtype = _compute_dtype(boxes1)
    boxes1, boxes2 = boxes1.to(dtype), boxes2.to(dtype)
    moved = boxes1 - boxes2
    centre = 0.5 * moved[..., :2] + 0.5 * moved[..., 2:]
    hull = torch.maximum(boxes1[..., 2:], boxes2[..., 2:]) - torch.minimum(
        boxes1[..., :2], boxes2[..., :2]
    )
    with torch.no_grad():
        longest = torch.cat([hull.abs(), centre.abs()], dim=-1).amax(dim=-1, keepdim=True)
        large = longest > LARGE_SIDE
        shrink = torch.where(large, SHRINK, 1.0).to(dtype)
        least = torch.where(large, longest.new_full((), SHRUNK_EPS), eps)[..., 0]
    size1, size2, overlap = (_clamp(x * shrink, 0.0) for x in _sizes(boxes1, boxes2))
    inter = overlap.prod(dim=-1)
    union = size1.prod(dim=-1) + size2.prod(dim=-1) - inter + least
    centre, hull = centre * shrink, hull * shrink
    hull = torch.where(centre.abs() > hull, centre.abs(), hull)
    iou = inter / union + (longest - longest)[..., 0]
    return _Pair(iou, centre, hull, size1, size2, least)


def _distance(pair: _Pair) -> Tensor:
    """The squared distance of the centres over the squared diagonal around both boxes."""
    return pair.centre.square().sum(dim=-1) / (pair.hull.square().sum(dim=-1) + pair.eps)


def _angle(size: Tensor, eps: Tensor) -> Tensor:
    """atan(w / h), 0 for an empty box; its derivative is that of a box of at least eps."""
    w, h = size.unbind(dim=-1)
    with torch.no_grad():
        angle = torch.atan2(w, h.abs())  # no -0: that is pi
        norm = torch.maximum(w * w + h * h, eps)
        along_w, along_h = h / norm, w / norm
    return angle + along_w * (w - w.detach()) - along_h * (h - h.detach())


def distance_box_iou_loss(
    boxes1: Tensor,
    boxes2: Tensor,
    reduction: str = "none",
    eps: float = 1e-7,
    weight: Tensor | None = None,
) -> Tensor:
    """See :func:`hqod_ops.distance_box_iou_loss`."""
    pair = _pair(boxes1, boxes2, eps)
    return _reduce(1 - pair.iou + _distance(pair), weight, reduction)


def complete_box_iou_loss(
    boxes1: Tensor,
    boxes2: Tensor,
    reduction: str = "none",
    eps: float = 1e-7,
    weight: Tensor | None = None,
) -> Tensor:
    """See :func:`hqod_ops.complete_box_iou_loss`."""
    pair = _pair(boxes1, boxes2, eps)
    turn = _angle(pair.size2, pair.eps) - _angle(pair.size1, pair.eps)
    v = 4 / math.pi**2 * turn.square()
    alpha = (v / (1 - pair.iou + v + pair.eps)).detach()
    return _reduce(1 - pair.iou + _distance(pair) + alpha * v, weight, reduction)


def efficient_box_iou_loss(
    boxes1: Tensor,
    boxes2: Tensor,
    reduction: str = "none",
    eps: float = 1e-7,
    weight: Tensor | None = None,
) -> Tensor:
    """See :func:`hqod_ops.efficient_box_iou_loss`."""
    pair = _pair(boxes1, boxes2, eps)
    ratio = (pair.size1 - pair.size2).square() / (pair.hull.square() + pair.eps[..., None])
    return _reduce(1 - pair.iou + _distance(pair) + ratio.sum(dim=-1), weight, reduction)


def scylla_box_iou_loss(
    boxes1: Tensor,
    boxes2: Tensor,
    reduction: str = "none",
    eps: float = 1e-7,
    weight: Tensor | None = None,
) -> Tensor:
    """See :func:`hqod_ops.scylla_box_iou_loss`."""
    pair = _pair(boxes1, boxes2, eps)
    eps_of_two = pair.eps[..., None]
    far = pair.centre.abs()
    angle = 2 * far.prod(dim=-1) / (far.square().sum(dim=-1) + pair.eps)
    ratio = far.square() / (pair.hull.square() + eps_of_two)
    distance = (1 - (-(2 - angle)[..., None] * ratio).exp()).sum(dim=-1)
    longer = torch.maximum(pair.size1, pair.size2)
    change = (pair.size1 - pair.size2).abs() / (longer + eps_of_two)
    shape = (1 - (-change).exp()).pow(4).sum(dim=-1)
    return _reduce(1 - pair.iou + (distance + shape) / 2, weight, reduction)


def tcorr_loss(
    scores: Tensor,
    ious: Tensor,
    logits: bool = False,
    variant: str = "official",
    weight: Tensor | None = None,
    reduction: str = "none",
) -> Tensor:
    """See :func:`hqod_ops.tcorr_loss`."""
    dtype = _compute_dtype(scores)
    loss = _tcorr(scores.to(dtype), ious.to(dtype), variant, logits)
    return _reduce(loss, weight, reduction)


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
    avg_factor: float | Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """See :func:`hqod_ops.hqod_loss`."""
    iou = aligned_box_iou(pred, target)
    agreement = _tcorr(scores.to(iou.dtype), iou, variant, logits)
    loss = hiou_weight * _harmonious(iou, alpha, gamma) + tcorr_weight * agreement
    return _reduce(loss, weight, reduction, avg_factor)


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x, with its gradient multiplied by ``factor``."""
    return x if factor == 1.0 else x.detach() + (x - x.detach()) * factor


def lsq_grad_scale(numel: int, num_scales: int, quant_max: int) -> float:
    """LSQ's gradient scale, 1 / sqrt(elements per scale * quant_max), each at least 1."""
    return 1.0 / math.sqrt(max(numel / max(num_scales, 1), 1) * max(quant_max, 1))


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
    if activation is not None:
        x = functional.relu(x) if activation == "relu" else functional.relu6(x)
    dtype = _compute_dtype(x)
    factor = (
        lsq_grad_scale(x.numel(), scale.numel(), quant_max)
        if isinstance(grad_scale, str)
        else 1.0
        if grad_scale is None
        else float(grad_scale)
    )
    shape = [1] * x.dim()
    if ch_axis is not None:
        shape[ch_axis] = scale.numel()
    s = _scale_gradient(scale.to(dtype).reshape(shape), factor)
    wide = x.to(dtype)
    if zero_point is None:
        z = zero = torch.zeros((), dtype=dtype, device=x.device)
    else:
        z = _scale_gradient(zero_point.to(dtype).reshape(shape), factor)
        zero = z.detach().round()
    with torch.no_grad():
        code = (wide / s).round() + zero
        level = code.clamp(quant_min, quant_max) - zero
        outside = (code < quant_min) | (code > quant_max)
        slope = torch.where(outside, level, level - wide / s)
    # Straight-through: inside the range y moves with x, and by the rounding error with s; outside
    # it stays at the clamped level, which moves with s and against the zero point.
    surrogate = torch.where(outside, 0.0, wide) + slope * s - outside * (z * s.detach())
    return ((level * s).detach() + (surrogate - surrogate.detach())).to(x.dtype)


def fake_quant_foreach(
    xs: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor] | None = None,
    *,
    quant_min: int | Sequence[int],
    quant_max: int | Sequence[int],
    ch_axis: int | None = None,
    grad_scale: float | str | None = None,
) -> list[Tensor]:
    """See :func:`hqod_ops.fake_quant_foreach`."""
    mins = [quant_min] * len(xs) if isinstance(quant_min, int) else quant_min
    maxs = [quant_max] * len(xs) if isinstance(quant_max, int) else quant_max
    zeros = [None] * len(xs) if zero_points is None else zero_points
    return [
        fake_quant(x, s, z, quant_min=lo, quant_max=hi, ch_axis=ch_axis, grad_scale=grad_scale)
        for x, s, z, lo, hi in zip(xs, scales, zeros, mins, maxs, strict=True)
    ]
