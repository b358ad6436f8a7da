"""The documented contract of IoU and the losses: each checks, then makes one call into the backend.

The formulas are in :mod:`hqod_ops.reference` (plain PyTorch) and ``csrc/math`` (native).
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from hqod_ops import _debug, checks
from hqod_ops._loader import backend as _backend
from hqod_ops.reference import _reduce

_HALF = (torch.bfloat16, torch.float16)
_Maybe = TypeVar("_Maybe", Tensor, "Tensor | None")


def _widen(x: _Maybe) -> _Maybe:
    return x.float() if x is not None and x.dtype in _HALF else x


def _autocast(x: Tensor, *more: Tensor) -> bool:
    """Whether autocast asks for float32: with a half input, and inside ``torch.autocast``."""
    if not torch._C._is_any_autocast_enabled():
        return False
    for y in (x, *more):
        if isinstance(y, Tensor) and y.dtype in _HALF:
            return torch.is_autocast_enabled(y.device.type)
    return False


def aligned_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union of corresponding boxes.

    ``iou = inter / max(area1 + area2 - inter, 1e-6)``, with sides clamped at 0, so that an inverted
    box has area 0. No copy of all pairs is made: row i of one set meets row i of the other.

    Args:
        boxes1 (Tensor[..., 4]): boxes as (x1, y1, x2, y2), in pixels or any other unit.
        boxes2 (Tensor[..., 4]): as many boxes, of the same dtype and device.

    Returns:
        Tensor[...]: values in [0, 1]; float32 for half inputs, else the dtype of the inputs. NaN
        for a box with an infinite side, with NaN gradients.

    Raises:
        ValueError: shapes differ, the last dimension is not 4, or devices differ.
        TypeError: a dtype is not floating point, or the dtypes differ.

    Gradient: to both sets; differentiable once. Where two edges tie, each gets half; a side of
    length 0 passes gradient; a union below 1e-6 is a constant.

    Source: the IoU of the HQOD code (``max(union, 1e-6)``, no +1 convention).

    Example:
        >>> import torch
        >>> from hqod_ops import aligned_box_iou
        >>> aligned_box_iou(torch.tensor([[0., 0., 2., 2.]]), torch.tensor([[1., 0., 3., 2.]]))
        tensor([0.3333])
    """
    if _autocast(boxes1, boxes2):
        boxes1, boxes2 = _widen(boxes1), _widen(boxes2)
    checks.box_pair("boxes1", boxes1, "boxes2", boxes2)
    if _debug.active():
        _debug.boxes("boxes1", boxes1)
        _debug.boxes("boxes2", boxes2)
    return _backend().aligned_box_iou(boxes1, boxes2)


def harmonious_iou_loss(
    pred: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.5,
    gamma: float = 0.8,
    weight: Tensor | None = None,
    reduction: str = "none",
) -> Tensor:
    """Harmonious IoU loss (HIoU): a box loss balanced over IoU levels.

    ``loss = alpha * (1 - iou) * (1 + iou) ** gamma``: compared with ``1 - iou``, boxes that already
    overlap well weigh more, and keep a gradient of -2.6 at IoU 1, where the plain loss has -1.

    Args:
        pred (Tensor[..., 4]): predicted boxes (x1, y1, x2, y2), in pixels or any other unit.
        target (Tensor[..., 4]): their ground truth, of the same dtype and device.
        alpha (float): overall factor. Default: 1.5
        gamma (float): balance; 0 gives ``alpha * (1 - iou)``. Default: 0.8
        weight (Tensor[...], optional): one factor a box. Default: None, all 1
        reduction (str): ``"none"``, ``"sum"`` or ``"mean"`` (the sum over the number of boxes; 0
            for none). Default: ``"none"``

    Returns:
        Tensor[...] or Tensor[]: float32 for half inputs, else the dtype of the inputs.

    Raises:
        ValueError: shapes differ, the last dimension is not 4, devices differ, unknown reduction.
        TypeError: a dtype is not floating point, the dtypes differ, or an option is no number.

    Gradient: to pred and target (as in :func:`aligned_box_iou`) and weight; differentiable once.

    Source: HQOD (arXiv:2408.02561), after the HIoU of HarDet (arXiv:2108.10809).

    Example:
        >>> import torch
        >>> from hqod_ops import harmonious_iou_loss
        >>> pred = torch.tensor([[0., 0., 2., 2.]], requires_grad=True)
        >>> loss = harmonious_iou_loss(pred, torch.tensor([[1., 0., 3., 2.]]), reduction="mean")
        >>> loss.backward()
        >>> round(loss.item(), 4)
        1.2588
    """
    if _autocast(pred, target):
        pred, target, weight = _widen(pred), _widen(target), _widen(weight)
    shape = checks.box_pair("pred", pred, "target", target)
    checks.sample_weight(weight, shape, "pred", pred)
    checks.number("alpha", alpha)
    checks.number("gamma", gamma)
    checks.choice("reduction", reduction, checks.REDUCTIONS)
    if _debug.active():
        _debug.boxes("pred", pred)
        _debug.boxes("target", target)
        _debug.finite("weight", weight)
    if weight is not None and weight.requires_grad:
        loss = _backend().harmonious_iou_loss(pred, target, alpha=alpha, gamma=gamma)
        return _reduce(loss, weight, reduction)
    return _backend().harmonious_iou_loss(pred, target, alpha, gamma, weight, reduction)


