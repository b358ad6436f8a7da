"""torch.library.opcheck over generated inputs: shapes, strides, dtypes and options of every op."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis")

import hypothesis
from hypothesis import strategies as st

from hqod_ops.testing.cases import OpCase
from python_tests.ops.test_compile import every_case, native_calls, with_gradients

pytestmark = pytest.mark.require("ext")


@every_case
@hypothesis.settings(
    max_examples=6, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(data=st.data())
def test_generated(case: OpCase, data: Any) -> None:
    torch._dynamo.reset()
    variant = data.draw(st.sampled_from(case.variants), "variant")
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), "dtype")
    side = st.integers(0, 9)
    if case.is_loss:
        size: Any = (data.draw(st.integers(0, 40), "size"),)
    elif case.name == "fake_quant":
        size = tuple(data.draw(st.lists(side, min_size=3, max_size=4), "size"))
    else:
        size = tuple(
            tuple(shape)
            for shape in data.draw(
                st.lists(st.lists(side, min_size=2, max_size=3), min_size=3, max_size=3), "size"
            )
        )
    for func, args in native_calls(case, variant, size, dtype=dtype):
        torch.library.opcheck(func, with_gradients(func, args))
