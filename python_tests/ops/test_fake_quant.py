"""What is particular to fake_quant: rounding, ranges, layouts, special values, options."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from hqod_ops import FakeQuant
from hqod_ops.testing.cases import CASES, DTYPES, HALF, Variant, lay_out, quant_inputs
from hqod_ops.testing.device import DEVICE, fake_quant, to_device
from hqod_ops.testing.oracle import assert_close, assert_same_bits, check, run

CASE = CASES["fake_quant"]
DENSE = ("contiguous", "channels_last", "permuted")


def formula(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, low: int, high: int, axis: int | None
) -> Tensor:
    """The definition of the values, in the compute type, operation by operation."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = [-1 if i == axis else 1 for i in range(x.dim())] if axis is not None else []
    s = scale.to(dtype).reshape(shape)
    zero = torch.zeros((), dtype=dtype)
    if zero_point is not None:
        zero = zero_point.to(dtype).reshape(shape).round()
    code = torch.round(x.to(dtype) / s) + zero
    return ((code.clamp(low, high) - zero) * s).to(x.dtype)


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_values_have_the_bits_of_the_formula(dtype: torch.dtype) -> None:
    """Every operation is exact or correctly rounded in IEEE arithmetic, so nothing may differ.

    x is random here: near and on rounding ties too.
    """
    generator = torch.Generator().manual_seed(0)
    for shape in ((1,), (13,), (4099,), (3, 37), (5, 7, 3, 3), (2, 3, 4, 5, 6)):
        for axis in (None, *range(len(shape))):
            channels = 1 if axis is None else shape[axis]
            x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            scale = (torch.rand(channels, generator=generator, dtype=torch.float64) + 0.05).to(
                dtype
            )
            zero = (torch.rand(channels, generator=generator, dtype=torch.float64) * 12 - 6).to(
                dtype
            )
            for zero_point, (low, high) in itertools.product(
                (None, zero, zero.int()), ((-8, 7), (0, 3), (-128, 127), (3, 9), (-(2**24), 2**24))
            ):
                y = fake_quant(x, scale, zero_point, quant_min=low, quant_max=high, ch_axis=axis)
                expected = formula(x, scale, zero_point, low, high, axis)
                assert_same_bits(y, expected, f"{shape} {axis} {low} {high} {zero_point}")


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_ties_go_to_even(dtype: torch.dtype) -> None:
    """x / s of exactly k + 1/2, and the neighbours of x on either side."""
    for scale in (0.25, 1.0, 4.0):
        k = torch.arange(-60, 60, dtype=torch.float64)
        x = ((k + 0.5) * scale).to(dtype)
        around = torch.cat([x, torch.nextafter(x, x + 1), torch.nextafter(x, x - 1)])
        s = torch.tensor(scale, dtype=dtype)
        y = fake_quant(around, s, quant_min=-128, quant_max=127)
        assert_same_bits(y, (around / s).round() * s, f"{scale}")
        assert y[: len(k)].div(s).remainder(2).eq(0).all(), "half to even"
    # True division: 0.35 / 0.1f is not 0.35 * (1 / 0.1f) in float32.
    x, s = torch.arange(-200, 200, dtype=torch.float32) * 0.05, torch.tensor(0.1)
    y = fake_quant(x, s, quant_min=-128, quant_max=127)
    assert_same_bits(y, (x / s).round() * s, "true division")


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("share", [0.0005, 0.02, 1.0])
def test_quotients_near_ties(dtype: torch.dtype, share: float) -> None:
    """Where x * (1 / s) would not be enough: within a few roundings of k + 1/2, few or many.

    The CPU's kernels take the product for the quotient in blocks that have no such value.
    """
    generator = torch.Generator().manual_seed(int(share * 1e4))
    for shape, axis in (((70_001,), None), ((30, 2311), 0), ((301, 230), 1), ((7, 9, 1100), 1)):
        for low, high in ((-2, 1), (-8, 7), (0, 255), (-(2**14), 2**14)):
            channels = 1 if axis is None else shape[axis]
            scale = (torch.rand(channels, generator=generator, dtype=torch.float64) + 0.05).to(
                dtype
            )
            view = [-1 if i == axis else 1 for i in range(len(shape))]
            codes = torch.rand(shape, generator=generator, dtype=torch.float64)
            codes = low - 2 + codes * (high - low + 4)
            near = torch.rand(shape, generator=generator) < share
            x = (torch.where(near, codes.floor() + 0.5, codes) * scale.double().reshape(view)).to(
                dtype
            )
            for _ in range(2):  # the neighbours of some of them
                away = torch.where(torch.rand(shape, generator=generator) < 0.5, -1, 1) * torch.inf
                x = torch.where(near, torch.nextafter(x, away.to(dtype)), x)
            if share < 1:
                x.view(-1)[::9973] = torch.nan
            y = fake_quant(x, scale, quant_min=low, quant_max=high, ch_axis=axis)
            expected = formula(x, scale, None, low, high, axis)
            assert_same_bits(y, expected, f"{shape} {axis} {low} {high}")


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_gradient_at_the_ends_of_the_range(dtype: torch.dtype) -> None:
    """dx follows the rounded code: it passes half a step beyond the range, and stops there."""
    x = torch.tensor([-8.5, -8.625, -8.0, 7.0, 7.375, 7.5, 7.625, 0.0], dtype=dtype)
    x = (x * 0.25).requires_grad_()
    scale = torch.tensor(0.25, dtype=dtype, requires_grad=True)
    y = fake_quant(x, scale, quant_min=-8, quant_max=7)
    dx, ds = torch.autograd.grad(y, (x, scale), torch.ones_like(y))
    # -8.5 rounds to -8 and 7.5 to 8; outside, ds is the end of the range.
    assert dx.tolist() == [1, 0, 1, 1, 1, 0, 0, 1]
    assert ds.item() == (0.5 - 8 + 0 + 0 - 0.375 + 7 + 7 + 0)


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_extreme_values(dtype: torch.dtype) -> None:
    """Clamped in floating point before anything else: no wrap-around; NaN in, NaN out."""
    inf, nan = float("inf"), float("nan")
    x = torch.tensor(
        [inf, -inf, 3e38, -3e38, 1e10, -1e10, 1e-40, -1e-40, 0.0, -0.0, nan], dtype=dtype
    )
    x = x.repeat(5)
    for zero_point in (None, torch.tensor(-3.3, dtype=dtype)):
        for scale in (0.1, 1e-30, 1e30, 1e37, 1e-40):
            s = torch.tensor(scale, dtype=dtype)
            y = fake_quant(x, s, zero_point, quant_min=-8, quant_max=7)
            assert_same_bits(y, formula(x, s, zero_point, -8, 7, None), f"{scale} {zero_point}")
            assert y[10::11].isnan().all()
    x = x[:10].clone().requires_grad_()
    scale = torch.tensor(0.1, dtype=dtype, requires_grad=True)
    dx, ds = torch.autograd.grad(fake_quant(x, scale, quant_min=-8, quant_max=7).sum(), (x, scale))
    assert dx.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]
    # Summed times the scale on the CPU, so a rounding of each level may show.
    assert ds.item() == pytest.approx(3 * 7 - 3 * 8, rel=100 * torch.finfo(dtype).eps)