def tcorr_loss(
    scores: Tensor,
    ious: Tensor,
    *,
    logits: bool = False,
    variant: str = "official",
    weight: Tensor | None = None,
    reduction: str = "none",
) -> Tensor:
    """Task-correlation loss (TCorr): ties a positive sample's class score p to its box's IoU u.

    ``loss = (1 + sg|p - u|) * (exp(-C) - exp(-1))``, where sg stops the gradient and the agreement
    C of score and IoU is, with e = 2.2e-16,

    - ``"official"``: ``(p + e)**u * (u + e)**p - e``, as published. Beside p = u = 1 it has a
      second optimum at p = u = 0, and it lowers p on 39 % of the unit square.
    - ``"geometric"``: ``sqrt((p + e) * (u + e))``, which grows with both: the only optimum is
      p = u = 1, and score and IoU are always raised, the worse of the two with more force.

    Args:
        scores (Tensor[...]): score of the ground-truth class, clamped into [0, 1]; with
            ``logits=True`` its logit.
        ious (Tensor[...]): IoU of the predicted box with its target, clamped into [0, 1]; the same
            shape, dtype and device.
        logits (bool): fuse the sigmoid. Safer than ``scores.sigmoid()``: the gradient to a logit
            stays below 0.27 where that to a score reaches 4e4. Default: False
        variant (str): ``"official"`` or ``"geometric"``. Default: ``"official"``
        weight (Tensor[...], optional): one factor a sample. Default: None, all 1
        reduction (str): ``"none"``, ``"sum"`` or ``"mean"`` (the sum over the number of samples; 0
            for none). Default: ``"none"``

    Returns:
        Tensor[...] or Tensor[]: values in [0, 1.2643]; float32 for half inputs, else their dtype.

    Raises:
        ValueError: shapes or devices differ, unknown reduction or variant.
        TypeError: a dtype is not floating point, the dtypes differ, or logits is no bool.

    Gradient: to scores, ious and weight; differentiable once. ``|p - u|`` is a constant. Below 1e-6
    the derivative of ``log(x + e)`` is held at 1e6 (for a logit it needs no guard), so that the
    corners of the unit square have finite gradients in every dtype. NaN propagates.

    Source: HQOD (arXiv:2408.02561) and its code; ``"geometric"`` is ours.

    Example:
        >>> import torch
        >>> from hqod_ops import tcorr_loss
        >>> tcorr_loss(torch.tensor([0.9, 0.2]), torch.tensor([0.9, 0.9]))
        tensor([0.0694, 0.7253])
    """
    if _autocast(scores, ious):
        scores, ious, weight = _widen(scores), _widen(ious), _widen(weight)
    checks.floating("scores", scores)
    shape = scores.shape
    checks.per_sample("ious", ious, shape, "scores", scores)
    checks.sample_weight(weight, shape, "scores", scores)
    checks.flag("logits", logits)
    checks.choice("variant", variant, checks.VARIANTS)
    checks.choice("reduction", reduction, checks.REDUCTIONS)
    if _debug.active():
        _debug.scores(scores, logits)
        _debug.finite("ious", ious)
        _debug.finite("weight", weight)
    if weight is not None and weight.requires_grad:
        loss = _backend().tcorr_loss(scores, ious, logits=logits, variant=variant)
        return _reduce(loss, weight, reduction)
    return _backend().tcorr_loss(scores, ious, logits, variant, weight, reduction)


