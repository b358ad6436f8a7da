"""Observers: they look at data and say with which scale to start.

An observer is fed tensors and returns a scale and the sign of the codes. Codes are those of
:func:`code_range`: symmetric, with zero point 0.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod

import torch
from torch import Tensor

MIN_BITS, MAX_BITS = 2, 8


def check_bits(name: str, bits: int) -> int:
    """A number of bits that the quantizers support.

    Raises:
        ValueError: bits is outside 2..8.
    """
    if not MIN_BITS <= operator.index(bits) <= MAX_BITS:
        raise ValueError(f"{name}: expected a value in [{MIN_BITS}, {MAX_BITS}], got {bits}")
    return operator.index(bits)


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """The smallest and the largest code: [-2^(b-1), 2^(b-1) - 1] if signed, else [0, 2^b - 1].

    Example:
        >>> code_range(2, signed=True), code_range(4, signed=False)
        ((-2, 1), (0, 15))
    """
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def scale_for_range(low: Tensor, high: Tensor, bits: int, signed: bool) -> Tensor:
    """Scale at which the codes span a range of values.

    Signed: ``max(|low|, high) / ((qmax - qmin) / 2)``, that is /1.5 at 2 bits and /7.5 at 4, so
    that the greatest value is clipped by half a step if it is positive; unsigned: ``high / qmax``.

    Args:
        low (Tensor[C]), high (Tensor[C]): the range; 0 is taken into it.
        bits (int): 2 to 8.
        signed (bool): whether codes are signed.

    Returns:
        Tensor[C]: the scale, 0 for the range [0, 0].
    """
    quant_min, quant_max = code_range(bits, signed)
    if not signed:
        return high.clamp(min=0) / quant_max
    return torch.maximum(low.abs(), high.abs()) / ((quant_max - quant_min) / 2)


class Observer(ABC):
    """What the observers have in common.

    Args:
        bits (int): 2 to 8.
        signed (bool, optional): sign of the codes. Default: None, found from the data: unsigned if
            no negative value was seen.
        ch_axis (int, optional): axis with a scale of its own for every index. Default: None
    """

    def __init__(
        self, bits: int, *, signed: bool | None = None, ch_axis: int | None = None
    ) -> None:
        self.bits = check_bits("bits", bits)
        self.ch_axis = ch_axis
        self.count = 0
        self._fixed_sign = signed
        self._negative = False

    @property
    def signed(self) -> bool:
        """The sign given, or the one that the data seen so far asks for."""
        return self._negative if self._fixed_sign is None else self._fixed_sign

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take data into the statistics; an empty tensor says nothing.

        Raises:
            ValueError: x holds NaN or an infinity.
        """
        if x.numel() == 0:
            return
        rows = x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        if self.ch_axis is None:
            rows = rows.reshape(1, -1)
        else:
            rows = rows.movedim(self.ch_axis, 0).flatten(1)
        low, high = rows.amin(dim=1), rows.amax(dim=1)
        if not bool(torch.isfinite(low + high).all()):
            raise ValueError("x: expected finite values, got NaN or an infinity")
        self._negative = self._negative or bool((low < 0).any())
        self._update(rows, low, high)
        self.count += 1

    def scale(self) -> Tensor:
        """The scale (Tensor[1] or Tensor[C]) that the data seen so far asks for; 0 if it was all 0.

        Raises:
            RuntimeError: no data was seen.
        """
        if self.count == 0:
            raise RuntimeError(f"{type(self).__name__}: no data was observed")
        return self._scale()

    @abstractmethod
    def _update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        """Take data [C, M] with its range a row [C] into the statistics."""

    @abstractmethod
    def _scale(self) -> Tensor: ...


class MinMax(Observer):
    """The whole observed range: :func:`scale_for_range` of the least and the greatest value.

    Source: the weight observer of the HQOD code.

    Example:
        >>> observer = MinMax(2, signed=True)
        >>> observer.observe(torch.tensor([-0.3, 0.6]))
        >>> observer.scale()
        tensor([0.4000])
    """

    _low: Tensor
    _high: Tensor

    def _update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        if self.count:
            low, high = torch.minimum(self._low, low), torch.maximum(self._high, high)
        self._low, self._high = low, high

    def _scale(self) -> Tensor:
        return scale_for_range(self._low, self._high, self.bits, self.signed)


class LSQInit(Observer):
    """The initial scale of LSQ: ``2 * mean(|x|) / sqrt(qmax)``.

    Source: LSQ (arXiv:1902.08153), section 2.1; the "weight_loose" setting of the HQOD code.

    Example:
        >>> observer = LSQInit(3, signed=True)
        >>> observer.observe(torch.tensor([-0.3, 0.6]))
        >>> observer.scale()
        tensor([0.5196])
    """

    _total: Tensor
    _elements: int
    _dtype: torch.dtype

    def _update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        total = rows.abs().sum(dim=1, dtype=torch.float64)
        self._total = self._total + total if self.count else total
        self._elements = (self._elements if self.count else 0) + rows.shape[1]
        self._dtype = rows.dtype

    def _scale(self) -> Tensor:
        quant_max = code_range(self.bits, self.signed)[1]
        return (2 * self._total / self._elements / math.sqrt(quant_max)).to(self._dtype)


