"""LSQ+: learned step size and offset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hqod_ops.quant.quantizers.learned_scale import LinearScale, clamp_through
from hqod_ops.quant.quantizers.state import Codes, Values


class LSQPlus(LinearScale):
    """LSQ with a learned offset: for inputs such as SiLU's, whose range is not symmetric.

    ``y = clamp(round(x / s) + z, qmin, qmax) - z) * s`` by :func:`hqod_ops.fake_quant`, with
    ``z = round(-b / s)`` for the learned offset b (``offset``, in units of x), the value of code 0.
    z is kept within [qmin, qmax], where 0 is on the grid: zero padding stays exact, and the zero
    point fits its integer type. Calibration spans the observed range with all codes.

    Args:
        bits (int), **options: see :class:`Quantizer`; the observer must find a zero point, which
            ``"lsq"`` and the powers of two do not.
        scale_mode (str): how s is kept positive, see :class:`LSQ`. Default: ``"abs"``
        grad_scale (float or str, optional): factor of the gradients of s and b, see
            :func:`hqod_ops.fake_quant`. Default: ``"lsq"``

    Raises:
        ValueError: scale_mode is unknown, and as :class:`Quantizer`.

    Gradient: that of the paper. With the unclamped code c and k = clamp(c, qmin, qmax): inside the
    range ``dx = dy``, ``ds = (k - z - x / s) dy``, ``db = 0``; outside ``dx = 0``,
    ``ds = (k - round(-b / s) - b / s) dy`` (k but for the rounding of z), ``db = dy``; ds and db
    are summed up and multiplied by grad_scale. Where z is held at a bound, b has the same gradient,
    so that it can come back.

    Source: LSQ+ (arXiv:2004.09576), section 3.1, with the offset rounded to the grid.

    Example:
        >>> import torch
        >>> from hqod_ops.quant import LSQPlus
        >>> quantizer = LSQPlus(2)
        >>> quantizer.set_scale(torch.tensor([0.5]), False, zero_point=torch.tensor([1.0]))
        >>> quantizer(torch.tensor([-0.8, 0.2, 0.6, 3.0])).tolist()
        [-0.5, 0.0, 0.5, 1.0]
    """

    values = ("scale", "offset")
    symmetric = False
    offset: Tensor

    def _zero_point(self, scale: Tensor, level: int) -> Tensor:
        """-b / s within the codes, not rounded."""
        return clamp_through(-self._value("offset", level) / scale, *self.codes(level))

    def effective_zero_point(self, level: int = 0) -> Tensor:
        return self._zero_point(self.effective_scale(level), level).detach().round()

    def arguments(self, level: int = 0) -> dict[str, Any]:
        arguments = super().arguments(level)
        return {**arguments, "zero_point": self._zero_point(arguments["scale"], level)}

    def _encode(self, scale: Tensor, zero_point: Tensor | None, codes: Sequence[Codes]) -> Values:
        offset = scale * 0 if zero_point is None else -zero_point * scale
        return {**super()._encode(scale, zero_point, codes), "offset": offset}
