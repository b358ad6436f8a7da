"""DoReFa: weights squeezed by tanh."""

from __future__ import annotations

import torch
from torch import Tensor

from hqod_ops.quant.quantizers.fixed_scale import FixedScale

GUARD = 1e-5
"""Added to the divisor, as in the official code."""


class DoReFa(FixedScale):
    """DoReFa's weight quantization: squeezed by tanh, then rounded; for weights alone.

    ``y = clamp(round(v / s), qmin, qmax) * s`` by :func:`hqod_ops.fake_quant` for the squeezed
    weight ``v = tanh(w) / (max|tanh(w)| + 1e-5)``, with a scale that stays as calibration found it
    for v. The maximum is that of the whole tensor, also with one scale a channel.

    The result spans about [-1, 1], whatever the size of w: the layer needs a batch norm behind it
    (the paper leaves the first and the last layer in float).

    Args:
        bits (int), **options: see :class:`Quantizer`.

    Gradient: straight-through for the rounding, where the unclamped code is in range; the true
    derivative of v, its maximum included.

    Source: DoReFa-Net (arXiv:1606.06160), section 2.3, on symmetric codes with a 0, as the HQOD
    code has it.

    Example:
        >>> import torch
        >>> from hqod_ops.quant import DoReFa
        >>> quantizer = DoReFa(2)
        >>> quantizer.set_scale(torch.tensor([0.5]), signed=True)
        >>> quantizer(torch.tensor([-0.02, 0.001, 0.01])).tolist()
        [-1.0, 0.0, 0.5]
    """

    roles = frozenset({"weight"})

    def transform(self, x: Tensor, level: int = 0) -> Tensor:
        squeezed = x.to(torch.promote_types(x.dtype, self.scale.dtype)).tanh()
        return squeezed / (squeezed.abs().amax() + GUARD) if x.numel() else squeezed

    def _to_observe(self, x: Tensor) -> Tensor:
        return self.transform(x)
