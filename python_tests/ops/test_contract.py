"""The numbers of every op in the registry, by dtype, size, layout and upstream gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hqod_ops.testing.cases import CASES, DTYPES, OpCase, differentiable, map_tensors
from hqod_ops.testing.oracle import (
    as_list,
    assert_close,
    assert_same_bits,
    check,
    run,
    upstream_for,
)

pytestmark = pytest.mark.numeric
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@every_dtype
@every_case
def test_values_and_gradients(case: OpCase, dtype: torch.dtype) -> None:
    """Every variant at the registry's sizes, against the reference in float64."""
    for variant in case.variants:
        for size in case.sizes:
            check(case, case.make(variant, size, dtype), variant, what=f"{size} {dtype}")


@every_dtype
@every_case
def test_layouts(case: OpCase, dtype: torch.dtype) -> None:
    """A layout changes no value; sums may run in another order."""
    for variant in case.variants:
        for size in case.sizes[-4:] if case.is_loss else case.sizes:
            for layout in case.layouts[1:]:
                what = f"{size} {dtype} {layout}"
                inputs = case.make(variant, size, dtype, layout)
                outputs, grads = check(case, inputs, variant, what=what)
                packed = map_tensors(_packed, inputs)
                packed_outputs, packed_grads = run(case.call, case, packed, variant)
                elementwise = not (case.is_loss and variant.kwargs.get("reduction") != "none")
                if not elementwise or layout == "expanded":
                    continue
                for y, expected in zip(outputs, packed_outputs, strict=True):
                    assert_same_bits(y, expected, f"{case.name}/{variant.name} {what}")
                for name, grad in grads.items():
                    if grad.numel() == packed_outputs[0].numel():
                        assert_same_bits(grad, packed_grads[name], f"{case.name} {what} d{name}")


def _packed(x: Tensor) -> Tensor:
    contiguous = x.detach().clone(memory_format=torch.contiguous_format)
    return contiguous.requires_grad_(x.requires_grad)


@every_case
def test_upstream_gradients(case: OpCase) -> None:
    """Scaled, expanded with stride 0, sliced, in another layout: an op is seldom the last one."""
    for variant in case.variants:
        size = case.sizes[-3] if not case.is_loss else (1025,)
        if case.name == "fake_quant":
            size = (4, 6, 7, 7)
        inputs = case.make(variant, size)
        with torch.no_grad():
            outputs = as_list(case.call(inputs, variant))
        random = upstream_for(outputs)
        check(case, inputs, variant, [-2.5 * g for g in random], "scaled")
        check(case, inputs, variant, [torch.zeros_like(g) for g in random], "zero")
        check(
            case, inputs, variant, [g.new_tensor(0.7).expand(g.shape) for g in random], "stride 0"
        )
        check(
            case,
            inputs,
            variant,
            [g[..., None].expand(*g.shape, 3)[..., 1] for g in random],
            "wide",
        )
        reverse = [g.permute(tuple(reversed(range(g.dim())))).contiguous() for g in random]
        reverse = [g.permute(tuple(reversed(range(g.dim())))) for g in reverse]
        check(case, inputs, variant, reverse, "permuted")
        row = [g[..., :1].expand(g.shape) if g.dim() else g for g in random]
        check(case, inputs, variant, row, "one row expanded")


@every_case
def test_some_inputs_frozen(case: OpCase) -> None:
    """Any subset of the inputs may require a gradient, and gets what it gets among all."""
    for variant in case.variants:
        size = case.sizes[-3] if not case.is_loss else (129,)
        inputs = case.make(variant, size)
        _, grads = run(case.call, case, inputs, variant)
        names = [name for name, value in inputs.items() if name in case.differentiable]
        for kept in range(1, 2 ** len(names) - 1):
            chosen = {name for i, name in enumerate(names) if kept >> i & 1}
            some = {
                name: [
                    v.detach().requires_grad_(name in chosen and v.is_floating_point())
                    for v in (value if isinstance(value, list) else [value])
                ]
                for name, value in inputs.items()
            }
            some = {n: v if isinstance(inputs[n], list) else v[0] for n, v in some.items()}
            if not differentiable(case, some):
                continue
            _, partial = run(case.call, case, some, variant)
            for name, grad in partial.items():
                what = f"{case.name}/{variant.name} d{name} with {sorted(chosen)}"
                assert_close(grad, grads[name].double(), what)


