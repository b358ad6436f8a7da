"""Observers that need no search: ranges, their moving average, and LSQ's mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hqod_ops.quant.observers.base import (
    Observer,
    ObserverOptions,
    RangeObserver,
    code_range,
    weighted_mean,
)
from hqod_ops.quant.signatures import Unpack


class MinMax(RangeObserver):
    """The whole observed range, from the least value to the greatest.

    Source: the weight observer of the HQOD code.

    Example:
        >>> observer = MinMax(2, signed=True)
        >>> observer.observe(torch.tensor([-0.3, 0.6]))
        >>> observer.scale()
        tensor([0.4000])
    """

    _statistics = ("_low", "_high")
    _low: Tensor
    _high: Tensor

    def _update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        if self.count:
            low, high = torch.minimum(self._low, low), torch.maximum(self._high, high)
        self._low, self._high = low, high

    def _merge(self, states: Sequence[dict[str, Any]]) -> None:
        self._low = torch.stack([state["_low"] for state in states]).amin(dim=0)
        self._high = torch.stack([state["_high"] for state in states]).amax(dim=0)

    def _range(self) -> tuple[Tensor, Tensor]:
        return self._low, self._high


class EMAMinMax(MinMax):
    """The range of a batch, averaged exponentially over batches; the first is copied.

    Args:
        bits (int), **options: see :class:`Observer`.
        momentum (float): weight of the past. Default: 0.9

    Raises:
        ValueError: momentum is outside of [0, 1), and as :class:`Observer`.

    Source: integer-arithmetic-only inference (arXiv:1712.05877), section 3.1.

    Example:
        >>> observer = EMAMinMax(2, signed=True)
        >>> for high in (1.0, 2.0):
        ...     observer.observe(torch.tensor([-0.3, high]))
        >>> observer.scale() * 1.5
        tensor([1.1000])
    """

    def __init__(
        self, bits: int, *, momentum: float = 0.9, **options: Unpack[ObserverOptions]
    ) -> None:
        super().__init__(bits, **options)
        self.momentum = check_momentum(momentum)

    def _update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        if self.count:
            low = self.momentum * self._low + (1 - self.momentum) * low
            high = self.momentum * self._high + (1 - self.momentum) * high
        self._low, self._high = low, high

    def _merge(self, states: Sequence[dict[str, Any]]) -> None:
        self._low = weighted_mean(states, [state["_low"] for state in states])
        self._high = weighted_mean(states, [state["_high"] for state in states])


def check_momentum(momentum: float) -> float:
    """The weight of the past in a moving average.

    Raises:
        ValueError: it is outside of [0, 1).
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum: expected a value in [0, 1), got {momentum}")
    return momentum


class LSQInit(Observer):
    """The initial scale of LSQ: ``2 * mean(|x|) / sqrt(qmax)``.

    Source: LSQ (arXiv:1902.08153), section 2.1; the "weight_loose" setting of the HQOD code.

    Example:
        >>> observer = LSQInit(3, signed=True)
        >>> observer.observe(torch.tensor([-0.3, 0.6]))
        >>> observer.scale()
        tensor([0.5196])
    """

    asymmetric = False
    _statistics = ("_total", "_elements", "_dtype")
    _total: Tensor
    _elements: int
    _dtype: torch.dtype

    def _update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        total = rows.abs().sum(dim=1, dtype=torch.float64).cpu()
        self._total = self._total + total if self.count else total
        self._elements = (self._elements if self.count else 0) + rows.shape[1]
        self._dtype = rows.dtype

    def _merge(self, states: Sequence[dict[str, Any]]) -> None:
        self._total = torch.stack([state["_total"] for state in states]).sum(dim=0)
        self._elements = sum(state["_elements"] for state in states)
        self._dtype = states[0]["_dtype"]

    def _scale(self) -> Tensor:
        quant_max = code_range(self.bits, self.signed)[1]
        return (2 * self._total / self._elements / math.sqrt(quant_max)).to(self._dtype)
