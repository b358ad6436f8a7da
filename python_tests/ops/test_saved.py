"""What a fake-quant node makes again is what it has made: bits, dtype and layout."""

from __future__ import annotations

import pytest
import torch

from hqod_ops.testing.cases import CASES, DTYPES
from hqod_ops.testing.oracle import as_list, assert_same_bits, upstream_for

pytestmark = [pytest.mark.numeric, pytest.mark.require("ext")]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", ["fake_quant", "fake_quant_foreach"])
def test_make_again(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    for variant in case.variants:
        for layout in case.layouts:
            for size in case.sizes[-8:]:
                inputs = case.make(variant, size, dtype, layout)
                ys = as_list(case.call(inputs, variant))
                for y in ys:
                    node = y.grad_fn
                    again = node._forward_cls.make_again(node, y.output_nr)
                    what = f"{name}/{variant.name} {size} {dtype} {layout}"
                    assert not again.requires_grad and again.stride() == y.stride(), what
                    assert_same_bits(again, y.detach(), what)
                torch.autograd.backward(ys, upstream_for(ys))