@every_case
def test_no_gradient_at_all(case: OpCase) -> None:
    """Without a gradient to compute, under no_grad and inference_mode, the values are the same."""
    for variant in case.variants:
        inputs = case.make(variant, case.sizes[-3])
        expected = [y.detach() for y in as_list(case.call(inputs, variant))]
        frozen = as_list(case.call(map_tensors(Tensor.detach, inputs), variant))
        with torch.no_grad():
            no_grad = as_list(case.call(inputs, variant))
        with torch.inference_mode():
            inference = as_list(case.call(inputs, variant))
        for outputs in (frozen, no_grad, inference):
            for y, want in zip(outputs, expected, strict=True):
                assert not y.requires_grad
                if "weight" in variant.optional:  # a learned one is multiplied outside of the op
                    assert_close(y, want.double(), f"{case.name}/{variant.name}")
                else:
                    assert_same_bits(y, want, f"{case.name}/{variant.name}")
        assert all(y.is_inference() for y in inference)


@every_case
def test_empty(case: OpCase) -> None:
    """No element: 0 or an empty tensor, zero gradients to everything, and a connected graph."""
    for dtype in DTYPES:
        for variant in case.variants:
            for size in _empty_sizes(case):
                inputs = case.make(variant, size, dtype)
                outputs, grads = run(case.call, case, inputs, variant)
                what = f"{case.name}/{variant.name} {size} {dtype}"
                assert all((y == 0).all() for y in outputs), what
                assert {name: g.shape for name, g in grads.items()} == {
                    name: x.shape for name, x in differentiable(case, inputs).items()
                }, what
                assert all((g == 0).all() for g in grads.values()), f"{what}: {grads}"


def _empty_sizes(case: OpCase) -> tuple[tuple[object, ...], ...]:
    if case.is_loss:
        return ((0,),)
    if case.name == "fake_quant":
        return ((0,), (0, 3), (3, 0, 2), (2, 3, 0))
    sizes = (((0, 2), (3, 0), (0, 3)), ((0,), (0,), (0,)))
    return sizes


@every_case
def test_backward_twice(case: OpCase) -> None:
    """With retain_graph the second backward gives the same bits, whatever became of the first."""
    for variant in case.variants:
        size = case.sizes[-3] if not case.is_loss else (1025,)
        inputs = case.make(variant, size)
        outputs = as_list(case.call(inputs, variant))
        wanted, upstream = list(differentiable(case, inputs).values()), upstream_for(outputs)
        first = torch.autograd.grad(outputs, wanted, upstream, retain_graph=True)
        kept = [g.clone() for g in first]
        for g in first:
            g.zero_()  # as an optimizer or a hook may do
        second = torch.autograd.grad(outputs, wanted, upstream)
        for a, b in zip(kept, second, strict=True):
            assert_same_bits(a, b, f"{case.name}/{variant.name}")


@every_case
def test_inputs_are_left_alone(case: OpCase) -> None:
    for variant in case.variants:
        inputs = case.make(variant, case.sizes[-3])
        before = map_tensors(lambda x: x.detach().clone(), inputs)
        outputs = as_list(case.call(inputs, variant))
        upstream = upstream_for(outputs)
        kept = [g.clone() for g in upstream]
        run(case.call, case, inputs, variant, upstream)
        for name, value in inputs.items():
            values = value if isinstance(value, list) else [value]
            originals = before[name] if isinstance(value, list) else [before[name]]
            for x, original in zip(values, originals, strict=True):
                assert_same_bits(x.detach(), original, f"{case.name}/{variant.name} {name}")
        for g, original in zip(upstream, kept, strict=True):
            assert_same_bits(g, original, f"{case.name}/{variant.name} upstream gradient")
