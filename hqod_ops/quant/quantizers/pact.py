"""PACT: parameterized clipping of activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hqod_ops.quant.quantizers.learned_scale import LearnedScale, inverse_positive
from hqod_ops.quant.quantizers.state import Codes, Values, per_level


class PACT(LearnedScale):
    """Parameterized clipping activation: the end of an input's range is learned, for inputs alone.

    ``y = round(clip(x, 0, a) / s) * s`` with ``s = a / qmax`` for the learned a (``alpha``), the
    rounding by :func:`hqod_ops.fake_quant`; for signed codes ``clip(x, -a, a)``, which leaves the
    code qmin without a use. Calibration sets a to ``qmax * scale``, where the paper starts with a
    large constant and lets weight decay pull it down (which
    :func:`hqod_ops.quant.parameter_groups` switches off unless told otherwise).

    Args:
        bits (int), **options: see :class:`Quantizer`; ch_axis must be None, PACT has one range for
            the whole tensor.
        scale_mode (str): how a is kept positive, see :class:`LSQ`. Default: ``"abs"``

    Raises:
        ValueError: scale_mode is unknown, and as :class:`Quantizer`.

    Gradient: ``dx = dy`` for ``0 <= x < a`` (signed: ``-a < x < a``), else 0; a gets the sum of dy
    over ``x >= a``, less that over ``x <= -a`` if signed.

    Source: PACT (arXiv:1805.06085), section 3. In the HQOD code a acts in calibration alone.

    Example:
        >>> import torch
        >>> from hqod_ops.quant import PACT
        >>> quantizer = PACT(2)
        >>> quantizer.set_scale(torch.tensor([0.5]), signed=False)
        >>> x = torch.tensor([-1.0, 0.7, 1.4, 9.0], requires_grad=True)
        >>> y = quantizer(x)
        >>> y.sum().backward()
        >>> y.tolist(), x.grad.tolist(), quantizer.alpha.grad.tolist()
        ([0.0, 0.5, 1.5, 1.5], [0.0, 1.0, 1.0, 0.0], [1.0])
    """

    roles = frozenset({"input"})
    per_channel = False
    values = ("alpha",)
    alpha: Tensor

    def effective_scale(self, level: int = 0) -> Tensor:
        return self._positive("alpha", level) / self.codes(level)[1]

    def _used_scale(self, level: int) -> Tensor:
        return self._used("alpha", level) / self.codes(level)[1]

    def arguments(self, level: int = 0) -> dict[str, Any]:
        arguments = super().arguments(level)
        # What is rounded lies within the range; alpha has its gradient from the clipping alone.
        return {**arguments, "scale": arguments["scale"].detach()}

    def transform(self, x: Tensor, level: int = 0) -> Tensor:
        alpha = self._used("alpha", level)
        wide = x.to(torch.promote_types(x.dtype, alpha.dtype))
        if self.codes(level)[0] < 0:
            clipped = torch.where(wide <= -alpha, -alpha, wide)
        else:
            clipped = torch.where(wide < 0, torch.zeros_like(alpha), wide)
        return torch.where(wide >= alpha, alpha, clipped)

    def _encode(self, scale: Tensor, zero_point: Tensor | None, codes: Sequence[Codes]) -> Values:
        alpha = scale * per_level([high for _, high in codes], scale)
        return {"alpha": inverse_positive(alpha, self.scale_mode)}
