"""Observers over a histogram, within the bounds that they promise; and powers of two."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hqod_ops.quant.observers import MSE, Percentile, PowerOfTwo, PowerOfTwoRange, code_range
from hqod_ops.quant.observers.histogram import Histogram
from python_tests.quant.observers.test_observers import brute_force


def filled(batches: list[Tensor], bins: int = 64) -> Histogram:
    histogram = Histogram(bins)
    for batch in batches:
        histogram.add(batch, batch.amin(dim=1), batch.amax(dim=1))
    return histogram


def assert_same(one: Histogram, other: Histogram) -> None:
    for name in ("exponent", "low", "high", "counts"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    torch.testing.assert_close(one.sums, other.sums)


values = st.floats(-1e6, 1e6, width=32)


@given(st.lists(st.lists(values, min_size=1, max_size=20), min_size=1, max_size=4))
def test_every_value_is_in_its_bin(lists: list[list[float]]) -> None:
    batches = [torch.tensor(entries)[None] for entries in lists]
    histogram, x = filled(batches), torch.cat(batches, dim=1).double()
    borders, largest = histogram.borders(), x.abs().max()
    assert histogram.counts.sum() == x.numel()
    if largest > 0:
        # At most twice the range that is needed, and the largest value within it.
        assert largest < borders[0, -1] <= 2 * largest
    for index in range(histogram.bins):
        inside = (x >= borders[0, index]) & (x < borders[0, index + 1])
        assert histogram.counts[0, index] == inside.sum()
        torch.testing.assert_close(histogram.sums[0, index], x[inside].sum())


@given(st.lists(st.lists(values, min_size=3, max_size=3), min_size=2, max_size=5))
def test_order_and_place_of_the_data_do_not_matter(lists: list[list[float]]) -> None:
    batches = [torch.tensor(entries)[:, None] for entries in lists]
    together = filled([torch.cat(batches, dim=1)])
    assert_same(filled(batches), together)
    assert_same(filled(batches[::-1]), together)
    assert_same(Histogram.merged([filled([batch]) for batch in batches]), together)


def test_memory_does_not_grow() -> None:
    histogram = filled([torch.randn(2, 50) * 10.0**i for i in range(-30, 30, 3)])
    assert histogram.counts.shape == histogram.sums.shape == (2, 64)
    assert histogram.counts.sum(dim=1).tolist() == [1000, 1000]


@pytest.mark.parametrize("percentile", [60.0, 99.0, 99.9, 100.0])
@pytest.mark.parametrize("bins", [64, 4096])
def test_percentile_is_off_by_a_bin_at_most(percentile: float, bins: int) -> None:
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        batches = [torch.randn(333, generator=generator) * (i + 1) for i in range(3)]
        observer = Percentile(8, percentile=percentile, bins=bins, symmetric=False)
        for batch in batches:
            observer.observe(batch)
        x = torch.cat(batches).sort().values
        wanted = math.ceil(percentile / 100 * len(x) - 1e-9)
        exact_low, exact_high = x[-wanted].item(), x[wanted - 1].item()
        width = 4 * x.abs().max().item() / bins
        # The codes span the range that was found; the zero point is a whole one, so that their ends
        # may be half a step beside those of the range.
        step, zero = observer.scale().item(), observer.zero_point()
        assert zero is not None
        span, most = 255 * step, min(exact_high + width, x[-1].item())
        assert exact_high - exact_low <= span + 1e-6
        assert span <= most - max(exact_low - width, x[0].item()) + 1e-6
        low = (code_range(8, observer.signed)[0] - zero.item()) * step
        assert exact_low - width - step / 2 <= low + 1e-6 and low <= exact_low + step / 2 + 1e-6


def test_percentile_of_mostly_zeros() -> None:
    observer = Percentile(4, percentile=99.0)
    observer.observe(torch.zeros(1000))
    assert observer.scale().item() == 0
    observer.observe(torch.tensor([5.0]))
    # One value in a thousand is left out; a bin above 0 remains, not a scale of 0.
    assert 0 < observer.scale().item() * 15 <= 4 * 5.0 / 4096


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("bins", [64, 4096])
@pytest.mark.parametrize("signed", [True, False])
def test_mse_is_within_its_bound_of_the_best(bits: int, bins: int, signed: bool) -> None:
    for seed in range(3):
        x = torch.randn(900, generator=torch.Generator().manual_seed(seed)) ** 3
        x = x if signed else x.abs()
        observer = MSE(bits, bins=bins)
        for batch in x.split(250):
            observer.observe(batch)
        scales, errors = brute_force(x, bits, signed)
        chosen = min(range(95), key=lambda i: abs(scales[i] - observer.scale().item()))
        assert observer.scale().item() == pytest.approx(scales[chosen], rel=1e-6)
        # The bound, with the share of values in bins that a border cuts, at the best scale.
        best = min(range(95), key=errors.__getitem__)
        low, high = code_range(bits, signed)
        width, s = observer._histogram.width.item(), scales[best]
        cut = ((torch.arange(low, high) + 0.5) * s / width).floor().unique()
        share = torch.isin((x.double() / width).floor(), cut.double()).double().mean().item()
        assert errors[chosen] <= errors[best] + 2 * s * width * share + 1e-12


def test_bad_settings() -> None:
    for percentile in (50.0, 100.1):
        with pytest.raises(ValueError, match="percentile"):
            Percentile(4, percentile=percentile)
    for bins in (0, 8, 100):
        with pytest.raises(ValueError, match="bins"):
            MSE(4, bins=bins)
    with pytest.raises(ValueError, match="steps"):
        MSE(4, steps=0)


def vote(x: Tensor, bits: int, signed: bool, candidates: int) -> int:
    """The official search for one batch, quantizing once a candidate."""
    x = x.double()
    low, high = code_range(bits, signed)
    scale = max(x.min().item() / low, x.max().item() / high) if signed else x.max().item() / high
    first = math.floor(math.log2(1 / scale))

    def error(e: int) -> float:
        s = 2.0**-e
        return ((x / s).round().clamp(low, high) * s - x).square().sum().item()

    return min((min(first + i, 12) for i in range(candidates)), key=error)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("kind", "candidates"), [(PowerOfTwo, 5), (PowerOfTwoRange, 1)])
def test_the_most_frequent_power_of_two(
    bits: int, signed: bool, kind: type[PowerOfTwo], candidates: int
) -> None:
    generator = torch.Generator().manual_seed(bits)
    batches = [torch.randn(100, generator=generator) * factor for factor in (1, 2, 1.1, 0.01, 1.2)]
    batches = batches if signed else [batch.abs() for batch in batches]
    observer = kind(bits)
    votes: list[int] = []
    for batch in batches:
        observer.observe(batch)
        votes.append(vote(batch, bits, signed, candidates))
        most = max(votes.count(e) for e in votes)
        assert observer.signed == signed
        assert observer.scale().item() == 2.0 ** -min(e for e in votes if votes.count(e) == most)


def test_power_of_two_at_its_limits() -> None:
    for x, scale in ((1e-9, 2.0**-12), (1e9, 2.0**7), (0.0, 0.0)):
        observer = PowerOfTwo(4)
        observer.observe(torch.tensor([x]))
        assert observer.scale().item() == scale
    # A scale that is a power of two needs no rounding: e0 = 3 for max = 7 / 8 and qmax = 7.
    exact = PowerOfTwoRange(4, signed=True)
    exact.observe(torch.tensor([7 / 8]))
    assert exact.scale().item() == 0.125