@pytest.mark.numeric
def test_nan_reaches_the_scale() -> None:
    """A NaN must not vanish from the gradient of the scale of its channel."""
    x = torch.randn(4, 50)
    x[2, 13] = float("nan")
    scale = torch.full((4,), 0.1, requires_grad=True)
    y = fake_quant(x, scale, quant_min=-8, quant_max=7, ch_axis=0)
    (ds,) = torch.autograd.grad(y.sum(), scale)
    assert ds.isnan().tolist() == [False, False, True, False]


@pytest.mark.numeric
@pytest.mark.parametrize("shape", [(3, 300), (300, 3)], ids=["rows", "tiles"])
def test_nan_zero_point_reaches_everything(shape: tuple[int, int]) -> None:
    """It leaves no range to clamp to, so it must not pass for one that is open."""
    axis = shape.index(3)
    x = torch.linspace(-9, 9, 900).reshape(shape).requires_grad_()
    scale = torch.full((3,), 0.1, requires_grad=True)
    zero = torch.tensor([0.0, float("nan"), 1.0], requires_grad=True)
    y = fake_quant(x, scale, zero, quant_min=-8, quant_max=7, ch_axis=axis)
    assert y.isnan().all(1 - axis).tolist() == [False, True, False]
    assert y.isnan().sum() == 300
    _, ds, _ = torch.autograd.grad(y.sum(), (x, scale, zero))
    assert ds.isnan().tolist() == [False, True, False]
    one = fake_quant(x, scale[:1], zero[1:2], quant_min=-8, quant_max=7)
    assert one.isnan().all()


