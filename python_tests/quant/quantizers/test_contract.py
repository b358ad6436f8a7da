"""What every quantizer promises, on all of them: numbers, state, copies, precision, compilers."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hqod_ops.quant.observers import OBSERVERS, code_range
from hqod_ops.quant.quantizers.base import Quantizer
from hqod_ops.quant.quantizers.registry import QUANTIZERS, own_options
from hqod_ops.testing.quantizers import CASES, Call, Case

CHANNELS = 3
every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def build(case: Case, bits: int = 4, **common: Any) -> Quantizer:
    return QUANTIZERS[case.name](bits, observer="minmax", **case.options, **common)


def scales(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Scales at which normal data is partly clipped, whatever the bits."""
    return 0.6 + torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def zero_points(shape: tuple[int, ...], low: int, high: int) -> Tensor:
    zeros = torch.arange(shape[-1]) * 2 - 1 + (low + high + 1) // 2
    return zeros.clamp(low, high).expand(shape)


def made(
    case: Case, bits: int = 4, signed: bool = True, axis: int | None = None, **common: Any
) -> Quantizer:
    """A calibrated quantizer of one level."""
    signed = signed if signed in case.signs else case.signs[0]
    channels = 1 if axis is None else CHANNELS
    quantizer = build(case, bits, ch_axis=axis, channels=channels, **common)
    low, high = code_range(bits, signed)
    scale = scales((channels,)) / high
    zero = None if case.symmetric else zero_points((channels,), low, high).to(scale)
    quantizer.set_scale(scale, signed, zero)
    return quantizer


def data(dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, CHANNELS, 5, 7, generator=generator, dtype=torch.float64).to(dtype)


