"""Which element belongs to which channel: sizes around every limit of the kernels' layouts.

The kernels cut memory into rows, tiles and vectors (csrc/math/fake_quant_layout.h); what does not
divide evenly is where they would go wrong.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hqod_ops.testing.device import fake_quant

LARGEST = 60_000
INNER = (1, 2, 3, 4, 5, 8, 9, 31, 32, 33, 36, 100, 127, 128, 129, 191, 192, 193, 255, 256, 257)
INNER += (511, 513, 1001, 1023, 1024, 1025, 2047, 2048, 2049, 4096, 4097, 8193, 16384, 16385)
CHANNELS = (1, 2, 3, 5, 7, 8, 12, 31, 63, 64, 65, 127, 129, 255, 256, 257, 511, 513, 1025, 2049)
OUTER = (1, 2, 3, 5, 8, 9, 17, 63, 64, 65, 129)


def shapes() -> Iterator[tuple[int, int, int]]:
    """[outer, channels, inner] in memory, of moderate size; the larger ones are thinned out."""
    number = 0
    for inner in INNER:
        for channels in CHANNELS:
            for outer in OUTER:
                size = outer * channels * inner
                number += 1
                if size <= LARGEST and (size < 2000 or number % 5 == 0):
                    yield outer, channels, inner


def _expected(x: Tensor, scale: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    s = scale[:, None].to(torch.float32)
    wide = x.to(torch.float32)
    code = (wide / s).round()
    level = code.clamp(-8, 7)
    outside = code != level
    slope = torch.where(outside, level, level - wide / s).double()
    y, dx = (level * s).to(x.dtype), torch.where(outside, 0, dy)
    return y, dx, (slope * dy.double()).sum(dim=(0, 2))


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_element_meets_its_channel(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    pool = torch.randn(2, LARGEST, generator=generator).to(dtype)
    count = 0
    for shape in shapes():
        size = shape[0] * shape[1] * shape[2]
        x, dy = (values[:size].reshape(shape) for values in pool)
        # Scales differ from channel to channel, far more than a rounding error would show.
        scale = 0.05 + 0.9 * torch.rand(shape[1], generator=generator)
        x, scale = x.clone().requires_grad_(), scale.requires_grad_()
        y = fake_quant(x, scale, quant_min=-8, quant_max=7, ch_axis=1)
        dx, d_scale = torch.autograd.grad(y, [x, scale], dy)
        expected_y, expected_dx, expected = _expected(x.detach(), scale.detach(), dy)
        assert torch.equal(y, expected_y), shape
        assert torch.equal(dx, expected_dx), shape
        # Sums of up to 60,000 floats of either sign: the error of a float32 sum in some order.
        bound = 1e-6 * max(1.0, (size / shape[1]) ** 0.5) * 8
        assert (d_scale.double() - expected).abs().max() <= bound * 10, shape
        count += 1
    assert count > 500
