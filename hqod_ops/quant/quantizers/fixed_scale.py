"""Scales that stay as calibration found them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hqod_ops.quant.quantizers.base import Quantizer
from hqod_ops.quant.quantizers.state import Codes, Values


class FixedScale(Quantizer):
    """A quantizer without parameters: its scale is a buffer, and x alone has a gradient.

    The base of the plain straight-through quantizer, the frozen TQT and DoReFa.

    Args:
        bits (int), **options: see :class:`Quantizer`.
    """

    trained = False
    scale: Tensor

    def effective_scale(self, level: int = 0) -> Tensor:
        return self._value("scale", level)

    def _encode(self, scale: Tensor, zero_point: Tensor | None, codes: Sequence[Codes]) -> Values:
        return {"scale": scale}