def step(call: Any, quantizer: Quantizer, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx and the gradients of all parameters."""
    quantizer.zero_grad()
    leaf = x.clone().requires_grad_()
    y = call(leaf)
    y.backward(dy)
    assert leaf.grad is not None
    return [y.detach(), leaf.grad, *(p.grad.clone() for p in quantizer.parameters())]  # type: ignore[union-attr]


def spread(value: Tensor, axis: int | None) -> Tensor:
    """A value one a channel, in a shape that broadcasts against the data."""
    return value.detach() if axis is None else value.detach().reshape(-1, 1, 1)


@every
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("axis", [None, 1], ids=["tensor", "channel"])
@pytest.mark.numeric
def test_value_and_gradients(case: Case, bits: int, signed: bool, axis: int | None) -> None:
    if signed not in case.signs or (axis is not None and not case.per_channel):
        return
    quantizer = made(case, bits, signed, axis, dtype=torch.float64)
    x, dy = data(torch.float64), data(torch.float64, seed=2)
    low, high = quantizer.codes()
    count = x.numel() // (1 if axis is None else CHANNELS)
    values = {name: spread(getattr(quantizer, name), axis) for name in quantizer.values}
    wanted = case.formula(Call(x, dy, low, high, 1 / (count * high) ** 0.5), values)
    y, dx, *grads = step(quantizer, quantizer, x, dy)
    torch.testing.assert_close(y, wanted.y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dx, wanted.dx, rtol=1e-9, atol=1e-11)
    names = [name for name, _ in quantizer.named_parameters()]
    assert names == list(wanted.terms)
    for name, grad in zip(names, grads, strict=True):
        terms = wanted.terms[name]
        total = terms.sum().reshape(1) if axis is None else terms.sum(dim=(0, 2, 3))
        torch.testing.assert_close(grad, total, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: n + m)


@every
@pytest.mark.parametrize("bits", range(2, 9))
def test_results_are_codes(case: Case, bits: int) -> None:
    for signed in case.signs:
        quantizer = made(case, bits, signed)
        low, high = quantizer.codes()
        scale, zero = quantizer.effective_scale(), quantizer.effective_zero_point()
        assert scale.shape == (1,) and bool(scale > 0)
        assert (zero is None) == quantizer.symmetric == case.symmetric
        if zero is not None:
            assert zero.shape == scale.shape and low <= zero.item() <= high
            assert zero.item() == round(zero.item())
        y = quantizer(data())
        code = y / scale + (0 if zero is None else zero)
        # A code times a float32 scale is rounded once, by half an ulp: 2**-24 of at most 2**8.
        assert (code - code.round()).abs().max() < 1e-4
        assert low <= code.round().min() and code.round().max() <= high


@every
def test_channels_do_not_mix(case: Case) -> None:
    if not case.per_channel or case.squeezed:
        return
    for axis in (1, -3):
        quantizer, x = made(case, axis=axis), data()
        y = quantizer(x)
        zeros = quantizer.effective_zero_point()
        for index in range(CHANNELS):
            alone = build(case)
            zero = None if zeros is None else zeros[index : index + 1]
            alone.set_scale(quantizer.effective_scale()[index : index + 1].detach(), True, zero)
            torch.testing.assert_close(alone(x[:, index]), y[:, index])


def leveled(case: Case, levels: int, axis: int | None) -> Quantizer:
    """A calibrated quantizer of several levels, of both signs where it has them."""
    channels = () if axis is None else (CHANNELS,)
    shape = (levels, *channels) if levels > 1 else channels or (1,)
    quantizer = build(case, ch_axis=axis, channels=CHANNELS if channels else 1)
    signs = [case.signs[level % len(case.signs)] for level in range(levels)]
    rows = [zero_points(channels or (1,), *code_range(4, sign)) for sign in signs]
    zero = None if case.symmetric else torch.stack(rows).reshape(shape).float()
    quantizer.set_scale(scales(shape), signs, zero)
    return quantizer


def results(quantizer: Quantizer) -> list[Tensor]:
    """One forward pass: every level on the same data."""
    quantizer.reset_level()
    return [quantizer(data()).detach() for _ in range(quantizer.levels)]


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(got) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@every
@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("axis", [None, 1], ids=["tensor", "channel"])
def test_state_dict_round_trip(case: Case, levels: int, axis: int | None) -> None:
    if axis is not None and not case.per_channel:
        return
    quantizer = leveled(case, levels, axis)
    wanted = results(quantizer)
    if levels > 1:
        assert not torch.equal(wanted[0], wanted[1])
    shape = ((levels,) if levels > 1 else ()) + (() if axis is None else (CHANNELS,)) or (1,)
    state = quantizer.state_dict()
    assert all(state[name].shape == shape for name in quantizer.values)
    for assign in (False, True):
        other = build(case, ch_axis=axis, channels=1 if axis is None else CHANNELS)
        held = dict(other.named_parameters())
        other.load_state_dict(state, assign=assign)
        assert_same(results(other), wanted)
        assert other.levels == levels
        assert [other.codes(i) for i in range(levels)] == [
            quantizer.codes(i) for i in range(levels)
        ]
        # An optimizer made before loading must go on training the same parameters.
        assert assign or all(p is held[name] for name, p in other.named_parameters())
        # What was loaded can be saved again.
        build(case, ch_axis=axis, channels=1 if axis is None else CHANNELS).load_state_dict(
            other.state_dict()
        )


@every
def test_a_state_of_another_layout_is_refused(case: Case) -> None:
    state = leveled(case, 2, None).state_dict()
    name = QUANTIZERS[case.name].values[0]
    with pytest.raises(RuntimeError, match=f"expected all of the keys {name}, .*code_range alone"):
        build(case).load_state_dict({"code_range": state["code_range"]})
    with pytest.raises(RuntimeError, match=rf"{name}: expected shape \(2,\), got \(3,\)"):
        build(case).load_state_dict({**state, name: torch.ones(3)})
    with pytest.raises(RuntimeError, match=r"code_range: expected .*\(5 bits\), got"):
        build(case, 5).load_state_dict(state)


@every
def test_a_deepcopy_is_equal_and_independent(case: Case) -> None:
    quantizer = leveled(case, 3, None)
    wanted = results(quantizer)
    other = copy.deepcopy(quantizer)
    assert_same(results(other), wanted)
    other.set_scale(torch.tensor([9.0]), case.signs[0])
    assert_same(results(quantizer), wanted)


@every
@pytest.mark.parametrize("axis", [None, 1], ids=["tensor", "channel"])
def test_under_autocast(case: Case, axis: int | None) -> None:
    if axis is not None and not case.per_channel:
        return
    quantizer = made(case, 8, axis=axis)
    for dtype in (torch.bfloat16, torch.float32):
        x, dy = data(dtype), data(dtype, seed=2)
        wide = step(quantizer, quantizer, x.float(), dy.float())
        with torch.autocast("cpu", torch.bfloat16):
            y, dx, *grads = step(quantizer, quantizer, x, dy)
        assert y.dtype == dx.dtype == dtype
        assert all(grad.dtype == torch.float32 for grad in grads)
        # Computed in float32 from the same values; what is stored in bfloat16 is rounded once.
        tolerance = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
        for got, want in zip((y, dx, *grads), wide, strict=True):
            torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=1e-6)


@every
def test_a_model_in_half_precision(case: Case) -> None:
    quantizer = made(case).bfloat16()
    y, dx, *grads = step(quantizer, quantizer, data(torch.bfloat16), data(torch.bfloat16, seed=2))
    assert all(t.dtype == torch.bfloat16 and t.isfinite().all() for t in (y, dx, *grads))


@every
@pytest.mark.parametrize("axis", [None, 1], ids=["tensor", "channel"])
def test_compiles_without_a_break(case: Case, axis: int | None) -> None:
    if axis is not None and not case.per_channel:
        return
    quantizer = made(case, axis=axis)
    torch._dynamo.reset()
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    x, dy = data(), data(seed=2)
    for got, want in zip(
        step(compiled, quantizer, x, dy), step(quantizer, quantizer, x, dy), strict=True
    ):
        torch.testing.assert_close(got, want)


@every
def test_never_calibrated(case: Case) -> None:
    quantizer = build(case)
    quantizer.label = "head.conv.input_quantizer"
    for other in (quantizer, copy.deepcopy(quantizer)):
        with pytest.raises(RuntimeError, match=r"head\.conv\.input_quantizer.*never calibrated"):
            other(data())
    loaded = made(case)
    loaded.load_state_dict(quantizer.state_dict())
    assert not loaded.calibrated
    with pytest.raises(RuntimeError, match="never calibrated"):
        loaded(data())


@every
def test_passes_x_through_where_it_is_off(case: Case) -> None:
    quantizer, x = made(case), data()
    quantizer.enabled = False
    assert quantizer(x) is x
    quantizer.enabled = True
    quantizer.start_observing()
    assert quantizer(x) is x
    quantizer.stop_observing()
    assert not torch.equal(quantizer(x), x)


@every
@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("axis", [None, 1], ids=["tensor", "channel"])
def test_every_observer_calibrates(case: Case, observer: str, axis: int | None) -> None:
    kind = QUANTIZERS[case.name]
    common = {"ch_axis": axis, "channels": 1 if axis is None else CHANNELS}
    if axis is not None and not case.per_channel:
        with pytest.raises(ValueError, match="ch_axis"):
            kind(8, observer=observer, **common, **case.options)
        return
    if not case.symmetric and not OBSERVERS[observer].asymmetric:
        with pytest.raises(ValueError, match=r"observer: expected one that finds a zero point"):
            kind(8, observer=observer, **common, **case.options)
        return
    for x in (data(), data() * torch.tensor([1.0, 0.0, 1.0])[:, None, None], data().relu() + 1):
        quantizer = kind(8, observer=observer, **common, **case.options)
        quantizer.start_observing()
        quantizer(x)
        observed = quantizer.observed_scale()
        quantizer.stop_observing()
        assert observed is not None
        quantizer.set_scale(*observed)
        target = quantizer.transform(x) if case.squeezed else x
        # 8 bits, but LSQ's initial scale clips, the more so rounded up to a power of two.
        assert (quantizer(x) - target).norm() < 0.08 * target.norm()


class NoReads(TorchDispatchMode):
    """Raises where a value would be read from a tensor, which on an accelerator means waiting."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            raise AssertionError(f"{func} reads a value")
        return func(*args, **(kwargs or {}))


@every
def test_a_step_reads_no_value(case: Case) -> None:
    for axis in (None, 1) if case.per_channel else (None,):
        quantizer = made(case, axis=axis)
        with NoReads():
            step(quantizer, quantizer, data(), data(seed=2))


@every
def test_nothing_and_not_a_number(case: Case) -> None:
    quantizer = made(case)
    empty = torch.empty(0, CHANNELS, 5, 7)
    y, dx, *grads = step(quantizer, quantizer, empty, empty)
    assert y.shape == dx.shape == empty.shape
    assert all(torch.equal(grad, torch.zeros(1)) for grad in grads)
    x = data()
    x[0, 0, 0, 0] = torch.nan
    assert quantizer(x)[0, 0, 0, 0].isnan()


@every
def test_memory_layout_is_kept(case: Case) -> None:
    quantizer, x = made(case), data()
    wanted = quantizer(x)
    last = x.contiguous(memory_format=torch.channels_last)
    assert quantizer(last).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(quantizer(last), wanted)
    assert torch.equal(quantizer(x.transpose(2, 3)), wanted.transpose(2, 3))


@every
def test_on_the_meta_device(case: Case) -> None:
    quantizer = build(case, device="meta")
    assert all(t.is_meta for t in (*quantizer.parameters(), *quantizer.buffers()))
    source = made(case)
    quantizer.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(quantizer(data()), source(data()))
    quantizer.to("meta")
    y = quantizer(data().to("meta"))
    assert y.is_meta and y.shape == data().shape


@every
def test_what_is_trained_and_what_is_not(case: Case) -> None:
    """A scale far too large is trained towards a smaller error; a fixed one stays."""
    quantizer, x = build(case), data()
    quantizer.set_scale(torch.tensor([case.start]), True)
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}

    def error() -> Tensor:
        return (quantizer(x) - x).square().mean()

    start = error().item()
    parameters = list(quantizer.parameters())
    if not parameters:
        assert not quantizer.trained
        assert quantizer(x.requires_grad_()).requires_grad
        return
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert error().item() < 0.4 * start
    assert all(not torch.equal(before[n], p) for n, p in quantizer.named_parameters())
    assert torch.equal(before["code_range"], quantizer.code_range)


