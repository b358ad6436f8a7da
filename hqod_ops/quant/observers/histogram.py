"""Observers of all the data at once, in bounded memory: percentile, and least squared error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hqod_ops.quant.observers.base import ObserverOptions, RangeObserver
from hqod_ops.quant.observers.search import Groups, check_steps, least_error_shrink
from hqod_ops.quant.signatures import Unpack

BLOCK = 2**20
"""Values that are sorted into bins at once, which bounds the memory beside the histogram."""
LEAST_EXPONENT = -1000
"""Also that of a row that held nothing but 0; the width of its bins is a normal number still."""


class Histogram:
    """Counts and sums of values, one row of bins a channel, over a range that grows with the data.

    A row covers ``[-2^e, 2^e)``, e the least exponent (from -1000 on) with ``max|x| < 2^e``, in
    bins of equal width, ``2^(e + 1) / bins``: at most ``4 max|x| / bins``. When e grows,
    neighbouring bins are added up, which is exact: the histogram does not depend on the order of
    the data, nor on which process saw what.

    Args:
        bins (int): of each row, a power of two.

    Attributes:
        exponent (Tensor[C], int64): e.
        low (Tensor[C]), high (Tensor[C]): the least and the greatest value.
        counts (Tensor[C, bins]), sums (Tensor[C, bins]): number and sum of the values of each bin,
            float64.
    """

    def __init__(self, bins: int) -> None:
        if bins < 16 or bins & (bins - 1):
            raise ValueError(f"bins: expected a power of two of at least 16, got {bins}")
        self.bins = bins
        self.exponent: Tensor
        self.low: Tensor
        self.high: Tensor
        self.counts: Tensor
        self.sums: Tensor
        self._empty = True

    @property
    def width(self) -> Tensor:
        """Width of the bins of each row, Tensor[C], float64."""
        return _ldexp(torch.full_like(self.low, 2.0 / self.bins), self.exponent)

    def borders(self) -> Tensor:
        """The borders of the bins, Tensor[C, bins + 1], float64."""
        inner = torch.arange(-(self.bins // 2), self.bins // 2 + 1, dtype=torch.float64)
        return inner * self.width[:, None]

    def groups(self) -> Groups:
        """The bins as groups for a search; a bin's value is the mean of what it holds."""
        borders = self.borders()
        centres = (borders[:, 1:] + borders[:, :-1]) / 2
        # The mean of what lies in a bin may be rounded out of it, where values are not sorted.
        means = torch.clamp(self.sums / self.counts.clamp(min=1), borders[:, :-1], borders[:, 1:])
        return Groups.of(torch.where(self.counts > 0, means, centres), self.counts, self.sums)

    def add(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        """Take in data [C, M] with its range a row, low and high (Tensor[C])."""
        low, high = low.double(), high.double()
        largest = torch.maximum(low.abs(), high.abs())
        exponent = torch.frexp(largest).exponent.long().clamp(min=LEAST_EXPONENT)
        exponent = torch.where(largest > 0, exponent, LEAST_EXPONENT)
        if self._empty:
            self.exponent, self.low, self.high = exponent, low, high
            self.counts = torch.zeros(len(rows), self.bins, dtype=torch.float64)
            self.sums = torch.zeros_like(self.counts)
            self._empty = False
        else:
            self._coarsen(torch.maximum(exponent, self.exponent))
            self.low, self.high = torch.minimum(low, self.low), torch.maximum(high, self.high)
        for part in rows.split(max(BLOCK // len(rows), 1), dim=1):
            self._count(part.to("cpu", torch.float64))

    def _count(self, rows: Tensor) -> None:
        half = self.bins // 2
        place = _ldexp(rows * half, -self.exponent[:, None]).floor_().long()
        place += half + self.bins * torch.arange(len(rows))[:, None]
        place, size = place.flatten(), self.counts.numel()
        self.counts += torch.bincount(place, minlength=size).view_as(self.counts)
        self.sums += torch.bincount(place, rows.flatten(), size).view_as(self.sums)

    def _coarsen(self, exponent: Tensor) -> None:
        """Go over to greater exponents, adding up 2^d neighbouring bins."""
        half = self.bins // 2
        shift = (exponent - self.exponent).clamp(max=half.bit_length())
        place = torch.arange(-half, half).repeat(len(shift), 1) >> shift[:, None]
        for values in (self.counts, self.sums):
            values.copy_(torch.zeros_like(values).scatter_add_(1, place + half, values))
        self.exponent = exponent

    @classmethod
    def merged(cls, parts: Sequence[Histogram]) -> Histogram:
        """The histogram of all data of several ones, of one number of bins and rows."""
        whole = cls(parts[0].bins)
        whole._empty = False
        whole.exponent = torch.stack([part.exponent for part in parts]).amax(dim=0)
        whole.low = torch.stack([part.low for part in parts]).amin(dim=0)
        whole.high = torch.stack([part.high for part in parts]).amax(dim=0)
        whole.counts = torch.zeros_like(parts[0].counts)
        whole.sums = torch.zeros_like(parts[0].sums)
        for part in parts:
            part._coarsen(whole.exponent)
            whole.counts += part.counts
            whole.sums += part.sums
        return whole


def _ldexp(x: Tensor, exponent: Tensor) -> Tensor:
    """x * 2^exponent in float64, where 2^exponent alone may be too large or too small for it."""
    half = exponent // 2
    return x * torch.exp2(half.double()) * torch.exp2((exponent - half).double())


class _HistogramOptions(ObserverOptions, total=False):
    bins: int


class _HistogramObserver(RangeObserver):
    """What the observers over a histogram have in common."""

    _statistics = ("_histogram", "_dtype")
    _dtype: torch.dtype

    def __init__(self, bits: int, *, bins: int = 4096, **options: Unpack[ObserverOptions]) -> None:
        super().__init__(bits, **options)
        self._histogram = Histogram(bins)

    def _update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        self._histogram.add(rows, low, high)
        self._dtype = rows.dtype

    def _merge(self, states: Sequence[dict[str, Any]]) -> None:
        self._histogram = Histogram.merged([state["_histogram"] for state in states])
        self._dtype = states[0]["_dtype"]


class Percentile(_HistogramObserver):
    """The range that leaves out a given share of all values at either end.

    Its upper end is the least h such that ``percentile`` percent of the values are at most h, its
    lower end accordingly; both over all batches, found from a histogram of ``bins`` bins in
    ``16 * bins`` bytes a channel.

    **Error.** An end is off from that of the sorted data by at most the width of a bin,
    ``4 max|x| / bins`` (a thousandth of the greatest magnitude with 4,096 bins), always outwards,
    and never beyond the data.

    Args:
        bits (int), **options: see :class:`Observer`.
        percentile (float): in (50, 100]; 100 is the whole range. Default: 99.99
        bins (int): a power of two. Default: 4096

    Raises:
        ValueError: percentile or bins is out of range, and as :class:`Observer`.

    Source: integer quantization, principles and evaluation (arXiv:2004.09602), section 5.2.

    Example:
        >>> observer = Percentile(8, percentile=99.0)
        >>> observer.observe(torch.cat([torch.linspace(0, 1, 991), torch.full((9,), 4.0)]))
        >>> observer.scale() * 255
        tensor([1.])
    """

    def __init__(
        self, bits: int, *, percentile: float = 99.99, **options: Unpack[_HistogramOptions]
    ) -> None:
        super().__init__(bits, **options)
        if not 50 < percentile <= 100:
            raise ValueError(f"percentile: expected a value in (50, 100], got {percentile}")
        self.percentile = percentile

    def _range(self) -> tuple[Tensor, Tensor]:
        histogram = self._histogram
        borders = histogram.borders()
        high = _reach(histogram.counts, borders[:, 1:], self.percentile)
        low = -_reach(histogram.counts.flip(1), -borders[:, :-1].flip(1), self.percentile)
        return (
            torch.maximum(low, histogram.low).to(self._dtype),
            torch.minimum(high, histogram.high).to(self._dtype),
        )


def _reach(counts: Tensor, ends: Tensor, percentile: float) -> Tensor:
    """The end (Tensor[C]) of the first bin up to which that many percent of the values lie."""
    total = counts.cumsum(dim=1)
    wanted = total[:, -1:] * (percentile / 100)
    return ends.gather(1, torch.searchsorted(total, wanted)).squeeze(1)


class MSE(_HistogramObserver):
    """The range with the least squared quantization error over all the data.

    Both ends of the whole range are shrunk together by ``1 - 0.01 i``, i = 0..steps - 1, as in
    :class:`EMAMSE`, which does so in every batch and averages. The errors come from a histogram of
    ``bins`` bins in ``16 * bins`` bytes a channel.

    **Error.** A candidate with step s is judged by its mean squared error, which is exact but for
    bins that a border between two codes cuts: their values all get one code. With a share f of the
    data in such bins, of width ``w <= 4 max|x| / bins``, the error of the candidate found is above
    that of the best by at most ``2 s w f``.

    Args:
        bits (int), **options: see :class:`Observer`.
        steps (int): number of candidates, at most 100. Default: 95
        bins (int): a power of two. Default: 4096

    Raises:
        ValueError: steps or bins is out of range, and as :class:`Observer`.

    Source: the search of the HQOD code's activation observer, over all data.

    Example:
        >>> observer = MSE(2)
        >>> observer.observe(torch.tensor([0.0, 1.0, 2.0]))
        >>> observer.observe(torch.tensor([3.0, 3.0, 3.3]))
        >>> observer.scale()
        tensor([1.0230])
    """

    def __init__(self, bits: int, *, steps: int = 95, **options: Unpack[_HistogramOptions]) -> None:
        super().__init__(bits, **options)
        self.steps = check_steps(steps)

    def _range(self) -> tuple[Tensor, Tensor]:
        histogram = self._histogram
        shrink = least_error_shrink(
            histogram.groups(),
            histogram.low,
            histogram.high,
            bits=self.bits,
            signed=self.signed,
            symmetric=self.symmetric,
            steps=self.steps,
        )
        return (histogram.low * shrink).to(self._dtype), (histogram.high * shrink).to(self._dtype)
