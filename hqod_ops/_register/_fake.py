"""Shapes and dtypes that the loss ops share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def fake_loss(like: Tensor, shape: Sequence[int], reduction: int) -> Tensor:
    """A loss: one value a sample, or their sum or mean."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return like.new_empty(shape if reduction == 0 else (), dtype=dtype)


def fake_gradient(like: Tensor, wanted: int) -> Tensor:
    """The gradient of an input: contiguous, or empty when it is not wanted."""
    return like.new_empty(like.shape if wanted else (0,))
