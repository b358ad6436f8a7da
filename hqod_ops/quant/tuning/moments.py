"""Means and variances per channel, summed up over batches and processes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Count, sum and sum of squares of the values of every channel, in float64 on the CPU."""

    count: int = 0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, count: int, mean: Tensor, var: Tensor) -> None:
        """Take in count values a channel with this mean and (biased) variance."""
        mean, var = mean.detach().cpu().double(), var.detach().cpu().double()
        self.count += count
        self.total = self.total + count * mean
        self.squares = self.squares + count * (var + mean.square())

    @property
    def mean(self) -> Tensor:
        """Tensor[C], float64."""
        return torch.as_tensor(self.total) / self.count

    @property
    def var(self) -> Tensor:
        """The biased variance: Tensor[C], float64."""
        return (torch.as_tensor(self.squares) / self.count - self.mean.square()).clamp(min=0)


def channel_moments(x: Tensor, axis: int = 1) -> tuple[int, Tensor, Tensor]:
    """Values a channel, and their mean and biased variance (Tensor[C], float32 for half inputs)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    axis %= x.dim()
    others = [dim for dim in range(x.dim()) if dim != axis]
    count = x.numel() // x.shape[axis] if x.shape[axis] else 0
    if not others:
        return count, x, torch.zeros_like(x)
    var, mean = torch.var_mean(x, dim=others, correction=0)
    return count, mean, var


def merged(parts: Iterable[Moments]) -> Moments:
    """The moments of all parts together, added up in their order."""
    found = Moments()
    for part in parts:
        if part.count:
            found.count += part.count
            found.total = found.total + part.total
            found.squares = found.squares + part.squares
    return found