@every
@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_takes_in_an_activation_where_it_says_so(case: Case, activation: str) -> None:
    quantizer, x, dy = made(case), data() * 8, data(seed=2)
    if not quantizer.absorbs:
        return
    wanted = step(
        lambda leaf: quantizer(getattr(torch.nn.functional, activation)(leaf)), quantizer, x, dy
    )
    quantizer.activation = activation
    for got, want in zip(step(quantizer, quantizer, x, dy), wanted, strict=True):
        torch.testing.assert_close(got, want)


@every
def test_says_its_arguments(case: Case) -> None:
    """A class takes its own arguments and those of its bases, shows them all, and no other."""
    kind = QUANTIZERS[case.name]
    shown = inspect.signature(kind).parameters
    defaults = {name: p.default for name, p in shown.items() if name != "bits"}
    assert next(iter(shown)) == "bits" and defaults == kind.defaults()
    assert {"signed", "ch_axis", "channels", "observer", "device", "dtype"} <= set(defaults)
    assert set(case.options) <= set(own_options(case.name)) <= set(defaults)
    assert repr(kind(4, **defaults)) == repr(kind(4))
    with pytest.raises(TypeError, match="'alfa'"):
        kind(4, alfa=0.5)
    # Of an object it is what its call takes.
    assert "bits" not in inspect.signature(kind(4)).parameters