@pytest.mark.numeric
def test_scales_of_every_sign_are_taken_as_they_are() -> None:
    """A scale of 0 gives 0 / 0 = NaN and infinite codes; a negative one mirrors; none is mended."""
    x = torch.tensor([-1.0, 0.0, 0.3, 2.0])
    for scale in (0.0, -0.25, float("nan"), float("inf")):
        s = torch.tensor(scale)
        y = fake_quant(x, s, quant_min=-8, quant_max=7)
        assert_same_bits(y, formula(x, s, None, -8, 7, None), f"{scale}")


@pytest.mark.numeric
def test_every_axis_and_inner_size() -> None:
    """Channel outermost, in the middle, innermost; inner sizes on either side of vector widths."""
    shapes = [(c, inner) for c in (1, 2, 33) for inner in (1, 3, 9, 15, 16, 17, 49, 1000)]
    shapes += [(2, 5, inner) for inner in (1, 3, 9, 16, 49)] + [(5000, 3), (3, 5000), (1500, 2, 3)]
    shapes += [(2, 3, 4, 5, 6), (1, 1, 7, 1, 1), (9,), (2, 64, 3, 3), (1, 2048)]
    for shape in shapes:
        for axis in (*range(len(shape)), -1):
            variant = Variant(f"axis{axis}", {"quant_min": -8, "quant_max": 7, "ch_axis": axis,
                                              "grad_scale": 0.1}, ("zero_point",))  # fmt: skip
            check(CASE, CASE.make(variant, shape), variant, what=f"{shape}")


@pytest.mark.numeric
def test_every_range() -> None:
    """2 to 8 bits, signed and unsigned, and other ranges."""
    ranges = [(-(2 ** (b - 1)), 2 ** (b - 1) - 1) for b in range(2, 9)]
    ranges += [(0, 2**b - 1) for b in range(2, 9)] + [
        (-127, 127),
        (-7, 7),
        (3, 9),
        (-9, -2),
        (0, 1),
    ]
    for low, high in ranges:
        for axis in (None, 1):
            for optional in ((), ("zero_point",), ("int_zero_point",)):
                for grad_scale in (None, "lsq", 2.5):
                    options = {"quant_min": low, "quant_max": high, "grad_scale": grad_scale}
                    variant = Variant(f"{low}..{high}", {**options, "ch_axis": axis}, optional)
                    check(CASE, CASE.make(variant, (6, 5, 7)), variant, what=f"{grad_scale}")


