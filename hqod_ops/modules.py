"""The ops as ``nn.Module``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hqod_ops import checks
from hqod_ops import functional as F


class HarmoniousIoULoss(nn.Module):
    """See :func:`hqod_ops.harmonious_iou_loss`.

    Example:
        >>> import torch
        >>> from hqod_ops import HarmoniousIoULoss
        >>> boxes = torch.tensor([[0., 0., 2., 2.]])
        >>> HarmoniousIoULoss()(boxes, boxes)
        tensor(0.)
    """

    def __init__(self, alpha: float = 1.5, gamma: float = 0.8, reduction: str = "mean") -> None:
        super().__init__()
        checks.number("alpha", alpha)
        checks.number("gamma", gamma)
        checks.choice("reduction", reduction, checks.REDUCTIONS)
        self.alpha, self.gamma, self.reduction = alpha, gamma, reduction

    def forward(self, pred: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        return F.harmonious_iou_loss(
            pred,
            target,
            alpha=self.alpha,
            gamma=self.gamma,
            weight=weight,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, gamma={self.gamma}, reduction={self.reduction!r}"


class _BoxIoULoss(nn.Module):
    """A loss of the IoU family."""

    function: Callable[..., Tensor]

    def __init__(self, eps: float = 1e-7, reduction: str = "mean") -> None:
        super().__init__()
        checks.number("eps", eps)
        checks.choice("reduction", reduction, checks.REDUCTIONS)
        self.eps, self.reduction = eps, reduction

    def forward(self, boxes1: Tensor, boxes2: Tensor, weight: Tensor | None = None) -> Tensor:
        return self.function(boxes1, boxes2, self.reduction, self.eps, weight=weight)

    def extra_repr(self) -> str:
        return f"eps={self.eps}, reduction={self.reduction!r}"


class GeneralizedBoxIoULoss(_BoxIoULoss):
    """See :func:`hqod_ops.generalized_box_iou_loss`.

    Example:
        >>> import torch
        >>> from hqod_ops import GeneralizedBoxIoULoss
        >>> boxes = torch.tensor([[0., 0., 2., 2.]])
        >>> GeneralizedBoxIoULoss()(boxes, boxes)
        tensor(0.)
    """

    function = staticmethod(F.generalized_box_iou_loss)


class DistanceBoxIoULoss(_BoxIoULoss):
    """See :func:`hqod_ops.distance_box_iou_loss`.

    Example:
        >>> import torch
        >>> from hqod_ops import DistanceBoxIoULoss
        >>> boxes = torch.tensor([[0., 0., 2., 2.]])
        >>> DistanceBoxIoULoss()(boxes, boxes)
        tensor(0.)
    """

    function = staticmethod(F.distance_box_iou_loss)


class CompleteBoxIoULoss(_BoxIoULoss):
    """See :func:`hqod_ops.complete_box_iou_loss`.

    Example:
        >>> import torch
        >>> from hqod_ops import CompleteBoxIoULoss
        >>> boxes = torch.tensor([[0., 0., 2., 2.]])
        >>> CompleteBoxIoULoss()(boxes, boxes)
        tensor(0.)
    """

    function = staticmethod(F.complete_box_iou_loss)


class EfficientBoxIoULoss(_BoxIoULoss):
    """See :func:`hqod_ops.efficient_box_iou_loss`.

    Example:
        >>> import torch
        >>> from hqod_ops import EfficientBoxIoULoss
        >>> boxes = torch.tensor([[0., 0., 2., 2.]])
        >>> EfficientBoxIoULoss()(boxes, boxes)
        tensor(0.)
    """

    function = staticmethod(F.efficient_box_iou_loss)


class ScyllaBoxIoULoss(_BoxIoULoss):
    """See :func:`hqod_ops.scylla_box_iou_loss`.

    Example:
        >>> import torch
        >>> from hqod_ops import ScyllaBoxIoULoss
        >>> boxes = torch.tensor([[0., 0., 2., 2.]])
        >>> ScyllaBoxIoULoss()(boxes, boxes)
        tensor(0.)
    """

    function = staticmethod(F.scylla_box_iou_loss)


class TCorrLoss(nn.Module):
    """See :func:`hqod_ops.tcorr_loss`.

    Example:
        >>> import torch
        >>> from hqod_ops import TCorrLoss
        >>> TCorrLoss(logits=True)(torch.tensor([2.2]), torch.tensor([0.9]))
        tensor(0.0693)
    """

    def __init__(
        self, logits: bool = False, variant: str = "official", reduction: str = "mean"
    ) -> None:
        super().__init__()
        checks.flag("logits", logits)
        checks.choice("variant", variant, checks.VARIANTS)
        checks.choice("reduction", reduction, checks.REDUCTIONS)
        self.logits, self.variant, self.reduction = logits, variant, reduction

    def forward(self, scores: Tensor, ious: Tensor, weight: Tensor | None = None) -> Tensor:
        return F.tcorr_loss(
            scores,
            ious,
            logits=self.logits,
            variant=self.variant,
            weight=weight,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return f"logits={self.logits}, variant={self.variant!r}, reduction={self.reduction!r}"


class HQODLoss(nn.Module):
    """See :func:`hqod_ops.hqod_loss`.

    Example:
        >>> import torch
        >>> from hqod_ops import HQODLoss
        >>> boxes = torch.tensor([[0., 0., 2., 2.]])
        >>> HQODLoss(logits=True)(boxes, boxes, torch.tensor([40.]))
        tensor(0.)
    """

    def __init__(
        self,
        logits: bool = False,
        alpha: float = 1.5,
        gamma: float = 0.8,
        variant: str = "official",
        hiou_weight: float = 1.0,
        tcorr_weight: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        checks.flag("logits", logits)
        checks.number("alpha", alpha)
        checks.number("gamma", gamma)
        checks.number("hiou_weight", hiou_weight)
        checks.number("tcorr_weight", tcorr_weight)
        checks.choice("variant", variant, checks.VARIANTS)
        checks.choice("reduction", reduction, checks.REDUCTIONS)
        self.logits, self.alpha, self.gamma, self.variant = logits, alpha, gamma, variant
        self.hiou_weight, self.tcorr_weight, self.reduction = hiou_weight, tcorr_weight, reduction

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        scores: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor:
        return F.hqod_loss(
            pred,
            target,
            scores,
            logits=self.logits,
            alpha=self.alpha,
            gamma=self.gamma,
            variant=self.variant,
            hiou_weight=self.hiou_weight,
            tcorr_weight=self.tcorr_weight,
            weight=weight,
            avg_factor=avg_factor,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return (
            f"logits={self.logits}, alpha={self.alpha}, gamma={self.gamma}, "
            f"variant={self.variant!r}, hiou_weight={self.hiou_weight}, "
            f"tcorr_weight={self.tcorr_weight}, reduction={self.reduction!r}"
        )


class FakeQuant(nn.Module):
    """:func:`hqod_ops.fake_quant` with its scale (and zero point) as parameters.

    Args:
        quant_min (int), quant_max (int): the codes' range.
        scale (float or Tensor[C]): initial step size. Default: 1.0
        zero_point (float or Tensor[C], optional): initial zero point, learned. Default: None
        ch_axis (int, optional): axis with a scale of its own for every index. Default: None
        grad_scale (float or str, optional): see :func:`hqod_ops.fake_quant`. Default: ``"lsq"``
        activation (str, optional): ``"relu"`` or ``"relu6"``, applied first. Default: None

    The scale is used as it is: see ``hqod_ops.quant`` for quantizers that keep it positive.

    Example:
        >>> import torch
        >>> from hqod_ops import FakeQuant
        >>> FakeQuant(-2, 1, scale=0.5)(torch.tensor([0.3, -2.0])).tolist()
        [0.5, -1.0]
    """

    zero_point: nn.Parameter | None

    def __init__(
        self,
        quant_min: int,
        quant_max: int,
        scale: float | Tensor = 1.0,
        zero_point: float | Tensor | None = None,
        ch_axis: int | None = None,
        grad_scale: float | str | None = "lsq",
        activation: str | None = None,
    ) -> None:
        super().__init__()
        quant_min = checks.integer("quant_min", quant_min)
        quant_max = checks.integer("quant_max", quant_max)
        checks.quant_range(quant_min, quant_max)
        checks.activation(activation)
        checks.grad_scale(grad_scale)
        self.quant_min, self.quant_max = quant_min, quant_max
        self.ch_axis, self.grad_scale, self.activation = ch_axis, grad_scale, activation
        self.scale = nn.Parameter(torch.as_tensor(scale, dtype=torch.get_default_dtype()).clone())
        self.zero_point = (
            None
            if zero_point is None
            else nn.Parameter(torch.as_tensor(zero_point, dtype=self.scale.dtype).clone())
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.fake_quant(
            x,
            self.scale,
            self.zero_point,
            quant_min=self.quant_min,
            quant_max=self.quant_max,
            ch_axis=self.ch_axis,
            grad_scale=self.grad_scale,
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        return (
            f"quant_min={self.quant_min}, quant_max={self.quant_max}, ch_axis={self.ch_axis}, "
            f"grad_scale={self.grad_scale!r}, activation={self.activation!r}"
        )
