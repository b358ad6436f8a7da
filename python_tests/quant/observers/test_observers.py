"""Observers, against formulas worked out here and a search that quantizes once per candidate."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hqod_ops.quant.observers import (
    EMAMSE,
    OBSERVERS,
    EMAMinMax,
    LSQInit,
    MinMax,
    Observer,
    affine_for_range,
    code_range,
    scale_for_range,
)
from hqod_ops.testing.quantizers import OBSERVER_CASES, ObserverCase


@pytest.mark.parametrize(
    ("bits", "signed", "codes"),
    [
        (2, True, (-2, 1)),
        (4, True, (-8, 7)),
        (8, True, (-128, 127)),
        (2, False, (0, 3)),
        (4, False, (0, 15)),
        (8, False, (0, 255)),
    ],
)
def test_code_range(bits: int, signed: bool, codes: tuple[int, int]) -> None:
    assert code_range(bits, signed) == codes


@pytest.mark.parametrize(("bits", "divisor"), [(2, 1.5), (4, 7.5), (8, 127.5)])
def test_minmax_scale_of_weights(bits: int, divisor: float) -> None:
    observer = MinMax(bits, signed=True)
    observer.observe(torch.tensor([0.3, -1.2, 0.9]))
    torch.testing.assert_close(observer.scale(), torch.tensor([1.2 / divisor]))


def test_minmax_keeps_the_widest_range_and_finds_the_sign() -> None:
    observer = MinMax(4)
    observer.observe(torch.tensor([0.0, 3.0]))
    assert not observer.signed
    torch.testing.assert_close(observer.scale(), torch.tensor([3.0 / 15]))
    observer.observe(torch.tensor([-0.5, 1.0]))
    assert observer.signed
    torch.testing.assert_close(observer.scale(), torch.tensor([3.0 / 7.5]))


@pytest.mark.parametrize(("bits", "quant_max"), [(2, 1), (4, 7), (8, 127)])
def test_lsq_init(bits: int, quant_max: int) -> None:
    observer = LSQInit(bits, signed=True)
    observer.observe(torch.tensor([0.5, -1.5]))
    observer.observe(torch.tensor([0.1]))
    mean = (0.5 + 1.5 + 0.1) / 3
    torch.testing.assert_close(observer.scale(), torch.tensor([2 * mean / math.sqrt(quant_max)]))


def brute_force(x: Tensor, bits: int, signed: bool) -> tuple[list[float], list[float]]:
    """Scale and mean squared error of all 95 candidates, each by quantizing x."""
    x = x.double()
    low, high = code_range(bits, signed)
    extent = max(-x.min().item(), x.max().item()) if signed else max(x.max().item(), 0.0)
    divisor = (high - low) / 2 if signed else high
    scales = [extent * (1 - 0.01 * i) / divisor for i in range(95)]
    errors = [(((x / s).round().clamp(low, high) * s - x) ** 2).mean().item() for s in scales]
    return scales, errors


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_mse_search_finds_the_best_of_all_candidates(bits: int, signed: bool) -> None:
    for seed in range(4):
        x = torch.randn(3, 5, 41, generator=torch.Generator().manual_seed(seed)) ** 3
        x = x if signed else x.relu()
        observer = EMAMSE(bits)
        observer.observe(x)
        scales, errors = brute_force(x, bits, signed)
        assert observer.signed == signed
        best = min(range(95), key=errors.__getitem__)
        # Several candidates can have the same error; then any of them will do.
        chosen = min(range(95), key=lambda i: abs(scales[i] - observer.scale().item()))
        assert observer.scale().item() == pytest.approx(scales[chosen], rel=1e-6)
        assert errors[chosen] <= errors[best] * (1 + 1e-9)


@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30),
    bits=st.sampled_from([2, 3, 4, 8]),
)
def test_mse_search_on_generated_data(values: list[float], bits: int) -> None:
    x = torch.tensor(values)
    observer = EMAMSE(bits)
    observer.observe(x)
    signed = bool((x < 0).any())
    assert observer.signed == signed
    scale = observer.scale().item()
    if not x.any():
        assert scale == 0
        return
    scales, errors = brute_force(x, bits, signed)
    chosen = min(range(95), key=lambda i: abs(scales[i] - scale))
    # The prefix sums lose what the squares of the largest values swallow in float64.
    assert errors[chosen] <= min(errors) * (1 + 1e-6) + 1e-12 * x.double().square().max().item()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_search_with_a_zero_point(bits: int) -> None:
    for signed in (True, False):
        x = torch.randn(300, generator=torch.Generator().manual_seed(bits)).exp() - 0.5
        observer = EMAMSE(bits, signed=signed, symmetric=False)
        observer.observe(x)
        low, high = code_range(bits, signed)
        candidates = []
        for i in range(95):
            ends = x.min().double() * (1 - 0.01 * i), x.max().double() * (1 - 0.01 * i)
            s = (ends[1] - ends[0]) / (high - low)
            z = (low - ends[0] / s).round()
            codes = ((x.double() / s).round() + z).clamp(low, high)
            candidates.append((((codes - z) * s - x) ** 2).sum().item())
            if i == 0:
                whole, zero = s.item(), z.item()
        best = min(range(95), key=candidates.__getitem__)
        assert observer.scale().item() == pytest.approx(whole * (1 - 0.01 * best), rel=1e-6)
        assert observer.zero_point().tolist() == [zero]  # type: ignore[union-attr]


def test_ema_of_the_ends() -> None:
    observer = EMAMinMax(4, symmetric=False, momentum=0.75)
    for low, high in ((-1.0, 2.0), (-3.0, 10.0)):
        observer.observe(torch.tensor([low, 0.3, high]))
    scale, zero = (4.0 + 1.5) / 15, round(-8 + 1.5 / ((4.0 + 1.5) / 15))
    assert observer.scale().item() == pytest.approx(scale)
    assert observer.zero_point().tolist() == [zero]  # type: ignore[union-attr]


def test_ema_of_the_ranges() -> None:
    batches = [
        torch.randn(200, generator=torch.Generator().manual_seed(i)) * (i + 1) for i in (1, 2, 3)
    ]
    low = high = None
    observer = EMAMSE(4)
    for x in batches:
        scales, errors = brute_force(x, 4, True)
        shrink = 1 - 0.01 * min(range(95), key=errors.__getitem__)
        new_low, new_high = x.min().item() * shrink, x.max().item() * shrink
        low = new_low if low is None else 0.9 * low + 0.1 * new_low
        high = new_high if high is None else 0.9 * high + 0.1 * new_high
        observer.observe(x)
    assert low is not None and high is not None
    assert observer.scale().item() == pytest.approx(max(-low, high) / 7.5, rel=1e-5)


def test_ema_is_that_of_the_final_sign_from_the_first_batch_on() -> None:
    # The first batch alone would be unsigned; the second shows that the codes must be signed.
    batches = [torch.rand(50), torch.randn(50)]
    found, told = EMAMSE(4), EMAMSE(4, signed=True)
    for x in batches:
        found.observe(x)
        told.observe(x)
    assert found.signed
    assert torch.equal(found.scale(), told.scale())


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("ch_axis", [0, 1, -1])
def test_per_channel_is_each_channel_alone(name: str, ch_axis: int) -> None:
    x = torch.randn(4, 5, 6) * torch.arange(1, 5)[:, None, None]
    observer = OBSERVERS[name](4, signed=True, ch_axis=ch_axis)
    observer.observe(x)
    assert observer.scale().shape == (x.shape[ch_axis],)
    for index, scale in enumerate(observer.scale()):
        alone = OBSERVERS[name](4, signed=True)
        alone.observe(x.select(ch_axis, index))
        torch.testing.assert_close(scale, alone.scale()[0])


@pytest.mark.parametrize("kind", OBSERVERS.values())
def test_memory_layout_and_dtype_do_not_matter(kind: type[Observer]) -> None:
    x = torch.randn(2, 3, 8, 8).bfloat16()
    plain, other = kind(4), kind(4)
    plain.observe(x)
    other.observe(x.to(torch.float64).contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(plain.scale(), other.scale().float())
    assert plain.scale().dtype == torch.float32
    assert other.scale().dtype == torch.float64


@pytest.mark.parametrize("kind", OBSERVERS.values())
def test_no_data_and_bad_data(kind: type[Observer]) -> None:
    observer = kind(4)
    observer.observe(torch.empty(0, 3))
    with pytest.raises(RuntimeError, match="no data"):
        observer.scale()
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            observer.observe(torch.tensor([1.0, bad]))
    for bits in (1, 9, 0, -4):
        with pytest.raises(ValueError, match="bits"):
            kind(bits)


def test_bad_settings_of_the_search() -> None:
    with pytest.raises(ValueError, match="momentum"):
        EMAMSE(4, momentum=1.0)
    with pytest.raises(ValueError, match="momentum"):
        EMAMinMax(4, momentum=-0.1)
    with pytest.raises(ValueError, match="steps"):
        EMAMSE(4, steps=101)


def test_registry() -> None:
    assert [case.name for case in OBSERVER_CASES] == list(OBSERVERS)
    for case in OBSERVER_CASES:
        kind = OBSERVERS[case.name]
        assert kind.asymmetric == case.asymmetric
        if case.asymmetric:
            assert not kind(4, symmetric=False).symmetric
        else:
            with pytest.raises(ValueError, match="symmetric"):
                kind(4, symmetric=False)
        shown = inspect.signature(kind).parameters
        assert {name: p.default for name, p in shown.items() if name != "bits"} == kind.defaults()
        assert {"signed", "ch_axis", "symmetric"} <= set(shown)
        with pytest.raises(TypeError, match="'step'"):
            kind(4, step=3)


def test_scale_for_range_takes_in_zero() -> None:
    # A range that lies on one side of 0 is that from 0 to its far end.
    low, high = torch.tensor([-3.0]), torch.tensor([-1.0])
    assert scale_for_range(low, high, 4, True).item() == pytest.approx(3 / 7.5)
    assert scale_for_range(low, high, 4, False).item() == 0


def test_affine_for_range() -> None:
    low, high = torch.tensor([-1.0, -5.0, 2.0, 0.0]), torch.tensor([2.0, -1.0, 4.0, 0.0])
    for signed, shift in ((False, 0), (True, -8)):
        scale, zero = affine_for_range(low, high, 4, signed)
        torch.testing.assert_close(scale, torch.tensor([3.0, 5.0, 4.0, 0.0]) / 15)
        # 0 is taken into the range; a range of nothing has no scale, and zero point 0.
        assert zero.tolist() == [5 + shift, 15 + shift, 0 + shift, 0]


@pytest.mark.parametrize("case", OBSERVER_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("symmetric", [True, False])
def test_merging_is_seeing_it_all(case: ObserverCase, symmetric: bool) -> None:
    kind = OBSERVERS[case.name]
    if not symmetric and not case.asymmetric:
        return
    torch.manual_seed(3)
    # The sign shows in one half of the data alone; the halves differ in size of the values.
    halves = [[torch.rand(40) * 3, torch.rand(50)], [torch.randn(40), torch.randn(30) * 9]]
    observers = [kind(4, symmetric=symmetric) for _ in range(3)]
    whole = kind(4, symmetric=symmetric)
    for observer, batches in zip(observers, halves, strict=False):
        for batch in batches:
            observer.observe(batch)
            whole.observe(batch)
    states = [observer.state() for observer in observers]
    for observer in observers:
        observer.merge(states)
    assert observers[2].count == 4 and observers[2].signed
    scales = [observer.scale() for observer in observers]
    assert all(torch.equal(scale, scales[0]) for scale in scales)
    zeros = [observer.zero_point() for observer in observers]
    assert (zeros[0] is None) == symmetric
    if case.averages:
        # A moving average has an order: merged it is the mean of both, as of 2 batches each.
        alone = [kind(4, signed=True, symmetric=symmetric) for _ in halves]
        for observer, batches in zip(alone, halves, strict=True):
            for batch in batches:
                observer.observe(batch)
        ends = [observer._range() for observer in alone]  # type: ignore[attr-defined]
        low, high = ((a + b) / 2 for a, b in zip(*ends, strict=True))
        find = scale_for_range if symmetric else lambda *args: affine_for_range(*args)[0]
        torch.testing.assert_close(scales[0], find(low, high, 4, True))
    else:
        torch.testing.assert_close(scales[0], whole.scale(), rtol=1e-6, atol=0)
        assert symmetric or torch.equal(zeros[0], whole.zero_point())  # type: ignore[arg-type]
