"""The contract of the losses of the IoU family: torchvision's, and two more with their arguments.

The formulas are in :mod:`hqod_ops.reference` (plain PyTorch) and ``csrc/math`` (native).
"""

from __future__ import annotations

from torch import Tensor

from hqod_ops import _debug, checks
from hqod_ops._loader import backend as _backend
from hqod_ops.functional.losses import _autocast, _widen
from hqod_ops.reference import _reduce


def _family(
    name: str, boxes1: Tensor, boxes2: Tensor, reduction: str, eps: float, weight: Tensor | None
) -> Tensor:
    """Checks, then one call into the backend."""
    if _autocast(boxes1, boxes2):
        boxes1, boxes2, weight = _widen(boxes1), _widen(boxes2), _widen(weight)
    shape = checks.box_pair("boxes1", boxes1, "boxes2", boxes2)
    checks.sample_weight(weight, shape, "boxes1", boxes1)
    checks.number("eps", eps)
    checks.choice("reduction", reduction, checks.REDUCTIONS)
    if _debug.active():
        _debug.boxes("boxes1", boxes1)
        _debug.boxes("boxes2", boxes2)
        _debug.finite("weight", weight)
    function = getattr(_backend(), name)
    if weight is not None and weight.requires_grad:
        return _reduce(function(boxes1, boxes2, eps=eps), weight, reduction)
    loss: Tensor = function(boxes1, boxes2, reduction, eps, weight)
    return loss


def generalized_box_iou_loss(
    boxes1: Tensor,
    boxes2: Tensor,
    reduction: str = "none",
    eps: float = 1e-7,
    *,
    weight: Tensor | None = None,
) -> Tensor:
    """Generalized IoU loss (GIoU) of corresponding boxes: 1 - IoU, and a pull where none overlap.

    ``loss = 1 - inter / (union + eps) + (hull - union) / (hull + eps)``, where hull is the area of
    the smallest box around both and sides are clamped at 0: ``torchvision.ops``' function of this
    name, with its arguments and, for boxes with ``x1 <= x2`` and ``y1 <= y2``, its values.

    Args:
        boxes1 (Tensor[..., 4]): boxes as (x1, y1, x2, y2), in pixels or any other unit.
        boxes2 (Tensor[..., 4]): as many boxes, of the same dtype and device.
        reduction (str): ``"none"``, ``"sum"`` or ``"mean"`` (the sum over the number of boxes; 0
            for none). Default: ``"none"``
        eps (float): added to both divisors, in squared units of the boxes. Positive: with 0, two
            boxes without area give NaN. Default: 1e-7
        weight (Tensor[...], optional): one factor a box. Default: None, all 1

    Returns:
        Tensor[...] or Tensor[]: values in [0, 2]; float32 for half inputs, else the dtype of the
        inputs.

    Raises:
        ValueError: shapes differ, the last dimension is not 4, devices differ, unknown reduction.
        TypeError: a dtype is not floating point, the dtypes differ, or eps is no number.

    Gradient: to boxes1, boxes2 and weight; differentiable once. Ties and sides of length 0 as in
    :func:`aligned_box_iou`, so boxes that touch have the gradient of their overlap, where
    torchvision's do not. Inverted, empty and large boxes (1e20) have finite losses and gradients; a
    box with an infinite coordinate has both finite, or the loss is NaN.

    Source: H. Rezatofighi et al., *Generalized Intersection over Union* (arXiv:1902.09630).

    Example:
        >>> import torch
        >>> from hqod_ops import generalized_box_iou_loss
        >>> boxes = torch.tensor([[0., 0., 2., 2.]], requires_grad=True)
        >>> loss = generalized_box_iou_loss(boxes, torch.tensor([[4., 0., 6., 2.]]), "sum")
        >>> loss.backward()
        >>> round(loss.item(), 4), [round(g, 4) for g in boxes.grad[0, ::2].tolist()]
        (1.3333, [0.0556, -0.1667])
    """
    return _family("generalized_box_iou_loss", boxes1, boxes2, reduction, eps, weight)