def hqod_loss(
    pred: Tensor,
    target: Tensor,
    scores: Tensor,
    *,
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
    """The two losses that HQOD adds for positive samples, fused into one pass.

    ``loss = hiou_weight * HIoU(iou) + tcorr_weight * TCorr(p, iou)``, iou that of pred and target:
    :func:`harmonious_iou_loss` and :func:`tcorr_loss` over :func:`aligned_box_iou`, without their
    intermediate tensors. Add it to a detector's box loss, over its positive samples.

    Args:
        pred (Tensor[..., 4]): decoded boxes (x1, y1, x2, y2), in pixels of the network input.
        target (Tensor[..., 4]): their ground truth, of the same dtype and device.
        scores (Tensor[...]): score of the ground-truth class; its logit with ``logits=True``.
        logits (bool): fuse the sigmoid. Default: False
        alpha (float), gamma (float): see :func:`harmonious_iou_loss`. Default: 1.5, 0.8
        variant (str): see :func:`tcorr_loss`. Default: ``"official"``
        hiou_weight (float), tcorr_weight (float): factors of the two terms. Default: 1.0, 1.0
        weight (Tensor[...], optional): one factor a sample. Default: None, all 1
        avg_factor (float or Tensor[], optional): what ``"mean"`` divides the sum by, such as the
            number of positives over all ranks. Default: None, the number of samples
        reduction (str): ``"none"``, ``"sum"`` or ``"mean"``. Default: ``"mean"``

    Returns:
        Tensor[] or Tensor[...]: float32 for half inputs, else the dtype of the inputs. Without a
        sample: 0, with zero gradients.

    Raises:
        ValueError: shapes differ, the last dimension of the boxes is not 4, devices differ, unknown
            reduction or variant, avg_factor without ``reduction="mean"``.
        TypeError: a dtype is not floating point, the dtypes differ, or an option is no number.

    Gradient: to pred, target, scores, weight and a tensor avg_factor; differentiable once. On the
    CPU a reduced loss in float32 or float64 computes it in its forward pass and keeps it, 20 or 40
    bytes a sample; otherwise it is recomputed from the inputs, and nothing else is kept.

    Source: HQOD (arXiv:2408.02561).

    Example:
        >>> import torch
        >>> from hqod_ops import hqod_loss
        >>> pred = torch.tensor([[12., 13., 52., 49.]], requires_grad=True)
        >>> loss = hqod_loss(pred, torch.tensor([[10., 10., 50., 50.]]), torch.tensor([0.8]))
        >>> loss.backward()
        >>> round(loss.item(), 4), [round(g, 4) for g in pred.grad[0].tolist()]
        (0.5662, [0.0537, 0.0543, 0.0439, -0.0543])
    """
    if _autocast(pred, target, scores):
        pred, target, scores = _widen(pred), _widen(target), _widen(scores)
        weight = _widen(weight)
    shape = checks.box_pair("pred", pred, "target", target)
    checks.per_sample("scores", scores, shape, "pred", pred)
    checks.sample_weight(weight, shape, "pred", pred)
    checks.flag("logits", logits)
    checks.number("alpha", alpha)
    checks.number("gamma", gamma)
    checks.number("hiou_weight", hiou_weight)
    checks.number("tcorr_weight", tcorr_weight)
    checks.choice("variant", variant, checks.VARIANTS)
    checks.choice("reduction", reduction, checks.REDUCTIONS)
    checks.average(avg_factor, reduction)
    if _debug.active():
        _debug.boxes("pred", pred)
        _debug.boxes("target", target)
        _debug.scores(scores, logits)
        _debug.finite("weight", weight)
        _debug.average(len(pred), avg_factor)
    terms = (pred, target, scores, logits, alpha, gamma, variant, hiou_weight, tcorr_weight)
    if weight is not None and weight.requires_grad:  # the rest is left to autograd
        loss = _backend().hqod_loss(*terms, None, None, "none")
        return _reduce(loss, weight, reduction, avg_factor)
    if isinstance(avg_factor, Tensor):
        total = _backend().hqod_loss(*terms, weight, None, "sum")
        return total / avg_factor if pred.numel() else total * avg_factor  # 0, and in the graph
    return _backend().hqod_loss(*terms, weight, avg_factor, reduction)
