"""The scale with the least squared error, found without quantizing once a candidate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hqod_ops.quant.observers.base import (
    ObserverOptions,
    RangeObserver,
    affine_for_range,
    code_range,
    scale_for_range,
    weighted_mean,
)
from hqod_ops.quant.observers.ranges import check_momentum
from hqod_ops.quant.signatures import Unpack

SEARCH_SIZE = 2**22
"""Borders between codes that are looked up at once, which bounds the memory of a search."""


@dataclass(frozen=True)
class Groups:
    """Data as sorted groups of values: single values, or the bins of a histogram.

    Attributes:
        values (Tensor[C, M]): sorted, one value that stands for its group; float64.
        counts (Tensor[C, M + 1]): prefix sums of the groups' sizes, from 0.
        sums (Tensor[C, M + 1]): prefix sums of the sums of their values, from 0.
    """

    values: Tensor
    counts: Tensor
    sums: Tensor

    @classmethod
    def of(cls, values: Tensor, counts: Tensor, sums: Tensor) -> Groups:
        """From each group's value, size and sum (Tensor[C, M])."""
        return cls(values, _prefix(counts), _prefix(sums))

    @classmethod
    def single(cls, rows: Tensor) -> Groups:
        """Every value of the data [C, M] alone, on the CPU."""
        values = rows.contiguous().sort(dim=1).values.to("cpu", torch.float64)
        return cls.of(values, torch.ones_like(values), values)

    def __getitem__(self, rows: slice) -> Groups:
        return Groups(self.values[rows], self.counts[rows], self.sums[rows])


def _prefix(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(len(x), 1), x.cumsum(1)], dim=1)


def least_error(groups: Groups, scales: Tensor, codes: Tensor) -> Tensor:
    """Index of the scale with the least squared quantization error, the first of equals.

    The groups that get code k are neighbours, with the error
    ``sum(x^2) - 2 k s sum(x) + (k s)^2 n``, of which the first term is the same for every scale and
    the others come from prefix sums in float64, so that the result is the same on every run. A
    value halfway between two codes has the same error with either, so the rounding of ties does not
    matter.

    Args:
        groups (Groups): data of C rows.
        scales (Tensor[C, S]): candidates.
        codes (Tensor[C, K]): the codes in order, counted from the zero point.

    Returns:
        Tensor[C]
    """
    block = max(SEARCH_SIZE // (scales.shape[1] * codes.shape[1]), 1)
    starts = range(0, len(scales), block)
    parts = [slice(start, start + block) for start in starts]
    return torch.cat([_errors(groups[p], scales[p], codes[p]).argmin(dim=1) for p in parts])


def _errors(groups: Groups, scales: Tensor, codes: Tensor) -> Tensor:
    """Squared errors [C, S], less what does not depend on the scale."""
    borders = (scales[:, :, None] * (codes[:, None, :-1] + 0.5)).flatten(1)
    inner = torch.searchsorted(groups.values, borders).unflatten(1, (scales.shape[1], -1))
    first = inner.new_zeros(*scales.shape, 1)
    cuts = torch.cat([first, inner, first + groups.values.shape[1]], dim=2)

    def per_code(prefix: Tensor) -> Tensor:
        return prefix.gather(1, cuts.flatten(1)).view_as(cuts).diff(dim=2)

    points = scales[:, :, None] * codes[:, None, :]
    return (points.square() * per_code(groups.counts) - 2 * points * per_code(groups.sums)).sum(2)


def least_error_shrink(
    groups: Groups,
    low: Tensor,
    high: Tensor,
    *,
    bits: int,
    signed: bool,
    symmetric: bool,
    steps: int,
) -> Tensor:
    """The factor ``1 - 0.01 i``, i = 0..steps - 1, of both ends of a range with the least error.

    Returns:
        Tensor[C]: the factor of each row, float64; the greatest of equals.
    """
    low, high = low.double(), high.double()
    quant_min, quant_max = code_range(bits, signed)
    codes = torch.arange(quant_min, quant_max + 1, dtype=torch.float64).repeat(len(low), 1)
    if symmetric:
        scale = scale_for_range(low, high, bits, signed)
    else:
        # Shrinking both ends by one factor leaves the zero point as it is.
        scale, zero = affine_for_range(low, high, bits, signed)
        codes -= zero[:, None]
    factors = 1 - 0.01 * torch.arange(steps, dtype=torch.float64)
    return factors[least_error(groups, scale[:, None] * factors, codes)]


def check_steps(steps: int) -> int:
    """The number of candidates of a search over ``1 - 0.01 i``.

    Raises:
        ValueError: it is outside of 1..100.
    """
    if not 1 <= steps <= 100:
        raise ValueError(f"steps: expected a value in [1, 100], got {steps}")
    return steps


class EMAMSE(RangeObserver):
    """The range with the least squared quantization error, averaged over batches.

    In every batch both ends of the range are shrunk together by ``1 - 0.01 i``, i = 0..steps - 1,
    and the i with the least mean squared error of quantization is kept (the smallest of equals).
    The ranges found are averaged exponentially, with weight ``momentum`` for the past; the first is
    copied. The search is exact, and looks at one batch at a time.

    Args:
        bits (int), **options: see :class:`Observer`. As long as the sign is open, both are
            searched.
        momentum (float): weight of the past. Default: 0.9
        steps (int): number of candidates, at most 100. Default: 95

    Raises:
        ValueError: momentum or steps is out of range, and as :class:`Observer`.

    Source: the activation observer (``EMAMSEObserver``) of the HQOD code.

    Example:
        >>> observer = EMAMSE(2)
        >>> observer.observe(torch.tensor([0.0, 1.0, 2.0, 3.0, 3.0, 3.3]))
        >>> observer.signed, observer.scale()
        (False, tensor([1.0230]))
    """

    _statistics = ("_ranges",)

    def __init__(
        self,
        bits: int,
        *,
        momentum: float = 0.9,
        steps: int = 95,
        **options: Unpack[ObserverOptions],
    ) -> None:
        super().__init__(bits, **options)
        self.momentum, self.steps = check_momentum(momentum), check_steps(steps)
        self._ranges: dict[bool, tuple[Tensor, Tensor]] = {}

    def _update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        signs = (False, True) if self._fixed_sign is None and not self._negative else (self.signed,)
        groups = Groups.single(rows)
        for signed in signs:
            shrink = least_error_shrink(
                groups,
                low,
                high,
                bits=self.bits,
                signed=signed,
                symmetric=self.symmetric,
                steps=self.steps,
            ).to(low)
            new_low, new_high = low * shrink, high * shrink
            if self.count:
                old_low, old_high = self._ranges[signed]
                new_low = self.momentum * old_low + (1 - self.momentum) * new_low
                new_high = self.momentum * old_high + (1 - self.momentum) * new_high
            self._ranges[signed] = new_low, new_high

    def _merge(self, states: Sequence[dict[str, Any]]) -> None:
        found = [state["_ranges"] for state in states]
        # Who saw a negative value stopped searching unsigned codes, which it thereby rules out.
        signs = [sign for sign in (False, True) if all(sign in ranges for ranges in found)]
        self._ranges = {
            sign: (
                weighted_mean(states, [ranges[sign][0] for ranges in found]),
                weighted_mean(states, [ranges[sign][1] for ranges in found]),
            )
            for sign in signs
        }

    def _range(self) -> tuple[Tensor, Tensor]:
        return self._ranges[self.signed]
