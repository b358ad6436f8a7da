"""A box with an infinite coordinate had a loss that was finite and a gradient that was NaN, so that
a training loop which skips steps of such losses did not skip it.

Report: https://github.com/Peterande/D-FINE/issues/199 (an overflow of half precision upstream).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hqod_ops
from hqod_ops import reference

VALUES = [0.0, 5.0, math.inf, -math.inf, math.nan]
ODD = torch.tensor(list(itertools.product(VALUES, repeat=4)))
PLAIN = torch.tensor([1.0, 1.0, 4.0, 4.0]).expand_as(ODD)
MIXED = ODD[torch.randperm(len(ODD), generator=torch.Generator().manual_seed(0))]
PAIRS = {"first": (ODD, PLAIN), "second": (PLAIN, ODD), "both": (ODD, MIXED), "equal": (ODD, ODD)}

OPS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "iou": lambda ops, a, b: ops.aligned_box_iou(a, b),
    "hiou": lambda ops, a, b: ops.harmonious_iou_loss(a, b, reduction="none"),
    "giou": lambda ops, a, b: ops.generalized_box_iou_loss(a, b, reduction="none"),
    "hqod": lambda ops, a, b: ops.hqod_loss(
        a, b, torch.zeros(len(a), dtype=a.dtype), logits=True, reduction="none"
    ),
}


@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_finite_loss_has_a_finite_gradient(op: str, pair: str, dtype: torch.dtype) -> None:
    finite = {}
    for ops in (hqod_ops, reference):
        first, second = (boxes.clone().to(dtype) for boxes in PAIRS[pair])
        first.requires_grad_()
        second.requires_grad_(op in ("iou", "giou"))
        loss = OPS[op](ops, first, second)
        loss.sum().backward()
        grads = [t.grad for t in (first, second) if t.grad is not None]
        good = torch.stack([grad.isfinite().all(-1) for grad in grads]).all(0)
        assert not (loss.isfinite() & ~good).any()
        finite[ops] = loss.isfinite()
    assert torch.equal(finite[hqod_ops], finite[reference])
    assert not finite[hqod_ops].all() and finite[hqod_ops].any()


def test_large_and_inverted_boxes_stay_finite() -> None:
    target = torch.tensor([0.0, 0.0, 4.0, 4.0])
    boxes = torch.tensor(
        [[0, 0, 3e38, 5], [0, 0, 3e38, 3e38], [math.inf, 0, 5, 5], [0, 0, -math.inf, 5]]
    ).requires_grad_()
    iou = hqod_ops.aligned_box_iou(boxes, target.expand_as(boxes))
    iou.sum().backward()
    assert iou.tolist() == pytest.approx([0, 0, 0, 0], abs=1e-30)
    assert boxes.grad is not None and boxes.grad.isfinite().all()


def test_the_mean_over_boxes_is_not_finite() -> None:
    boxes = torch.tensor([[0, 0, 4, 4], [0, 0, math.inf, 5.0]], requires_grad=True)
    target = torch.tensor([[0.0, 0, 4, 4]] * 2)
    for ops in (hqod_ops, reference):
        assert ops.hqod_loss(boxes, target, torch.zeros(2), logits=True, reduction="mean").isnan()
        assert ops.harmonious_iou_loss(boxes, target, reduction="mean").isnan()