def distance_box_iou_loss(
    boxes1: Tensor,
    boxes2: Tensor,
    reduction: str = "none",
    eps: float = 1e-7,
    *,
    weight: Tensor | None = None,
) -> Tensor:
    """Distance IoU loss (DIoU) of corresponding boxes: 1 - IoU, and a pull of the centres.

    ``loss = 1 - inter / (union + eps) + distance**2 / (W**2 + H**2 + eps)``, with the distance of
    the centres, and W and H the sides of the smallest box around both:
    ``torchvision.ops``' function of this name, with its arguments and, for boxes with ``x1 <= x2``
    and ``y1 <= y2``, its values.

    Args:
        boxes1 (Tensor[..., 4]): boxes as (x1, y1, x2, y2), in pixels or any other unit.
        boxes2 (Tensor[..., 4]): as many boxes, of the same dtype and device.
        reduction (str): ``"none"``, ``"sum"`` or ``"mean"`` (the sum over the number of boxes; 0
            for none). Default: ``"none"``
        eps (float): added to every divisor, in squared units of the boxes. Positive: with 0, two
            boxes without area give NaN. Default: 1e-7
        weight (Tensor[...], optional): one factor a box. Default: None, all 1

    Returns:
        Tensor[...] or Tensor[]: values in [0, 2]; float32 for half inputs, else the dtype of the
        inputs.

    Raises:
        ValueError: shapes differ, the last dimension is not 4, devices differ, unknown reduction.
        TypeError: a dtype is not floating point, the dtypes differ, or eps is no number.

    Gradient: to boxes1, boxes2 and weight; differentiable once. Ties and sides of length 0 as in
    :func:`aligned_box_iou`. Inverted, empty and large boxes (1e20) have finite losses and
    gradients: a negative side counts as 0, and the box around both is at least as long as the
    centres are apart. With an infinite coordinate the loss is NaN.

    Source: Z. Zheng et al., *Distance-IoU Loss* (arXiv:1911.08287).

    Example:
        >>> import torch
        >>> from hqod_ops import distance_box_iou_loss
        >>> boxes = torch.tensor([[0., 0., 2., 4.]], requires_grad=True)
        >>> loss = distance_box_iou_loss(boxes, torch.tensor([[1., 0., 4., 3.]]), "sum")
        >>> loss.backward()
        >>> round(loss.item(), 4), [round(g, 4) for g in boxes.grad[0].tolist()]
        (0.8638, [-0.0886, 0.0381, -0.2459, 0.0267])
    """
    return _family("distance_box_iou_loss", boxes1, boxes2, reduction, eps, weight)


def complete_box_iou_loss(
    boxes1: Tensor,
    boxes2: Tensor,
    reduction: str = "none",
    eps: float = 1e-7,
    *,
    weight: Tensor | None = None,
) -> Tensor:
    """Complete IoU loss (CIoU) of corresponding boxes: DIoU, and a pull of the aspect ratio.

    ``loss = DIoU + alpha * v``, ``v = (2 / pi * (atan(w2 / h2) - atan(w1 / h1)))**2`` and
    ``alpha = v / (1 - iou + v + eps)``, a constant; DIoU as in :func:`distance_box_iou_loss`:
    ``torchvision.ops``' function of this name, with its arguments and, for boxes with ``x1 <= x2``
    and ``y1 <= y2``, its values at the default eps, which there is in alpha alone. A box
    without width and height has the angle 0, where torchvision's loss is NaN.

    Args:
        boxes1 (Tensor[..., 4]): boxes as (x1, y1, x2, y2), in pixels or any other unit.
        boxes2 (Tensor[..., 4]): as many boxes, of the same dtype and device.
        reduction (str): ``"none"``, ``"sum"`` or ``"mean"`` (the sum over the number of boxes; 0
            for none). Default: ``"none"``
        eps (float): added to every divisor, in squared units of the boxes. Positive: with 0, two
            boxes without area give NaN. Default: 1e-7
        weight (Tensor[...], optional): one factor a box. Default: None, all 1

    Returns:
        Tensor[...] or Tensor[]: values in [0, 3]; float32 for half inputs, else the dtype of the
        inputs.

    Raises:
        ValueError: shapes differ, the last dimension is not 4, devices differ, unknown reduction.
        TypeError: a dtype is not floating point, the dtypes differ, or eps is no number.

    Gradient: to boxes1, boxes2 and weight; differentiable once. Ties and sides of length 0 as in
    :func:`aligned_box_iou`. The derivative of an angle in w is ``h / max(w**2 + h**2, eps)``, which
    no tiny box blows up. Inverted, empty and large boxes (1e20) have finite losses and gradients: a
    negative side counts as 0, and the box around both is at least as long as the centres are apart.
    With an infinite coordinate the loss is NaN.

    Source: Z. Zheng et al., *Distance-IoU Loss* (arXiv:1911.08287).

    Example:
        >>> import torch
        >>> from hqod_ops import complete_box_iou_loss
        >>> boxes = torch.tensor([[0., 0., 2., 4.]], requires_grad=True)
        >>> loss = complete_box_iou_loss(boxes, torch.tensor([[1., 0., 4., 3.]]), "sum")
        >>> loss.backward()
        >>> round(loss.item(), 4), [round(g, 4) for g in boxes.grad[0].tolist()]
        (0.866, [-0.0859, 0.0368, -0.2485, 0.028])
    """
    return _family("complete_box_iou_loss", boxes1, boxes2, reduction, eps, weight)


