"""Weights whose rounding is learned: AdaRound's codes in place of a weight's quantizer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hqod_ops.quant.nn.layers import QATLayer

LOW, HIGH = -0.1, 1.1
"""The range that the sigmoid is stretched to, before it is cut to [0, 1]."""


@torch.no_grad()
def can_learn(layer: QATLayer) -> bool:
    """Whether the quantizer of a layer's weight rounds the weight itself, not a function of it, and
    the layer does not make its weight anew for every pass."""
    quantizer, weight = layer.weight_quantizer, layer.weight
    if quantizer is None or not quantizer.calibrated or "weight" not in layer._parameters:
        return False
    return torch.equal(quantizer.transform(weight).to(weight.dtype), weight)


class SoftRounding(nn.Module):
    """Stands in for the quantizer of a layer's weight while its rounding is learned.

    ``w = s (clamp(floor(x / s + z) + round(h), qmin, qmax) - z)``,
    ``h = clamp(1.2 sigmoid(v) - 0.1, 0, 1)``, where v (``logits``) starts where h is what the floor
    has cut off. The gradient to h passes the rounding unchanged.

    Args:
        layer (QATLayer): one that :func:`can_learn`.
    """

    def __init__(self, layer: QATLayer) -> None:
        super().__init__()
        quantizer = layer.weight_quantizer
        assert quantizer is not None
        self.codes = quantizer.codes()
        weight = layer.weight.detach()
        shape = [1] * weight.dim()
        if quantizer.ch_axis is not None:
            shape[quantizer.ch_axis] = -1
        self.scale = quantizer.effective_scale().detach().view(shape)
        zero = quantizer.effective_zero_point()
        self.zero = torch.zeros_like(self.scale) if zero is None else zero.detach().view(shape)
        place = weight.to(self.scale.dtype) / self.scale + self.zero
        self.nearest = place.round().clamp(*self.codes)
        self.floor = place.floor()
        rest = (place - self.floor).clamp(0.01, 0.99)
        self.logits = nn.Parameter(torch.logit((rest - LOW) / (HIGH - LOW)))

    def up(self) -> Tensor:
        """h: how far each code is rounded up."""
        return (self.logits.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The weight on its grid."""
        up = self.up()
        codes = (self.floor + ((up >= 0.5).to(up) + up - up.detach())).clamp(*self.codes)
        return ((codes - self.zero) * self.scale).to(x.dtype)

    @torch.no_grad()
    def land(self, weight: Tensor) -> int:
        """Write to a weight what it was learned to be rounded to, where that is not what it is.

        Returns:
            int: the number of weights that changed.
        """
        hard = (self.floor + (self.up() >= 0.5)).clamp(*self.codes)
        changed = hard != self.nearest
        weight.copy_(torch.where(changed, (hard - self.zero) * self.scale, weight).to(weight))
        return int(changed.sum())