@every
def test_a_pickle_is_equal(case: Case) -> None:
    quantizer = leveled(case, 3, None)
    other = pickle.loads(pickle.dumps(quantizer))
    assert repr(other) == repr(quantizer)
    assert_same(results(other), results(quantizer))


def test_registry() -> None:
    assert {case.name for case in CASES} == set(QUANTIZERS)
    for case in CASES:
        kind = QUANTIZERS[case.name]
        assert kind.roles and kind.roles <= {"weight", "input"}
        assert kind.per_channel == case.per_channel
        for bits in (1, 9):
            with pytest.raises(ValueError, match=f"bits.*{bits}"):
                kind(bits)
        with pytest.raises(ValueError, match=r"observer.*'median'"):
            kind(4, observer="median")


@every
def test_bad_scales_are_refused(case: Case) -> None:
    quantizer = build(case)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive"):
            quantizer.set_scale(torch.tensor([bad]), signed=True)
    with pytest.raises(ValueError, match="one scale a level"):
        quantizer.set_scale(torch.ones(3), signed=[True, False])
    one = torch.ones(1)
    if case.symmetric:
        with pytest.raises(ValueError, match="zero_point: expected None"):
            quantizer.set_scale(one, True, one)
        return
    for bad in (0.5, 8.0, -9.0):
        with pytest.raises(ValueError, match=r"zero_point: expected whole numbers in \[-8, 7\]"):
            quantizer.set_scale(one, True, bad * one)
    with pytest.raises(ValueError, match="zero_point: expected the shape of scale"):
        quantizer.set_scale(one, True, torch.ones(2))
    assert not quantizer.calibrated
