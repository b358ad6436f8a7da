"""Scales that are powers of two, as TQT has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from hqod_ops.quant.observers.base import Observer, code_range
from hqod_ops.quant.observers.search import Groups, least_error

LEAST, GREATEST = -7, 12
"""The exponents e of the scales 2^-e."""


class PowerOfTwo(Observer):
    """The power of two with the least squared quantization error in most batches.

    In every batch, with ``s0`` the least scale at which no value lies beyond the codes,
    ``max(min(x) / qmin, max(x) / qmax)`` (unsigned: ``max(x) / qmax``), and
    ``e0 = floor(log2(1 / s0))``, the batch votes for the e in e0..e0 + 4 whose scale ``2^-e`` has
    the least squared error. The e with the most votes wins, the smallest of equals. Exponents are
    kept within -7..12. A batch of zeros does not vote.

    Args:
        bits (int), **options: see :class:`Observer`; symmetric must be True. As long as the sign
            is open, there is a vote for both.

    Source: the "PoT mode" observer of the HQOD code.

    Example:
        >>> observer = PowerOfTwo(4, signed=True)
        >>> observer.observe(torch.tensor([-0.3, 0.1, 0.8]))
        >>> observer.scale()
        tensor([0.1250])
    """

    asymmetric = False
    candidates: ClassVar[int] = 5
    """How many exponents to choose from, from e0 on."""
    _statistics = ("_votes", "_dtype")
    _votes: dict[bool, Tensor]
    _dtype: torch.dtype

    def _update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        if not self.count:
            self._votes = {}
        self._dtype = rows.dtype
        groups = Groups.single(rows)
        for signed in (False, True) if self._fixed_sign is None else (self._fixed_sign,):
            exponent, valid = self._exponent(groups, low.double(), high.double(), signed)
            bins = torch.zeros(len(rows), GREATEST - LEAST + 1, dtype=torch.int64)
            votes = bins.scatter_(1, (exponent - LEAST)[:, None], valid.long()[:, None])
            self._votes[signed] = self._votes[signed] + votes if self.count else votes

    def _exponent(
        self, groups: Groups, low: Tensor, high: Tensor, signed: bool
    ) -> tuple[Tensor, Tensor]:
        """The best e of each row, and whether the row holds anything that says so."""
        quant_min, quant_max = code_range(self.bits, signed)
        scale = high / quant_max
        if signed:
            scale = torch.maximum(scale, low / quant_min)
        # s0 = m 2^q with m in [1/2, 1): log2(1 / s0) is -q if m > 1/2, and -q + 1 if m = 1/2.
        mantissa, power = torch.frexp(scale)
        first = torch.where(mantissa == 0.5, 1, 0) - power.long()
        exponents = first[:, None] + torch.arange(self.candidates)
        exponents = exponents.clamp(LEAST, GREATEST)
        codes = torch.arange(quant_min, quant_max + 1, dtype=torch.float64).repeat(len(low), 1)
        best = least_error(groups, torch.exp2(-exponents.double()), codes)
        return exponents.gather(1, best[:, None]).squeeze(1), scale > 0

    def _merge(self, states: Sequence[dict[str, Any]]) -> None:
        found = [state["_votes"] for state in states]
        self._votes = {
            sign: torch.stack([votes[sign] for votes in found]).sum(dim=0) for sign in found[0]
        }
        self._dtype = states[0]["_dtype"]

    def _scale(self) -> Tensor:
        votes = self._votes[self.signed]
        exponent = votes.argmax(dim=1) + LEAST
        scale = torch.exp2(-exponent.double()).to(self._dtype)
        return torch.where(votes.sum(dim=1) > 0, scale, 0.0)


class PowerOfTwoRange(PowerOfTwo):
    """:class:`PowerOfTwo` without the search: every batch votes for e0, which clips least.

    Source: the HQOD code's choice for the input of the network.

    Example:
        >>> observer = PowerOfTwoRange(4, signed=True)
        >>> observer.observe(torch.tensor([-0.3, 0.1, 0.8]))
        >>> observer.scale()
        tensor([0.1250])
    """

    candidates = 1
