"""Plain straight-through fake quantization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hqod_ops.quant.observers.registry import check_observer
from hqod_ops.quant.quantizers.fixed_scale import FixedScale
from hqod_ops.quant.quantizers.state import Codes, StateOptions, Values
from hqod_ops.quant.signatures import Unpack


class MinMaxSTE(FixedScale):
    """The range found in calibration, and the straight-through gradient: nothing is learned.

    ``y = (clamp(round(x / s) + z, qmin, qmax) - z) * s`` by :func:`hqod_ops.fake_quant`, s and z
    those of the observer. The baseline that the quantizers with learned scales are measured by.

    Args:
        bits (int), **options: see :class:`Quantizer`.
        observer (str): see :class:`Quantizer`. Default: ``"minmax"``
        symmetric (bool): zero point 0; else the codes span the range from its least value to its
            greatest. Default: True

    Gradient: ``dx = dy`` where the unclamped code is in range, else 0.

    Source: integer-arithmetic-only inference (arXiv:1712.05877), section 3.

    Example:
        >>> import torch
        >>> from hqod_ops.quant import MinMaxSTE
        >>> quantizer = MinMaxSTE(2, symmetric=False)
        >>> quantizer.set_scale(torch.tensor([0.5]), False, zero_point=torch.tensor([1.0]))
        >>> quantizer(torch.tensor([-0.8, 0.2, 0.6, 3.0])).tolist()
        [-0.5, 0.0, 0.5, 1.0]
    """

    values = ("scale", "zero_point")

    def __init__(
        self,
        bits: int,
        *,
        observer: str = "minmax",
        symmetric: bool = True,
        **options: Unpack[StateOptions],
    ) -> None:
        super().__init__(bits, observer=observer, **options)
        check_observer(observer, symmetric)
        self.symmetric = symmetric

    def effective_zero_point(self, level: int = 0) -> Tensor | None:
        # Rounded, as fake_quant does: an average of models need not be whole.
        return None if self.symmetric else self._value("zero_point", level).round()

    def arguments(self, level: int = 0) -> dict[str, Any]:
        return {**super().arguments(level), "zero_point": self.effective_zero_point(level)}

    def _encode(self, scale: Tensor, zero_point: Tensor | None, codes: Sequence[Codes]) -> Values:
        return {"scale": scale, "zero_point": scale * 0 if zero_point is None else zero_point}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, symmetric={self.symmetric}"
