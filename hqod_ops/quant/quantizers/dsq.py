"""DSQ: differentiable soft quantization."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hqod_ops.functional import fake_quant
from hqod_ops.quant.quantizers.learned_scale import (
    EPS,
    LinearOptions,
    LinearScale,
    clamp_through,
)
from hqod_ops.quant.quantizers.state import Codes, Values
from hqod_ops.quant.signatures import Unpack
from hqod_ops.reference import lsq_grad_scale


class DSQ(LinearScale):
    """Differentiable soft quantization: the gradient is that of a staircase of tanh curves.

    The value is that of LSQ, ``y = clamp(round(x / s), qmin, qmax) * s``. The gradient is that of
    ``s * phi(clamp(x / s, qmin, qmax))``, where phi rises from n to n + 1 between whole numbers:

    ``phi(v) = n + 1/2 + tanh(k (v - n - 1/2)) / (2 (1 - a))``, ``n = floor(v)``,
    ``k = ln(2 / a - 1)``

    Scale s and characteristic a (``alpha``) are learned; a is kept within [eps, 0.5], the smaller
    the steeper, with its gradient passed also beyond. It costs several passes over x, and keeps
    intermediate results for the backward pass, where the other quantizers keep x alone.

    Args:
        bits (int), **options: see :class:`Quantizer`.
        alpha (float): a at the start, in (0, 0.5]. Default: 0.4
        scale_mode (str): how s is kept positive, see :class:`LSQ`; the HQOD code also bounds it by
            1. Default: ``"abs"``
        grad_scale (float or str, optional): factor of the gradients of s and a, see
            :func:`hqod_ops.fake_quant`; None is the HQOD code's. Default: ``"lsq"``

    Raises:
        ValueError: alpha is out of range, scale_mode is unknown, and as :class:`Quantizer`.

    Source: DSQ (arXiv:1908.05033), section 3.1, with the details of the HQOD code.

    Example:
        >>> import torch
        >>> from hqod_ops.quant import DSQ
        >>> quantizer = DSQ(2)
        >>> quantizer.set_scale(torch.tensor([1.0]), signed=True)
        >>> x = torch.tensor([-1.2, 0.5, 0.9], requires_grad=True)
        >>> y = quantizer(x)
        >>> y.sum().backward()
        >>> y.tolist(), [round(g, 3) for g in x.grad.tolist()]
        ([-1.0, 0.0, 1.0], [0.976, 1.155, 0.862])
    """

    plain = False
    values = ("scale", "alpha")
    alpha: Tensor

    def __init__(self, bits: int, *, alpha: float = 0.4, **options: Unpack[LinearOptions]) -> None:
        super().__init__(bits, **options)
        if not 0 < alpha <= 0.5:
            raise ValueError(f"alpha: expected a value in (0, 0.5], got {alpha}")
        self.initial_alpha = alpha

    def _quantize(self, x: Tensor, level: int) -> Tensor:
        arguments = self.arguments(level)
        scale, alpha = arguments["scale"], clamp_through(self._value("alpha", level), EPS, 0.5)
        hard = fake_quant(x.detach(), **{**arguments, "scale": scale.detach()})
        factor = self._gradient_factor(x, scale, arguments["quant_max"])
        wide = torch.promote_types(x.dtype, torch.float32)
        s, a = (self._along(x, _scale_gradient(v.to(wide), factor)) for v in (scale, alpha))
        ratio = x.to(wide) / s
        bound = ratio.detach().clamp(arguments["quant_min"], arguments["quant_max"])
        soft = s * _staircase(torch.where(ratio == bound, ratio, bound), a)
        return hard + (soft - soft.detach()).to(x.dtype)

    def _gradient_factor(self, x: Tensor, scale: Tensor, quant_max: int) -> float:
        if isinstance(self.grad_scale, str):
            return lsq_grad_scale(x.numel(), scale.numel(), quant_max)
        return 1.0 if self.grad_scale is None else self.grad_scale

    def _encode(self, scale: Tensor, zero_point: Tensor | None, codes: Sequence[Codes]) -> Values:
        alpha = torch.full_like(scale, self.initial_alpha)
        return {**super()._encode(scale, zero_point, codes), "alpha": alpha}


def _staircase(v: Tensor, alpha: Tensor) -> Tensor:
    """phi(v), see :class:`DSQ`."""
    floor = v.detach().floor()
    steepness = (2 / alpha - 1).log()
    return floor + 0.5 + (steepness * (v - floor - 0.5)).tanh() / (2 * (1 - alpha))


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x, with its gradient multiplied by a factor."""
    return x.detach() + (x - x.detach()) * factor
