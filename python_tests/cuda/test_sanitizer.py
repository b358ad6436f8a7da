"""Every kernel on small inputs: the list that compute-sanitizer runs (``-m sanitizer``).

Under memcheck every tensor is an allocation of its own (``PYTORCH_NO_CUDA_MEMORY_CACHING=1``), so
that an access beyond one is seen. Here the numbers are compared too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hqod_ops.testing.cases import CASES, OpCase
from hqod_ops.testing.oracle import check

pytestmark = [pytest.mark.require("ext", "cuda"), pytest.mark.sanitizer]

SIZES: dict[str, tuple[Any, ...]] = {
    # On both sides of a vector and of a block; more than one block; several rounds of a grid's sum.
    "fake_quant": ((1,), (17,), (2051,), (7, 3, 9), (33, 17), (4, 6, 7, 7), (3, 70, 5)),
    "fake_quant_foreach": (((1,), (4, 3, 3, 3), (2051,)), ((33, 17), (0, 2), (5, 4))),
}
LOSS_SIZES = ((1,), (31,), (257,), (4099,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_small_inputs(case: OpCase, dtype: torch.dtype) -> None:
    """All variants, dense and misaligned; float64 and channels_last for the default one."""
    sizes = SIZES.get(case.name, LOSS_SIZES)
    for variant in case.variants:
        for size in sizes:
            for layout in ("contiguous", "offset"):
                inputs = case.make(variant, size, dtype, layout, device="cuda")
                check(case, inputs, variant, what=f"{size} {dtype} {layout}")
    if dtype == torch.float32:
        for size in sizes:
            variant = case.variants[0]
            layout = "permuted" if case.is_loss else "channels_last"
            check(case, case.make(variant, size, torch.float64, layout, device="cuda"), variant)


def test_many_tensors() -> None:
    """More of them than a launch may take in one table."""
    case = CASES["fake_quant_foreach"]
    variant = case.variant("per_channel_axis0_zero_point")
    size = tuple((3 + i % 7, 5 + i) for i in range(300))
    check(case, case.make(variant, size, device="cuda"), variant)
