"""Tensors above 2**31 elements, where a 32-bit index wraps around.

What is right is what the same op gives for the pieces of the tensor, which are below: the contract
suite compares those with the reference.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hqod_ops import fake_quant

pytestmark = pytest.mark.require("ext", "cuda", "gpu_24gb")  # four tensors of 4 GiB, and pieces
LIMIT = 2**31
W4 = {"quant_min": -8, "quant_max": 7}
SHAPES = {
    "tensor": ((LIMIT // 4096 + 1, 4099), None),
    "outermost": ((65, LIMIT // 65 + 3), 0),
    "middle": ((5, 64, LIMIT // 320 + 3), 1),
    "innermost": ((LIMIT // 96 + 1, 96), 1),
    "many channels": ((LIMIT // 17 + 1, 17), 0),
}


def pieces(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the first axis of at most 2**28 elements, at least one row each."""
    rows = max(1, 2**28 * shape[0] // torch.Size(shape).numel())
    for start in range(0, shape[0], rows):
        yield slice(start, start + rows)


def filled(shape: tuple[int, ...], seed: int) -> Tensor:
    """Normal float16 values, other ones everywhere."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.empty(shape, dtype=torch.float16, device="cuda")
    for piece in pieces(shape):
        x[piece].normal_(generator=generator)
    return x


@pytest.mark.parametrize("name", SHAPES)
def test_above_two_to_the_31(name: str) -> None:
    shape, axis = SHAPES[name]
    x, dy = filled(shape, 0).requires_grad_(), filled(shape, 1)
    assert x.numel() > LIMIT
    channels = 1 if axis is None else shape[axis]
    scale = torch.linspace(0.2, 0.4, channels, device="cuda").requires_grad_()
    y = fake_quant(x, scale, ch_axis=axis, **W4)
    dx, ds = torch.autograd.grad(y, (x, scale), dy)
    y = y.detach()
    total = torch.zeros(channels, dtype=torch.float64, device="cuda")
    size = torch.zeros_like(total)  # of the terms, some of which cancel
    for piece in pieces(shape):
        part, rows = x.detach()[piece].requires_grad_(), piece if axis == 0 else slice(None)
        part_scale = scale.detach()[rows].requires_grad_()
        want = fake_quant(part, part_scale, ch_axis=axis, **W4)
        want_dx, want_ds = torch.autograd.grad(want, (part, part_scale), dy[piece])
        assert torch.equal(y[piece], want), f"y, rows {piece}"
        assert torch.equal(dx[piece], want_dx), f"dx, rows {piece}"
        total[rows] += want_ds.double()
        # A term is below 8 |dy|, and |dy| is 1 on average: the size of their sum as a random walk.
        size[rows] += 64.0 * part.numel() / len(part_scale)
    error = (ds.double() - total).norm() / size.sum().sqrt()
    assert error <= 2e-6, f"ds is off by {error:.3g} of the size of its terms"
