"""What is particular to fake_quant_foreach: it is a loop over fake_quant, in one call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hqod_ops
from hqod_ops.testing.cases import CASES, DTYPES, Variant, differentiable
from hqod_ops.testing.device import fake_quant, fake_quant_foreach
from hqod_ops.testing.oracle import assert_close, assert_same_bits, upstream_for

CASE = CASES["fake_quant_foreach"]
pytestmark = pytest.mark.numeric


def loop(inputs: dict[str, list[Tensor]], variant: Variant) -> list[Tensor]:
    options = dict(variant.kwargs)
    lows, highs = (
        [v] * len(inputs["xs"]) if isinstance(v, int) else v
        for v in (options.pop("quant_min"), options.pop("quant_max"))
    )
    zeros = inputs.get("zero_points", [None] * len(inputs["xs"]))
    return [
        hqod_ops.fake_quant(x, s, z, quant_min=low, quant_max=high, **options)
        for x, s, z, low, high in zip(
            inputs["xs"], inputs["scales"], zeros, lows, highs, strict=True
        )
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_equals_a_loop(dtype: torch.dtype) -> None:
    for variant in CASE.variants:
        for size in CASE.sizes:
            inputs = CASE.make(variant, size, dtype)
            ours, looped = CASE.call(inputs, variant), loop(inputs, variant)
            upstream = upstream_for(ours)
            leaves = differentiable(CASE, inputs)
            results = [torch.autograd.grad(y, list(leaves.values()), upstream)
                       for y in (ours, looped)]  # fmt: skip
            what = f"{variant.name} {size}"
            for y, want in zip(ours, looped, strict=True):
                assert_same_bits(y, want, what)
            for name, got, want in zip(leaves, *results, strict=True):
                if name.startswith("xs"):
                    assert_same_bits(got, want, f"{what} {name}")
                else:
                    # The same terms, maybe in another order: as large as 255 times a gradient of 2.
                    floor = (
                        100.0
                        * leaves[name.replace("scales", "xs").replace("zero_points", "xs")].numel()
                        ** 0.5
                    )
                    assert_close(got, want.double(), f"{what} {name}", floor=floor)


def test_no_tensor_at_all() -> None:
    assert fake_quant_foreach([], [], quant_min=-8, quant_max=7) == []
    assert fake_quant_foreach([], [], [], quant_min=[], quant_max=[]) == []


def test_one_tensor_and_many() -> None:
    for count in (1, 2, 200):
        xs = [torch.randn(3 + i % 5, requires_grad=True) for i in range(count)]
        scales = [torch.tensor(0.1 + i % 7 * 0.05, requires_grad=True) for i in range(count)]
        ys = fake_quant_foreach(xs, scales, quant_min=-8, quant_max=7, grad_scale="lsq")
        assert isinstance(ys, list) and len(ys) == count
        torch.autograd.backward([y.sum() for y in ys])
        for x, scale, y in zip(xs, scales, ys, strict=True):
            want = fake_quant(x, scale, quant_min=-8, quant_max=7, grad_scale="lsq")
            assert_same_bits(y, want, "y")
            dx, ds = torch.autograd.grad(want.sum(), (x, scale))
            assert x.grad is not None and scale.grad is not None
            assert_same_bits(x.grad, dx, "dx")
            torch.testing.assert_close(scale.grad, ds, rtol=1e-5, atol=1e-5)


def test_tuples_and_shared_scales() -> None:
    xs = (torch.randn(5), torch.randn(2, 3))
    scale = torch.tensor(0.2, requires_grad=True)
    ys = fake_quant_foreach(xs, (scale, scale), quant_min=(-8, 0), quant_max=(7, 15))
    (ds,) = torch.autograd.grad(sum(y.sum() for y in ys), scale)
    looped = [fake_quant(x, scale, quant_min=low, quant_max=high)
              for x, low, high in zip(xs, (-8, 0), (7, 15), strict=True)]  # fmt: skip
    (want,) = torch.autograd.grad(sum(y.sum() for y in looped), scale)
    torch.testing.assert_close(ds, want, rtol=1e-5, atol=1e-5)


def test_some_outputs_unused() -> None:
    """Only a part of the results reaches the loss: the others get zero gradients or none."""
    xs = [torch.randn(4, requires_grad=True) for _ in range(3)]
    scales = [torch.tensor(0.2, requires_grad=True) for _ in range(3)]
    ys = fake_quant_foreach(xs, scales, quant_min=-8, quant_max=7)
    ys[1].sum().backward()
    _, ds = torch.autograd.grad(
        fake_quant(xs[1], scales[1], quant_min=-8, quant_max=7).sum(), (xs[1], scales[1])
    )
    assert scales[1].grad is not None
    torch.testing.assert_close(scales[1].grad, ds, rtol=1e-5, atol=1e-6)
    for i in (0, 2):
        for leaf in (xs[i], scales[i]):
            assert leaf.grad is None or not leaf.grad.any()


def test_mixed_requires_grad() -> None:
    """Entry by entry: a frozen x, a frozen scale, nothing frozen, everything frozen."""
    xs = [torch.randn(6).requires_grad_(i in (1, 2)) for i in range(4)]
    scales = [torch.tensor(0.2).requires_grad_(i in (0, 2)) for i in range(4)]
    ys = fake_quant_foreach(xs, scales, quant_min=-8, quant_max=7)
    torch.autograd.backward([y.sum() for y in ys if y.requires_grad])
    for leaf in (*xs, *scales):
        assert (leaf.grad is not None) == leaf.requires_grad
