"""torchvision's box losses: ours keep to the same contract, and their IoU is the same.

With a checkout, ``HQOD_TORCHVISION=/path/to/vision``, its own checks of empty inputs and of GIoU's
values run on ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hqod_ops import aligned_box_iou, generalized_box_iou_loss, harmonious_iou_loss
from hqod_ops.testing.cases import make_boxes
from python_tests.external.suites import suite

ops: Any = pytest.importorskip("torchvision.ops")

LOSSES: dict[str, Callable[..., Tensor]] = {
    "ours": harmonious_iou_loss,
    "generalized": ops.generalized_box_iou_loss,
    "distance": ops.distance_box_iou_loss,
    "complete": ops.complete_box_iou_loss,
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def boxes(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    first, second = make_boxes(count, torch.Generator().manual_seed(0))
    return first.to(dtype).requires_grad_(), second.to(dtype)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_reductions(loss: Callable[..., Tensor]) -> None:
    pred, target = boxes(33)
    each = loss(pred, target, reduction="none")
    assert each.shape == (33,) and (each >= 0).all()
    torch.testing.assert_close(loss(pred, target, reduction="sum"), each.sum())
    torch.testing.assert_close(loss(pred, target, reduction="mean"), each.mean())
    torch.testing.assert_close(loss(pred, target), each)  # "none" is the default
    with pytest.raises(ValueError, match="reduction"):
        loss(pred, target, reduction="xyz")


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_boxes_cost_nothing(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    pred, _ = boxes(8, dtype)
    # The eps in the others' unions is of the size of float16's rounding.
    torch.testing.assert_close(loss(pred, pred.detach()).float(), torch.zeros(8), rtol=0, atol=1e-3)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_boxes(loss: Callable[..., Tensor], reduction: str) -> None:
    pred = torch.zeros(0, 4, requires_grad=True)
    value = loss(pred, torch.zeros(0, 4), reduction=reduction)
    value.backward()
    assert value.item() == 0 and pred.grad is not None and pred.grad.shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_iou(dtype: torch.dtype) -> None:
    first, second = boxes(500, dtype)
    expected = ops.box_iou(first, second).diagonal()
    torch.testing.assert_close(aligned_box_iou(first, second), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_torchvision_s_check_of_empty_inputs(dtype: torch.dtype) -> None:
    module = suite("HQOD_TORCHVISION", "test/test_ops.py")
    for loss in (harmonious_iou_loss, generalized_box_iou_loss):
        module.assert_empty_loss(loss, dtype, "cpu")


def test_torchvision_s_values_of_giou(monkeypatch: pytest.MonkeyPatch) -> None:
    module = suite("HQOD_TORCHVISION", "test/test_ops.py")
    # Half inputs are left out: ours returns float32 for them, which the test does not expect.
    monkeypatch.setattr(module.ops, "generalized_box_iou_loss", generalized_box_iou_loss)
    module.TestGeneralizedBoxIouLoss().test_giou_loss(torch.float32, "cpu")
