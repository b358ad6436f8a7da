"""TQT: powers of two, a threshold that trains, and the official frozen variant."""

from __future__ import annotations

import math

import pytest
import torch

from hqod_ops.quant.observers import code_range
from hqod_ops.quant.quantizers.tqt import TQT, TQTFrozen, exact_log2, power_of_two


def test_powers_of_two_are_exact() -> None:
    exponents = torch.arange(-126, 128)
    powers = power_of_two(exponents.float())
    assert powers.tolist() == [2.0**e for e in exponents.tolist()]
    for dtype in (torch.float32, torch.float64):
        logarithm, whole = exact_log2(powers.to(dtype))
        assert torch.equal(logarithm, exponents.to(dtype)) and bool(whole.all())
    assert not exact_log2(torch.nextafter(powers, powers * 2))[1].any()


@pytest.mark.parametrize("kind", [TQT, TQTFrozen])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_scales_are_the_next_power_of_two(kind: type, bits: int, signed: bool) -> None:
    for exponent in range(-12, 8):
        for factor in (1.0, 0.51, 0.75, 0.999):
            q = kind(bits)
            q.set_scale(torch.tensor([factor * 2.0**exponent]), signed)
            assert q.effective_scale().item() == 2.0**exponent


def test_the_scale_of_a_threshold() -> None:
    # The paper's s = 2^ceil(log2 t) / 2^(b - 1), unsigned / 2^b, at 4 bits.
    for signed, divisor in ((True, 8), (False, 16)):
        q = TQT(4)
        q.set_scale(torch.ones(1), signed)
        for threshold, power in ((3.0, 4.0), (4.0, 4.0), (5.0, 8.0)):
            with torch.no_grad():
                q.log2_threshold.fill_(math.log2(threshold))
            assert q.effective_scale().item() == power / divisor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_of_both_signs(dtype: torch.dtype) -> None:
    q = TQT(4, dtype=dtype)
    scales = torch.tensor([0.25, 0.3, 2.0], dtype=dtype)
    q.set_scale(scales, [True, False, False])
    found = torch.cat([q.effective_scale(level) for level in range(3)])
    assert torch.equal(found, torch.tensor([0.25, 0.5, 2.0], dtype=dtype))
    x = torch.randn(20, dtype=dtype)
    assert q(x).dtype == dtype


def test_a_power_of_two_is_not_left_by_a_small_step() -> None:
    q = TQT(4)
    q.set_scale(torch.tensor([0.25]), True)
    for step in (-0.4, 0.8):
        with torch.no_grad():
            q.log2_threshold += step
        assert q.effective_scale().item() == 0.25


@pytest.mark.parametrize("start", [2.0**-6, 4.0])
@pytest.mark.parametrize("signed", [True, False])
def test_the_threshold_trains_to_the_best_power_of_two(start: float, signed: bool) -> None:
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    x = x if signed else x.relu()
    low, high = code_range(4, signed)

    def error(scale: float) -> float:
        return ((x / scale).round().clamp(low, high) * scale - x).square().mean().item()

    best = min((2.0**e for e in range(-8, 4)), key=error)
    q = TQT(4, grad_scale=None)
    q.set_scale(torch.tensor([start]), signed)
    optimizer = torch.optim.Adam(q.parameters(), lr=0.1)
    seen = []
    for _ in range(200):
        optimizer.zero_grad()
        (q(x) - x).square().mean().backward()
        optimizer.step()
        seen.append(q.effective_scale().item())
    # The gradients of two neighbouring powers of two may point at each other.
    assert best in seen[-50:] and set(seen[-50:]) <= {best / 2, best, best * 2}


def test_a_threshold_gone_wrong_shows() -> None:
    q = TQT(4)
    q.set_scale(torch.tensor([0.25]), True)
    with torch.no_grad():
        q.log2_threshold.fill_(math.nan)
        assert q(torch.ones(3)).isnan().all()
        q.log2_threshold.fill_(1e9)
        assert q.effective_scale().isfinite()


def official(x: torch.Tensor, scale: float, bits: int, ties: str) -> torch.Tensor:
    """The official code's formula, its exponent worked out in Python."""
    s = 2.0 ** -math.floor(math.log2(1 / scale))
    low, high = code_range(bits, True)
    if ties == "weights":
        return (x / s).round().clamp(low, high) * s
    ratio = (x / s).clamp(low, high)
    half_down = (ratio < 0) & (ratio - ratio.floor() == 0.5)
    return torch.where(half_down, ratio.ceil(), ratio.round()) * s


@pytest.mark.parametrize("axis", [None, 0, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_frozen_is_the_official_code(bits: int, axis: int | None) -> None:
    halves = torch.arange(-600, 600).reshape(-1, 2) * 0.125
    for ties in ("weights", "inputs"):
        channels = 1 if axis is None else halves.shape[axis]
        q = TQTFrozen(bits, official_ties=ties == "inputs", ch_axis=axis, channels=channels)
        q.set_scale(torch.full((channels,), 0.2), True)
        x = halves.clone().requires_grad_()
        y = q(x)
        y.sum().backward()
        assert torch.equal(y, official(halves, 0.2, bits, ties))
        low, high = code_range(bits, True)
        code = halves / 0.25
        up = torch.where((code < 0) & (code - code.floor() == 0.5), code.ceil(), code.round())
        # The official backward pass rounds by the inputs' rule for weights too; at the ends of the
        # range, which are even below and odd above, both rules agree on what is inside.
        assert x.grad is not None
        assert torch.equal(x.grad, ((up >= low) & (up <= high)).float())
    assert not list(q.parameters())


def test_the_two_rules_differ_at_negative_halves_alone() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    results = []
    for flag in (False, True):
        q = TQTFrozen(4, official_ties=flag)
        q.set_scale(torch.ones(1), True)
        results.append(q(x).tolist())
    assert results == [[-2, -2, 0, 0, 2, 2], [-2, -1, 0, 0, 2, 2]]
