"""fake_quant(..., activation=...): equal to the pair of activation and fake_quant."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hqod_ops import FakeQuant
from hqod_ops.testing.device import fake_quant

PAIRS = {"relu": F.relu, "relu6": F.relu6}
LAYOUTS = {
    "tensor": ((3, 700), None),
    "rows": ((2, 3, 20, 20), 1),
    "tiles": ((5, 6, 3, 3), 1),
    "innermost": ((40, 33), 1),
}
CODES = {"unsigned": (0, 15), "signed": (-8, 7)}


def _input(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    x = 6 * torch.randn(shape, generator=generator, dtype=torch.float64)
    x.flatten()[:6] = torch.tensor([0.0, -0.0, 6.0, -1e-3, float("inf"), float("-inf")])
    return x.to(dtype)


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("learned_zero", [False, True], ids=["symmetric", "zero_point"])
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", PAIRS)
def test_equals_the_pair(
    activation: str, layout: str, codes: str, learned_zero: bool, dtype: torch.dtype
) -> None:
    shape, axis = LAYOUTS[layout]
    channels = 1 if axis is None else shape[axis]
    quant_min, quant_max = CODES[codes]
    x = _input(shape, dtype)
    param_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.linspace(0.3, 0.6, channels, dtype=param_dtype)
    zero = torch.linspace(-2.3, 3.2, channels, dtype=param_dtype) if learned_zero else None
    upstream = torch.cos(torch.arange(x.numel())).reshape(shape).to(dtype)

    def outcome(fused: bool) -> list[Tensor]:
        inputs = [t.clone().requires_grad_() for t in (x, scale, zero) if t is not None]
        held = inputs[0] if fused else PAIRS[activation](inputs[0])
        y = fake_quant(
            held,
            *inputs[1:],
            quant_min=quant_min,
            quant_max=quant_max,
            ch_axis=axis,
            grad_scale="lsq",
            activation=activation if fused else None,
        )
        return [y.detach(), *torch.autograd.grad(y, inputs, upstream)]

    for fused, pair in zip(outcome(True), outcome(False), strict=True):
        assert torch.equal(fused, pair)


def test_nan_reaches_value_and_gradients() -> None:
    x = torch.tensor([float("nan"), 1.0], requires_grad=True)
    scale = torch.tensor([0.5], requires_grad=True)
    y = fake_quant(x, scale, quant_min=0, quant_max=15, activation="relu")
    y.sum().backward()
    assert y[0].isnan() and scale.grad is not None and scale.grad.isnan().all()


def test_compiles_whole() -> None:
    x, scale = _input((4, 50), torch.float32).requires_grad_(), torch.tensor([0.4])

    def step(x: Tensor) -> Tensor:
        return fake_quant(x, scale, quant_min=0, quant_max=15, activation="relu6")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), step(x))
    (expected,) = torch.autograd.grad(step(x).sum(), x)
    (found,) = torch.autograd.grad(compiled(x).sum(), x)
    assert torch.equal(found, expected)


def test_the_module_has_it_too() -> None:
    module = FakeQuant(0, 15, scale=0.5, activation="relu")
    assert torch.equal(module(torch.tensor([-0.7, 0.7])), torch.tensor([0.0, 0.5]))
    assert "activation='relu'" in repr(module)


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(ValueError, match="Invalid activation 'gelu'"):
        fake_quant(torch.ones(2), torch.ones(1), quant_min=0, quant_max=3, activation="gelu")