@pytest.mark.numeric
def test_lsq_grad_scale() -> None:
    """1 / sqrt(elements per scale * quant_max), each at least 1."""
    generator = torch.Generator().manual_seed(0)
    for shape, axis, high, expected in (
        ((6, 5), None, 7, (30 * 7) ** -0.5),
        ((6, 5), 0, 7, (5 * 7) ** -0.5),
        ((6, 5), 1, 1, (6 * 1) ** -0.5),
        ((3,), 0, 15, 15**-0.5),
        ((6, 5), None, 0, 30**-0.5),
        ((6, 5), None, -1, 30**-0.5),
    ):
        variant = Variant("", {"ch_axis": axis}, ("zero_point",))
        inputs = quant_inputs(variant, shape, torch.float64, generator, -8, high)
        leaves = [v.requires_grad_() for v in (inputs["scale"], inputs["zero_point"])]
        grads = []
        for grad_scale in (None, "lsq"):
            y = fake_quant(**inputs, quant_min=-8, quant_max=high, ch_axis=axis,
                           grad_scale=grad_scale)  # fmt: skip
            grads.append(torch.autograd.grad(y, leaves, torch.full_like(y, 0.7)))
        for plain, scaled in zip(*grads, strict=True):
            torch.testing.assert_close(scaled, plain * expected, rtol=1e-7, atol=1e-12)


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_shapes_of_the_scale(dtype: torch.dtype) -> None:
    """One value as [] or [1], C values as [C] or another shape; gradients come back alike."""
    x = torch.randn(3, 4, 5).to(dtype)
    for shape, axis in (((), None), ((1,), None), ((1, 1, 1), None), ((4,), 1), ((1, 4, 1), 1)):
        scale = torch.full(shape, 0.2, dtype=dtype, requires_grad=True)
        zero = torch.full(shape, 1.2, dtype=dtype, requires_grad=True)
        y = fake_quant(x, scale, zero, quant_min=-8, quant_max=7, ch_axis=axis)
        grads = torch.autograd.grad(y.sum(), (scale, zero))
        assert [g.shape for g in grads] == [scale.shape, zero.shape]
        assert all(g.dtype == dtype for g in grads)
    one = torch.tensor([0.2], dtype=dtype)
    assert fake_quant(torch.ones((), dtype=dtype), one, quant_min=-8, quant_max=7).shape == ()


@pytest.mark.numeric
def test_strided_scales() -> None:
    """A scale that is a column of a larger tensor, or one value expanded over the channels."""
    x, table = to_device((torch.randn(6, 9), torch.rand(6, 3) + 0.1))
    for scale in (table[:, 1], table[:1, 0].expand(6)):
        for zero in (None, scale * 10):
            leaf = scale.detach().requires_grad_()
            y = fake_quant(x, leaf, zero, quant_min=-8, quant_max=7, ch_axis=0)
            packed = scale.clone().requires_grad_()
            want = fake_quant(x, packed, zero, quant_min=-8, quant_max=7, ch_axis=0)
            assert_same_bits(y, want, "values")
            assert_same_bits(torch.autograd.grad(y.sum(), leaf)[0],
                             torch.autograd.grad(want.sum(), packed)[0], "gradient")  # fmt: skip


@pytest.mark.numeric
def test_float32_scale_beside_half_x() -> None:
    """The normal case of mixed precision: computed in float32, x and y in half, ds in float32."""
    for dtype in HALF:
        for axis in (None, 1):
            for optional in (("float_scale",), ("float_scale", "zero_point")):
                variant = Variant("", {"quant_min": -8, "quant_max": 7, "ch_axis": axis}, optional)
                inputs = CASE.make(variant, (33, 5, 7), dtype)
                y, grads = check(CASE, inputs, variant)
                assert y[0].dtype == grads["x"].dtype == dtype
                assert grads["scale"].dtype == torch.float32


@pytest.mark.numeric
def test_integer_zero_points() -> None:
    """int8, uint8, int32 and int64 are the same numbers, and get no gradient."""
    x = torch.randn(5, 20)
    scale = torch.rand(5) + 0.1
    for dtype in (torch.int8, torch.int32, torch.int64):
        zero = torch.tensor([-7, -3, 0, 2, 100], dtype=dtype)
        y = fake_quant(x, scale, zero, quant_min=-8, quant_max=7, ch_axis=0)
        want = fake_quant(x, scale, zero.float(), quant_min=-8, quant_max=7, ch_axis=0)
        assert_same_bits(y, want, str(dtype))
    byte = torch.tensor(130, dtype=torch.uint8)
    y = fake_quant(x, scale[0], byte, quant_min=0, quant_max=255)
    assert_same_bits(y, fake_quant(x, scale[0], byte.float(), quant_min=0, quant_max=255), "uint8")


@pytest.mark.numeric
def test_fractional_zero_points_are_rounded_half_to_even() -> None:
    x = torch.randn(40)
    scale = torch.tensor(0.2)
    for zero, rounded in ((0.5, 0.0), (1.5, 2.0), (-0.5, 0.0), (-1.5, -2.0), (2.4, 2.0)):
        y = fake_quant(x, scale, torch.tensor(zero), quant_min=-8, quant_max=7)
        want = fake_quant(x, scale, torch.tensor(rounded), quant_min=-8, quant_max=7)
        assert_same_bits(y, want, str(zero))


