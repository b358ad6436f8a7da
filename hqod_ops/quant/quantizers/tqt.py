"""TQT: trained quantization thresholds, with scales that are powers of two."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hqod_ops.quant.quantizers.base import Quantizer
from hqod_ops.quant.quantizers.fixed_scale import FixedScale
from hqod_ops.quant.quantizers.state import Codes, StateOptions, Values, per_level
from hqod_ops.quant.signatures import Unpack


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float32, exact on every device, for whole exponents within [-126, 127].

    Example:
        >>> power_of_two(torch.tensor([-2.0, 3.0]))
        tensor([0.2500, 8.0000])
    """
    # A float's bits; the exponential functions of some devices are off in the last of them.
    biased = exponent.clamp(-126, 127).to(torch.int32) + 127
    return (biased << 23).view(torch.float32)


def exact_log2(x: Tensor) -> tuple[Tensor, Tensor]:
    """log2(x), and where x is a power of two, for which it is exact.

    Args:
        x (Tensor[*]): positive.

    Returns:
        (Tensor[*], bool Tensor[*])
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mantissa, exponent = torch.frexp(x)
    whole = mantissa == 0.5
    return torch.where(whole, exponent.to(x.dtype) - 1, x.log2()), whole


def _range_exponents(codes: Sequence[Codes]) -> list[int]:
    """log2(threshold / scale) of each level."""
    return [(high + 1).bit_length() - 1 for _, high in codes]


class TQT(Quantizer):
    """Trained quantization thresholds: the scale is a power of two, its exponent is learned.

    ``y = clamp(round(x / s), qmin, qmax) * s`` by :func:`hqod_ops.fake_quant`, with
    ``s = 2^ceil(t) / (qmax + 1)``, where t (``log2_threshold``) is log2 of the range's threshold
    and ``qmax + 1`` is 2^(bits - 1) for signed and 2^bits for unsigned codes. Dividing by s is then
    a shift of bits in integer hardware.

    A calibrated scale that is not a power of two starts at the next greater one. A power of two
    itself, as the observers ``"power_of_two"`` and ``"power_of_two_range"`` find it, starts with t
    in the middle of its interval, where a step in either direction does not change the scale yet.

    Args:
        bits (int), **options: see :class:`Quantizer`.
        observer (str): see :class:`Quantizer`. Default: ``"power_of_two"``
        grad_scale (float or str, optional): factor of the gradient of t, see
            :func:`hqod_ops.fake_quant`; None is the paper's, which trains thresholds with Adam.
            Default: ``"lsq"``, for one optimizer such as SGD for weights and thresholds

    Gradient: with the unclamped code c: inside the range ``dx = dy``,
    ``dt = s ln(2) (c - x / s) dy``; outside ``dx = 0``, ``dt = s ln(2) qmin dy`` or
    ``s ln(2) qmax dy``; dt is summed up and multiplied by grad_scale. Ceil is straight-through.

    Source: TQT (arXiv:1903.08066), section 3.

    Example:
        >>> import torch
        >>> from hqod_ops.quant import TQT
        >>> quantizer = TQT(4)
        >>> quantizer.set_scale(torch.tensor([0.1]), signed=True)
        >>> quantizer.effective_scale().item()
        0.125
        >>> quantizer(torch.tensor([-2.0, -0.3, 0.2])).tolist()
        [-1.0, -0.25, 0.25]
    """

    values = ("log2_threshold",)
    log2_threshold: Tensor

    def __init__(
        self,
        bits: int,
        *,
        observer: str = "power_of_two",
        grad_scale: float | str | None = "lsq",
        **options: Unpack[StateOptions],
    ) -> None:
        super().__init__(bits, observer=observer, **options)
        self.grad_scale = grad_scale

    def effective_scale(self, level: int = 0) -> Tensor:
        threshold = self._value("log2_threshold", level)
        with torch.no_grad():
            (exponent,) = _range_exponents([self.codes(level)])
            scale = power_of_two(threshold.ceil() - exponent)
            if threshold.dtype == torch.float64:
                scale = scale.double()
        # Exactly 1, with the derivative of 2^t over 2^t; NaN for a threshold that is not finite.
        return scale * (1 + math.log(2) * (threshold - threshold.detach()))

    def _encode(self, scale: Tensor, zero_point: Tensor | None, codes: Sequence[Codes]) -> Values:
        exponent, whole = exact_log2(scale)
        return {
            "log2_threshold": exponent
            - 0.5 * whole.to(scale.dtype)
            + per_level(_range_exponents(codes), scale)
        }


class TQTFrozen(FixedScale):
    """TQT as the HQOD code has it: power-of-two scales that stay as calibration found them.

    ``y = clamp(round(x / s), qmin, qmax) * s`` by :func:`hqod_ops.fake_quant`, where s is the least
    power of two that is at least the calibrated scale. The official code names a threshold, but
    returns no gradient for it. It also takes s = 1 for scales below 2^-15, which its own observer
    cannot find and which would zero the tensor; that is left out.

    Args:
        bits (int), **options: see :class:`Quantizer`.
        observer (str): see :class:`Quantizer`; official are ``"power_of_two"``, and for the input
            of the network ``"power_of_two_range"``. Default: ``"power_of_two"``
        official_ties (bool): round negative halves up, -1.5 to -1, as the official code does for
            layer inputs; ONNX rounds them to even, as is done here for weights. Default: False

    Gradient: ``dx = dy`` where the unclamped code is in range, else 0.

    Source: the HQOD code's TQT quantizer, after TQT (arXiv:1903.08066).

    Example:
        >>> import torch
        >>> from hqod_ops.quant import TQTFrozen
        >>> quantizer = TQTFrozen(4)
        >>> quantizer.set_scale(torch.tensor([0.1]), signed=True)
        >>> quantizer.effective_scale().item()
        0.125
    """

    def __init__(
        self,
        bits: int,
        *,
        observer: str = "power_of_two",
        official_ties: bool = False,
        **options: Unpack[StateOptions],
    ) -> None:
        super().__init__(bits, observer=observer, **options)
        self.official_ties = official_ties

    def onnx_problem(self, level: int = 0) -> str | None:
        if not self.official_ties or self.codes(level)[0] >= 0:
            return None
        return (
            "ONNX rounds halves to even, it cannot express official_ties, which rounds negative "
            "ones up"
        )

    def transform(self, x: Tensor, level: int = 0) -> Tensor:
        if not self.official_ties:
            return x
        wide = x.to(torch.promote_types(x.dtype, self.scale.dtype))
        with torch.no_grad():
            scale = self._along(x, self.effective_scale(level))
            ratio = wide / scale
            tie = (ratio < 0) & (ratio - ratio.floor() == 0.5)
            nudge = torch.where(tie, scale / 4, torch.zeros_like(scale))
        return wide + nudge

    def _encode(self, scale: Tensor, zero_point: Tensor | None, codes: Sequence[Codes]) -> Values:
        exponent, _ = exact_log2(scale)
        return {"scale": power_of_two(exponent.ceil()).to(scale.dtype)}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, official_ties={self.official_ties}"