def efficient_box_iou_loss(
    boxes1: Tensor,
    boxes2: Tensor,
    reduction: str = "none",
    eps: float = 1e-7,
    *,
    weight: Tensor | None = None,
) -> Tensor:
    """Efficient IoU loss (EIoU) of corresponding boxes: DIoU, and a pull of width and height.

    ``loss = DIoU + (w1 - w2)**2 / (W**2 + eps) + (h1 - h2)**2 / (H**2 + eps)``, with W and H the
    sides of the smallest box around both; DIoU as in :func:`distance_box_iou_loss`.
    torchvision has none; the arguments are those of its other losses.

    Args:
        boxes1 (Tensor[..., 4]): boxes as (x1, y1, x2, y2), in pixels or any other unit.
        boxes2 (Tensor[..., 4]): as many boxes, of the same dtype and device.
        reduction (str): ``"none"``, ``"sum"`` or ``"mean"`` (the sum over the number of boxes; 0
            for none). Default: ``"none"``
        eps (float): added to every divisor, in squared units of the boxes. Positive: with 0, two
            boxes without area give NaN. Default: 1e-7
        weight (Tensor[...], optional): one factor a box. Default: None, all 1

    Returns:
        Tensor[...] or Tensor[]: values in [0, 4]; float32 for half inputs, else the dtype of the
        inputs.

    Raises:
        ValueError: shapes differ, the last dimension is not 4, devices differ, unknown reduction.
        TypeError: a dtype is not floating point, the dtypes differ, or eps is no number.

    Gradient: to boxes1, boxes2 and weight; differentiable once. Ties and sides of length 0 as in
    :func:`aligned_box_iou`. Inverted, empty and large boxes (1e20) have finite losses and
    gradients: a negative side counts as 0, and the box around both is at least as long as the
    centres are apart. With an infinite coordinate the loss is NaN.

    Source: Y.-F. Zhang et al., *Focal and Efficient IOU Loss for Accurate Bounding Box Regression*
    (arXiv:2101.08158), without its focal factor.

    Example:
        >>> import torch
        >>> from hqod_ops import efficient_box_iou_loss
        >>> boxes = torch.tensor([[0., 0., 2., 4.]], requires_grad=True)
        >>> loss = efficient_box_iou_loss(boxes, torch.tensor([[1., 0., 4., 3.]]), "sum")
        >>> loss.backward()
        >>> round(loss.item(), 4), [round(g, 4) for g in boxes.grad[0].tolist()]
        (0.9888, [0.0677, -0.0712, -0.3709, 0.1205])
    """
    return _family("efficient_box_iou_loss", boxes1, boxes2, reduction, eps, weight)


def scylla_box_iou_loss(
    boxes1: Tensor,
    boxes2: Tensor,
    reduction: str = "none",
    eps: float = 1e-7,
    *,
    weight: Tensor | None = None,
) -> Tensor:
    """SCYLLA IoU loss (SIoU) of corresponding boxes: IoU, distance by angle, and shape.

    ``loss = 1 - inter / (union + eps) + (D + S) / 2``, where, with the centres (dx, dy) apart and W
    and H the sides of the smallest box around both,

    - ``D = 2 - exp(-(2 - A) * dx**2 / (W**2 + eps)) - exp(-(2 - A) * dy**2 / (H**2 + eps))`` with
      the angle cost ``A = 2 * |dx * dy| / (dx**2 + dy**2 + eps)``: 0 along an axis, 1 diagonally;
    - ``S = (1 - exp(-|w1 - w2| / (max(w1, w2) + eps)))**4``, and as much of the heights.

    torchvision has none; the arguments are those of its other losses.

    Args:
        boxes1 (Tensor[..., 4]): boxes as (x1, y1, x2, y2), in pixels or any other unit.
        boxes2 (Tensor[..., 4]): as many boxes, of the same dtype and device.
        reduction (str): ``"none"``, ``"sum"`` or ``"mean"`` (the sum over the number of boxes; 0
            for none). Default: ``"none"``
        eps (float): added to every divisor, in squared units of the boxes. Positive: with 0, two
            boxes without area give NaN. Default: 1e-7
        weight (Tensor[...], optional): one factor a box. Default: None, all 1

    Returns:
        Tensor[...] or Tensor[]: values in [0, 3]; float32 for half inputs, else the dtype of the
        inputs.

    Raises:
        ValueError: shapes differ, the last dimension is not 4, devices differ, unknown reduction.
        TypeError: a dtype is not floating point, the dtypes differ, or eps is no number.

    Gradient: to boxes1, boxes2 and weight; differentiable once. Ties and sides of length 0 as in
    :func:`aligned_box_iou`. Inverted, empty and large boxes (1e20) have finite losses and
    gradients: a negative side counts as 0, and the box around both is at least as long as the
    centres are apart. With an infinite coordinate the loss is NaN.

    Source: Z. Gevorgyan, *SIoU Loss: More Powerful Learning for Bounding Box Regression*
    (arXiv:2205.12740), with theta = 4.

    Example:
        >>> import torch
        >>> from hqod_ops import scylla_box_iou_loss
        >>> boxes = torch.tensor([[0., 0., 2., 4.]], requires_grad=True)
        >>> loss = scylla_box_iou_loss(boxes, torch.tensor([[1., 0., 4., 3.]]), "sum")
        >>> loss.backward()
        >>> round(loss.item(), 4), [round(g, 4) for g in boxes.grad[0].tolist()]
        (0.8903, [-0.0743, 0.0023, -0.2742, 0.0184])
    """
    return _family("scylla_box_iou_loss", boxes1, boxes2, reduction, eps, weight)
