"""How results are judged: the reference in float64, and errors as norms, not element by element.

The reference runs on the CPU, and results of any device are judged there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hqod_ops.reference import lsq_grad_scale
from hqod_ops.testing.cases import HALF, Inputs, OpCase, Variant, differentiable, map_tensors

Grads = dict[str, Tensor]


@dataclass(frozen=True)
class Tolerance:
    """Bounds for a result of one dtype."""

    l2: float
    """Norm of the error over norm of the expected value."""
    bias: float
    """Mean of the error over mean absolute expected value: what a systematic error would show."""
    tiny: float
    """Smallest step of the dtype near 0; results below it cannot be told from 0."""


TOLERANCES = {
    # 1 - iou, exp(-C) - exp(-1) and (q - z - x/s) each lose a few bits, and a batch of one sample
    # may sit beside a zero of TCorr's derivative. A wrong formula is off by far more.
    torch.float64: Tolerance(1e-13, 1e-14, 1e-300),
    # A GPU evaluates the same formulas: fused multiply-adds and the order of sums differ, which is
    # less than what the cancellation above costs.
    torch.float32: Tolerance(2e-6, 1e-6, 1e-37),
    # Computed in float32; what is stored in half precision is rounded once, by at most half an ulp
    # (2**-8 and 2**-11 of the value), and roundings average out. A second rounding would show.
    torch.bfloat16: Tolerance(2.0**-8, 2.0**-11, 1e-37),
    torch.float16: Tolerance(2.0**-11, 2.0**-14, 2.0**-24),
}


def as_list(result: Any) -> list[Tensor]:
    """The outputs of an op."""
    return list(result) if isinstance(result, (list, tuple)) else [result]


def run(
    function: Callable[[Inputs, Variant], Any],
    case: OpCase,
    inputs: Inputs,
    variant: Variant,
    upstream: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], Grads]:
    """Outputs and gradients; the upstream gradient is :func:`upstream_for` unless given."""
    outputs = as_list(function(inputs, variant))
    if upstream is None:
        upstream = upstream_for(outputs)
    wanted = differentiable(case, inputs)
    grads = torch.autograd.grad(outputs, list(wanted.values()), list(upstream))
    return [y.detach() for y in outputs], dict(zip(wanted, grads, strict=True))


def upstream_for(outputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Random upstream gradients: an op may be followed by anything."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.rand(y.shape, generator=generator, dtype=torch.float64) * 3 - 1).to(
            y.device, y.dtype
        )
        for y in outputs
    ]


def oracle(
    case: OpCase, inputs: Inputs, variant: Variant, upstream: Sequence[Tensor]
) -> tuple[list[Tensor], Grads]:
    """The reference in float64 on the CPU, on the values that the op was given."""

    def widen(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x.cpu()
        return x.detach().cpu().double().requires_grad_(x.requires_grad)

    wide = map_tensors(widen, inputs)
    outputs = as_list(case.call_reference(wide, variant))
    leaves = differentiable(case, wide)
    grads = torch.autograd.grad(
        outputs, list(leaves.values()), [g.cpu().double() for g in upstream], allow_unused=False
    )
    return [y.detach() for y in outputs], dict(zip(leaves, grads, strict=True))


def assert_close(
    actual: Tensor, expected: Tensor, what: str, *, slack: float = 1.0, floor: float = 0.0
) -> None:
    """Relative L2 error, cosine and bias of a result against float64 values.

    Args:
        actual: the result, of any floating dtype, which chooses the tolerance.
        expected: what it should be, in float64.
        what: named in the message of a failure.
        slack: factor of the tolerance, with its reason in the caller.
        floor: the size of what was summed up, for sums whose terms cancel.
    """
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    tolerance = TOLERANCES[actual.dtype]
    got, want = actual.cpu().double(), expected.cpu().double()
    assert torch.equal(got.isfinite(), want.isfinite()), f"{what}: not finite where it should be"
    if got.numel() == 0:
        return
    error = (got - want).norm()
    size = max(want.norm().item(), floor)
    smallest = tolerance.tiny * got.numel() ** 0.5
    assert error <= slack * tolerance.l2 * size + smallest, (
        f"{what}: relative L2 error {error / size:.3g}, allowed {slack * tolerance.l2:.3g}"
    )
    if got.numel() >= 256 and size > 1e3 * smallest:
        cosine = torch.dot(got.reshape(-1), want.reshape(-1)) / (got.norm() * want.norm())
        assert 1 - cosine <= max((slack * tolerance.l2) ** 2, 1e-12), f"{what}: cosine {cosine}"
        bias = (got - want).mean().abs() / want.abs().mean()
        # A mean of n independent roundings shrinks with sqrt(n); a systematic error does not.
        allowed = slack * (tolerance.bias + 4 * tolerance.l2 / got.unique().numel() ** 0.5)
        assert bias <= allowed, f"{what}: bias {bias:.3g}, allowed {allowed:.3g}"


def assert_same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    """Equal values, dtype included; NaN equals NaN."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} is not {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    torch.testing.assert_close(
        actual.cpu(),
        expected.cpu(),
        rtol=0,
        atol=0,
        equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )


def check(
    case: OpCase,
    inputs: Inputs,
    variant: Variant,
    upstream: Sequence[Tensor] | None = None,
    what: str = "",
) -> tuple[list[Tensor], Grads]:
    """Values and gradients of one call against the oracle, and the dtypes of both."""
    what = f"{case.name}/{variant.name} {what}"
    first = next(v[0] if isinstance(v, list) else v for v in inputs.values())
    if upstream is None:
        with torch.no_grad():
            upstream = upstream_for(as_list(case.call(inputs, variant)))
    outputs, grads = run(case.call, case, inputs, variant, upstream)
    wanted, wanted_grads = oracle(case, inputs, variant, upstream)
    dtype = torch.float32 if case.is_loss and first.dtype in HALF else first.dtype
    for i, (y, want) in enumerate(zip(outputs, wanted, strict=True)):
        assert y.dtype == dtype, f"{what}: output {i} is {y.dtype}, expected {dtype}"
        assert_close(y, want, f"{what} output {i}")
    tensors = differentiable(case, inputs)
    floors = {} if case.is_loss else _sizes_of_sums(inputs, variant, upstream, wanted, wanted_grads)
    for name, want in wanted_grads.items():
        assert grads[name].dtype == tensors[name].dtype, f"{what}: gradient of {name}"
        floor = floors.get(name, 0.0)
        assert_close(grads[name], want, f"{what} gradient of {name}", floor=floor)
    return outputs, grads


def _sizes_of_sums(
    inputs: Inputs, variant: Variant, upstream: Sequence[Tensor], ys: Sequence[Tensor], grads: Grads
) -> dict[str, float]:
    """Norms of the terms that the gradients of scales and zero points sum up.

    The terms have both signs, so their sum can be far smaller than its rounding error allows a
    relative bound to be. A term is (y dy - x dx) / s for a scale, s (dx - dy) for a zero point.
    """
    sizes = {}
    for i, (y, dy) in enumerate(zip(ys, upstream, strict=True)):
        many = "xs" in inputs
        x, s = (inputs["xs"][i], inputs["scales"][i]) if many else (inputs["x"], inputs["scale"])
        x, s, dy = (v.detach().cpu().double() for v in (x, s, dy))
        axis = variant.kwargs.get("ch_axis")
        if axis is not None:
            shape = [1] * x.dim()
            shape[axis] = s.numel()
            s = s.reshape(shape)
        dx = grads[f"xs[{i}]" if many else "x"]
        factor = variant.kwargs.get("grad_scale") or 1.0
        if factor == "lsq":
            factor = lsq_grad_scale(x.numel(), s.numel(), variant.kwargs["quant_max"])
        terms = ((y * dy).abs() + (x * dx).abs()) / s
        sizes[f"scales[{i}]" if many else "scale"] = factor * terms.norm().item()
        sizes[f"zero_points[{i}]" if many else "zero_point"] = factor * (s * dy).norm().item()
    return sizes
