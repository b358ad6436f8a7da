"""PyTorch's own tests of fake quantization, with our op in the place of theirs.

They want a checkout of PyTorch, ``HQOD_PYTORCH=/path/to/pytorch``, of a version near the installed
one, the package expecttest, and for torch 2.11 a NumPy before 2.3, as its own test helpers do.
"""

from __future__ import annotations

import unittest
from typing import Any

import pytest
import torch
from torch import Tensor

from hqod_ops import fake_quant
from python_tests.external.suites import suite

CHOSEN = ("learnable", "cachemask")
_SUITE = suite("HQOD_PYTORCH", "test/quantization/core/test_workflow_ops.py")


def _ours(x: Tensor, scale: Any, zero_point: Any, low: int, high: int, **options: Any) -> Tensor:
    """What a number may be in PyTorch's op is a tensor of one element in ours."""
    # Ours takes a scale in the dtype of x, or float32 with a half x.
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale, zero_point = (torch.as_tensor(value, device=x.device) for value in (scale, zero_point))
    if zero_point.is_floating_point():
        zero_point = zero_point.to(dtype)
    return fake_quant(
        x,
        scale.to(dtype).reshape(-1),
        zero_point.reshape(-1),
        quant_min=low,
        quant_max=high,
        **options,
    )


def _learnable(x: Tensor, s: Tensor, z: Tensor, *rest: Any) -> Tensor:
    """PyTorch's learnable ops take a zero point into the range of the codes; ours leaves it."""
    *axis, low, high, factor = rest
    inside = z + (z.clamp(low, high) - z).detach()
    return _ours(x, s, inside, low, high, ch_axis=axis[0] if axis else None, grad_scale=factor)


@pytest.fixture
def swapped(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Our op under the names of PyTorch's; the calls are noted."""
    called: list[str] = []

    def replace(name: str, function: Any) -> None:
        def call(*args: Any, **options: Any) -> Tensor:
            called.append(name)
            return function(*args, **options)

        monkeypatch.setattr(torch, name, call)

    replace("fake_quantize_per_tensor_affine", _ours)
    replace(
        "fake_quantize_per_channel_affine",
        lambda x, s, z, axis, low, high: _ours(x, s, z, low, high, ch_axis=axis),
    )
    replace("_fake_quantize_learnable_per_tensor_affine", _learnable)
    replace("_fake_quantize_learnable_per_channel_affine", _learnable)
    return called


def _names() -> list[str]:
    case = _SUITE.TestFakeQuantizeOps
    return [
        name
        for name in unittest.defaultTestLoader.getTestCaseNames(case)
        if any(word in name for word in CHOSEN)
    ]


@pytest.mark.parametrize("name", _names())
def test_pytorch(name: str, swapped: list[str]) -> None:
    result = unittest.TestResult()
    _SUITE.TestFakeQuantizeOps(name).run(result)
    problems = [text for _, text in (*result.errors, *result.failures)]
    assert not problems, "\n".join(problems)
    if result.skipped:
        pytest.skip(result.skipped[0][1])
    assert swapped, "the test asked for no op of ours"