@pytest.mark.numeric
def test_layout_is_kept() -> None:
    """y has the memory layout of a dense x, whatever the axis, and so has dx, whatever dy has."""
    for shape in ((4, 5), (3, 4, 5), (2, 8, 7, 5), (2, 3, 4, 5, 6)):
        for layout in DENSE:
            for axis in (None, *range(len(shape))):
                variant = Variant("", {"quant_min": -8, "quant_max": 7, "ch_axis": axis},
                                  ("zero_point",))  # fmt: skip
                inputs = CASE.make(variant, shape, layout=layout)
                for other in (*DENSE, "sliced", "expanded"):
                    dy = lay_out(to_device(torch.rand(shape) - 0.3), other)
                    y, grads = check(CASE, inputs, variant, [dy], f"{shape} {layout}, dy {other}")
                    assert y[0].stride() == inputs["x"].stride()
                    assert grads["x"].stride() == inputs["x"].stride()


@pytest.mark.numeric
def test_large_tensor_in_every_layout() -> None:
    """More than one block of work for each thread, per tensor and per channel."""
    for layout in ("contiguous", "channels_last", "sliced"):
        for name in ("per_tensor", "per_channel_axis0_zero_point", "per_channel_last_zero_point"):
            variant = CASE.variant(name)
            inputs = CASE.make(variant, (24, 40, 20, 20), layout=layout)
            check(CASE, inputs, variant, what=layout)


def test_scale_without_gradient() -> None:
    """A frozen scale gets none and costs none; the zero point may still learn, and the reverse."""
    x = torch.randn(4, 30, requires_grad=True)
    scale, zero = torch.tensor(0.2), torch.tensor(1.3, requires_grad=True)
    y = fake_quant(x, scale, zero, quant_min=-8, quant_max=7)
    y.sum().backward()
    assert scale.grad is None and zero.grad is not None and x.grad is not None
    y = fake_quant(x.detach(), scale.requires_grad_(), zero.detach(), quant_min=-8, quant_max=7)
    y.sum().backward()
    assert scale.grad is not None


def test_module() -> None:
    """Scale and zero point are parameters; a state dict, a dtype and a copy carry them along."""
    module = FakeQuant(-8, 7, scale=torch.full((3,), 0.2), zero_point=torch.zeros(3), ch_axis=1)
    module = module.to(DEVICE)
    assert {name for name, _ in module.named_parameters()} == {"scale", "zero_point"}
    x = to_device(torch.randn(5, 3))
    y = module(x)
    want = fake_quant(x, module.scale, module.zero_point, quant_min=-8, quant_max=7, ch_axis=1)
    assert_same_bits(y, want, "module")
    other = FakeQuant(-8, 7, scale=torch.ones(3), zero_point=torch.ones(3), ch_axis=1).to(DEVICE)
    other.load_state_dict(module.state_dict())
    assert_same_bits(other(x), y, "state dict")
    assert module.double()(x.double()).dtype == torch.float64
    assert FakeQuant(0, 15).zero_point is None
    assert "quant_min=0, quant_max=15" in repr(FakeQuant(0, 15))
    start = torch.ones(2)
    FakeQuant(0, 15, scale=start, ch_axis=0).scale.data.mul_(3)
    assert start.tolist() == [1, 1], "the parameter owns its memory"


def test_the_scale_learns() -> None:
    """Gradient descent on the quantization error finds a better step than the first one."""
    torch.manual_seed(0)
    x = to_device(torch.randn(4096))
    module = FakeQuant(-8, 7, scale=1.0, grad_scale=None).to(DEVICE)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    errors = []
    for _ in range(80):
        optimizer.zero_grad()
        error = (module(x) - x).square().mean()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    # The best uniform 4-bit step for a normal distribution is 0.335, with an error of 0.0115 for 16
    # levels around 0; here there are 15 and one more below.
    assert errors[-1] < 0.014 < errors[0]
    assert module.scale.item() == pytest.approx(0.335, abs=0.05)