class EMAMSE(Observer):
    """The range with the least squared quantization error, averaged over batches.

    In every batch both ends of the range are shrunk together by ``1 - 0.01 i``, i = 0..steps - 1,
    and the i with the least mean squared error of quantization is kept (the smallest of equals).
    The ranges found are averaged exponentially, with weight ``momentum`` for the past; the first is
    copied.

    The search is exact and does not quantize the data once a candidate: it sorts it and takes the
    error of each code's bin from prefix sums in float64, on the CPU, so that the result is the same
    on every run.

    Args:
        bits (int), signed (bool, optional), ch_axis (int, optional): see :class:`Observer`. As long
            as the sign is open, both are searched.
        momentum (float): weight of the past. Default: 0.9
        steps (int): number of candidates, at most 100. Default: 95

    Source: the activation observer (``EMAMSEObserver``) of the HQOD code.

    Example:
        >>> observer = EMAMSE(2)
        >>> observer.observe(torch.tensor([0.0, 1.0, 2.0, 3.0, 3.0, 3.3]))
        >>> observer.signed, observer.scale()
        (False, tensor([1.0230]))
    """

    def __init__(
        self,
        bits: int,
        *,
        signed: bool | None = None,
        ch_axis: int | None = None,
        momentum: float = 0.9,
        steps: int = 95,
    ) -> None:
        super().__init__(bits, signed=signed, ch_axis=ch_axis)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: expected a value in [0, 1), got {momentum}")
        if not 1 <= steps <= 100:
            raise ValueError(f"steps: expected a value in [1, 100], got {steps}")
        self.momentum, self.steps = momentum, steps
        self._ranges: dict[bool, tuple[Tensor, Tensor]] = {}

    def _update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        signs = (False, True) if self._fixed_sign is None and not self._negative else (self.signed,)
        ordered = rows.contiguous().sort(dim=1).values.to("cpu", torch.float64)
        zero = ordered.new_zeros(len(ordered), 1)
        sums = torch.cat([zero, ordered.cumsum(1)], dim=1)
        squares = torch.cat([zero, ordered.square().cumsum(1)], dim=1)
        for signed in signs:
            scales = self._candidates(low, high, signed)
            error = _squared_error(ordered, sums, squares, scales, *code_range(self.bits, signed))
            shrink = (1 - 0.01 * error.argmin(dim=1)).to(low)
            new_low, new_high = low * shrink, high * shrink
            if self.count:
                old_low, old_high = self._ranges[signed]
                new_low = self.momentum * old_low + (1 - self.momentum) * new_low
                new_high = self.momentum * old_high + (1 - self.momentum) * new_high
            self._ranges[signed] = new_low, new_high

    def _candidates(self, low: Tensor, high: Tensor, signed: bool) -> Tensor:
        """The scales to try, [C, steps]."""
        scale = scale_for_range(low, high, self.bits, signed).to("cpu", torch.float64)
        return scale[:, None] * (1 - 0.01 * torch.arange(self.steps, dtype=torch.float64))

    def _scale(self) -> Tensor:
        return scale_for_range(*self._ranges[self.signed], self.bits, self.signed)


def _squared_error(
    ordered: Tensor, sums: Tensor, squares: Tensor, scales: Tensor, quant_min: int, quant_max: int
) -> Tensor:
    """Sum of squared quantization errors of each row at each of its scales.

    All values of a row that get code k are neighbours in the sorted row; their error is
    ``sum(x^2) - 2 k s sum(x) + (k s)^2 n``. A value halfway between two codes has the same error
    with either, so the rounding of ties does not matter.

    Args:
        ordered (Tensor[C, M]): sorted data.
        sums (Tensor[C, M + 1]), squares (Tensor[C, M + 1]): prefix sums of x and x^2, from 0.
        scales (Tensor[C, S]): candidates.
        quant_min (int), quant_max (int): the codes' range.

    Returns:
        Tensor[C, S]
    """
    channels, steps = scales.shape
    codes = torch.arange(quant_min, quant_max + 1, dtype=ordered.dtype)
    borders = (scales[:, :, None] * (codes[:-1] + 0.5)).flatten(1)
    inner = torch.searchsorted(ordered, borders).unflatten(1, (steps, -1))
    first = inner.new_zeros(channels, steps, 1)
    cuts = torch.cat([first, inner, first + ordered.shape[1]], dim=2)

    def per_code(prefix: Tensor) -> Tensor:
        return prefix.gather(1, cuts.flatten(1)).view_as(cuts).diff(dim=2)

    levels = scales[:, :, None] * codes
    return (
        per_code(squares) - 2 * levels * per_code(sums) + levels.square() * cuts.diff(dim=2)
    ).sum(dim=2)


OBSERVERS: dict[str, type[Observer]] = {"minmax": MinMax, "lsq": LSQInit, "ema_mse": EMAMSE}
"""The observers by the names that configurations use."""
