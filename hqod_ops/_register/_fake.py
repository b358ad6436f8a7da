"""The device rule, and the gradients that the fake kernels share."""

from __future__ import annotations

import torch
from torch import Tensor


def one_device(*tensors: Tensor | None) -> None:
    """All on one device: a meta tensor beside a real one leads here, not to the kernel's check."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    torch._check(
        len(devices) <= 1,
        lambda: f"expected one device, got {', '.join(sorted(map(str, devices)))}",
    )


def fake_gradient(like: Tensor, wanted: int) -> Tensor:
    """The gradient of an input: contiguous, or empty when it is not wanted."""
    return like.new_empty(like.shape if wanted else (0,))