@pytest.mark.numeric
def test_gradients_add_up() -> None:
    """One scale shared by two calls collects both gradients."""
    x = torch.randn(2, 500)
    scale = torch.tensor(0.2, requires_grad=True)
    y = [fake_quant(part, scale, quant_min=-8, quant_max=7) for part in x]
    (both,) = torch.autograd.grad(y[0].sum() + y[1].sum(), scale)
    whole = fake_quant(x, scale, quant_min=-8, quant_max=7)
    (want,) = torch.autograd.grad(whole.sum(), scale)
    assert_close(both, want.double(), "sum", floor=x.norm().item() / 0.2)


@pytest.mark.numeric
def test_overlapping_x() -> None:
    """A sliding window, whose elements share memory: values and gradient are those of a copy."""
    base = to_device(torch.randn(40)).requires_grad_()
    window = base.unfold(0, 8, 4)
    scale = torch.tensor(0.2, device=DEVICE, requires_grad=True)
    variant = Variant("", {"quant_min": -8, "quant_max": 7})
    got = run(CASE.call, CASE, {"x": window, "scale": scale}, variant)
    want = run(CASE.call, CASE, {"x": window.clone(), "scale": scale}, variant)
    assert_same_bits(got[0][0], want[0][0], "y")
    assert_same_bits(got[1]["x"], want[1]["x"], "dx")


@pytest.mark.numeric
@pytest.mark.parametrize("bits", [4, 8, 16, 20, 24])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_precision_of_the_scale_gradient(dtype: torch.dtype, bits: int) -> None:
    """level - x / s of single elements against rational numbers, as good for large codes as small.

    It is at most one half, while x / s is as large as the code: a rounded quotient would leave its
    own error, 2^-24 of the code, in the difference.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    n, step = 300, torch.float32 if dtype in HALF else dtype
    generator = torch.Generator().manual_seed(bits)
    # The second of the sizes is one for which x / s is no product with 1 / s.
    for size, width in ((1e-3, 1), (1e-3, 256), *(((1e-36, 1),) if dtype.itemsize > 2 else ())):
        scale = ((torch.rand(n, generator=generator, dtype=torch.float64) + 0.1) * size).to(step)
        codes = torch.rand(n, generator=generator, dtype=torch.float64) * (high - low) + low
        x = (codes * scale.double()).to(dtype)
        leaf = scale.clone().requires_grad_()
        y = fake_quant(x[:, None].repeat(1, width), leaf, quant_min=low, quant_max=high, ch_axis=0)
        dy = torch.zeros_like(y)
        dy[:, 0] = 1
        (ds,) = torch.autograd.grad(y, leaf, dy)
        levels = torch.round(x.to(step) / scale).clamp(low, high)
        errors = []
        for values in zip(*(v.tolist() for v in (x, scale, levels, ds)), strict=True):
            value, s, level, got = map(Fraction, values)
            inside = low - Fraction(1, 2) <= value / s <= high + Fraction(1, 2)
            errors.append(float(abs(got - (level - value / s if inside else level))))
        # Roundings of the difference, of 1 / s and of their product, at a mean size of one quarter;
        # an end of the range, beside which few elements lie, is exact.
        unit = torch.finfo(step).eps / 2
        assert sum(errors) / n <= 0.25 * 2 * unit, f"mean {sum(errors) / n} of {size} {width}"
        assert max(errors) <= 0.5 * 3 * unit, f"{max(errors)} of {size} {width}"


@pytest.mark.numeric
def test_scale_gradient_of_one_code() -> None:
    """What a rounded quotient makes 7.629e-05; and a level whose product with s has no float."""
    for x, s, high, expected in ((1.0, 0.00392157, 255, 7.564e-05), (3.3e38, 1.9e38, 7, 0.26315)):
        scale = torch.tensor(s, requires_grad=True)
        fake_quant(torch.tensor([x]), scale, quant_min=0, quant_max=high).backward(torch.ones(1))
        assert scale.grad is not None
        assert scale.grad.item() == pytest.approx(expected, rel=2e-4)
