"""Properties that hold for any input, on generated input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("hypothesis")

from hypothesis import given
from hypothesis import strategies as st

from hqod_ops import reference
from hqod_ops.testing.device import (
    aligned_box_iou,
    fake_quant,
    fake_quant_foreach,
    harmonious_iou_loss,
    hqod_loss,
    tcorr_loss,
)

pytestmark = pytest.mark.numeric

units = st.floats(0, 1, width=32)
coordinates = st.floats(-(2.0**66), 2.0**66, width=32)
"""Up to 7e19 either way."""
pixels = st.floats(-100, 2000, width=32)


def boxes(values: st.SearchStrategy[float]) -> st.SearchStrategy[list[list[float]]]:
    return st.lists(st.lists(values, min_size=8, max_size=8), min_size=1, max_size=40)


def split(rows: list[list[float]]) -> tuple[Tensor, Tensor]:
    both = torch.tensor(rows, dtype=torch.float32)
    return both[:, :4].clone().requires_grad_(), both[:, 4:].clone().requires_grad_()


@given(boxes(coordinates), st.sampled_from([0.0, 0.8, 2.0]))
def test_any_boxes(rows: list[list[float]], gamma: float) -> None:
    """Inverted, degenerate or huge: IoU in [0, 1], symmetric; losses and gradients finite."""
    a, b = split(rows)
    iou = aligned_box_iou(a, b)
    assert ((iou >= 0) & (iou <= 1 + 1e-6)).all()
    torch.testing.assert_close(iou, aligned_box_iou(b, a), rtol=1e-6, atol=1e-6)
    loss = harmonious_iou_loss(a, b, gamma=gamma)
    assert (loss >= -1e-5).all() and (loss <= 1.5 * 2**gamma).all()
    scores = torch.full((len(rows),), 0.4, requires_grad=True)
    whole = hqod_loss(a, b, scores, reduction="none")
    for y in (iou, loss, whole):
        assert y.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), (a, b)))


@given(boxes(pixels))
def test_boxes_of_an_image(rows: list[list[float]]) -> None:
    """Right to float32 against float64, in values; scaling by a power of two changes nothing."""
    a, b = split(rows)
    iou = aligned_box_iou(a, b)
    exact = reference.aligned_box_iou(a.double(), b.double())
    # The union may be a small difference of large areas; there is no bound relative to the IoU.
    torch.testing.assert_close(iou.double(), exact, rtol=2e-6, atol=2e-6)
    big = (a.detach()[:, 2:] - a.detach()[:, :2]).prod(1).abs() > 1e-3
    scaled = aligned_box_iou(a * 4, b * 4)
    assert torch.equal(scaled[big], iou[big])
    whole, parts = (
        hqod_loss(a, b, torch.full_like(iou, 0.7).detach(), reduction="none"),
        harmonious_iou_loss(a, b) + tcorr_loss(torch.full_like(iou, 0.7), iou),
    )
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)


@given(st.lists(st.tuples(units, units), min_size=1, max_size=60),
       st.sampled_from(["official", "geometric"]), st.booleans())  # fmt: skip
def test_any_score_and_iou(pairs: list[tuple[float, float]], variant: str, logits: bool) -> None:
    """TCorr within its bounds, and its gradients too, on the whole unit square."""
    values = torch.tensor(pairs, dtype=torch.float32)
    p, u = values[:, 0].clone(), values[:, 1].clone().requires_grad_()
    p = (p.logit() if logits else p).requires_grad_()
    loss = tcorr_loss(p, u, logits=logits, variant=variant)
    assert (loss >= -1e-6).all() and (loss <= 2 * (1 - math.exp(-1)) + 1e-6).all()
    dp, du = torch.autograd.grad(loss.sum(), (p, u))
    assert (dp.abs() <= (0.27 if logits else 4e4)).all()
    assert (du.abs() <= 4e4).all()
    exact = reference.tcorr_loss(p.detach().double(), u.detach().double(), logits=logits,
                                 variant=variant)  # fmt: skip
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=2e-6)
    swapped = tcorr_loss(
        u.detach(), p.detach().sigmoid() if logits else p.detach(), variant=variant
    )
    torch.testing.assert_close(swapped, loss.detach(), rtol=1e-5, atol=2e-6)


ranges = st.sampled_from(
    [(-2, 1), (-8, 7), (-128, 127), (0, 1), (0, 15), (0, 255), (3, 9), (-9, -4)]
)
arrays = st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=80)
scales = st.floats(2.0**-7, 16.0, width=32)
zero_points = st.none() | st.floats(-20, 20, width=32)


@given(arrays, scales, zero_points, ranges)
def test_any_x(x: list[float], scale: float, zero: float | None, limits: tuple[int, int]) -> None:
    """On the grid, nearest, monotone, idempotent; the bits of the definition; a mask for dx."""
    low, high = limits
    values, s = torch.tensor(x).sort().values.requires_grad_(), torch.tensor(scale)
    z = None if zero is None else torch.tensor(zero)
    y = fake_quant(values, s, z, quant_min=low, quant_max=high)
    offset = torch.zeros(()) if z is None else z.round()
    code = (values / s).round() + offset
    assert torch.equal(y, (code.clamp(low, high) - offset) * s)
    assert (y.diff() >= 0).all()
    assert torch.equal(fake_quant(y, s, z, quant_min=low, quant_max=high), y)
    inside = (code >= low) & (code <= high)
    assert ((y - values).abs() <= s * 0.5 * (1 + 1e-4) + 1e-6)[inside].all()
    (dx,) = torch.autograd.grad(y.sum(), values)
    assert torch.equal(dx, inside.float())


@given(st.data(), ranges, st.integers(1, 4), st.integers(1, 9), st.integers(1, 5), st.booleans())
def test_off_the_ties(
    data: Any, limits: tuple[int, int], outer: int, channels: int, inner: int, middle: bool
) -> None:
    """Away from rounding ties the float32 gradients are those of the definition in float64."""
    low, high = limits
    seed = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    shape = (outer, channels, inner) if middle else (channels, outer, inner)
    axis = 1 if middle else 0
    along = [channels if i == axis else 1 for i in range(3)]
    scale = torch.rand(channels, generator=generator) + 0.05
    zero = torch.randint(-9, 9, (channels,), generator=generator).float()
    codes = torch.randint(low - 4, high + 5, shape, generator=generator)
    x = codes + torch.rand(shape, generator=generator) * 0.8 - 0.4 - zero.view(along)
    x = x * scale.view(along)
    dy = torch.randn(shape, generator=generator)
    results = []
    for op, dtype in ((fake_quant, torch.float32), (reference.fake_quant, torch.float64)):
        leaves = [v.to(dtype).requires_grad_() for v in (x, scale, zero)]
        y = op(*leaves, quant_min=low, quant_max=high, ch_axis=axis, grad_scale="lsq")
        results.append((y, *torch.autograd.grad(y, leaves, dy.to(dtype))))
    bound = 300.0 * (dy.numel() / channels) ** 0.5
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6 * bound)


@given(arrays, scales, ranges)
def test_on_the_ties_at_most_one_step(
    x: list[float], scale: float, limits: tuple[int, int]
) -> None:
    """Float32 and float64 may round a near tie to either side, never further."""
    low, high = limits
    values, s = torch.tensor(x), torch.tensor(scale)
    y = fake_quant(values, s, quant_min=low, quant_max=high)
    exact = fake_quant(values.double(), s.double(), quant_min=low, quant_max=high)
    steps = (y.double() - exact).abs() / s.double()
    assert (steps <= 1 + 1e-5).all()
    quotient = values.double() / s.double()
    near_tie = ((quotient - quotient.floor()) - 0.5).abs() < 1e-4 * quotient.abs().clamp(min=1)
    assert (steps[~near_tie] < 1e-5).all()


@given(st.lists(arrays, min_size=1, max_size=5), scales, ranges)
def test_foreach_is_a_loop(xs: list[list[float]], scale: float, limits: tuple[int, int]) -> None:
    low, high = limits
    tensors = [torch.tensor(x) for x in xs]
    ys = fake_quant_foreach(tensors, [torch.tensor(scale)] * len(xs), quant_min=low, quant_max=high)
    for x, y in zip(tensors, ys, strict=True):
        assert torch.equal(y, fake_quant(x, torch.tensor(scale), quant_min=low, quant_max=high))
