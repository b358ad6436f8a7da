"""DIoU, CIoU, EIoU and SIoU: torchvision's values, the papers' formulas, degenerate boxes."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import hqod_ops
from hqod_ops import reference
from hqod_ops.testing.cases import BOX_IOU_LOSSES, DTYPES
from hqod_ops.testing.device import on_device
from hqod_ops.testing.oracle import assert_same_bits
from python_tests.ops.boxes.test_generalized_box_iou import EDGES, hard_pairs, samples

F64 = torch.float64
NAMES = [name for name in BOX_IOU_LOSSES if name != "generalized_box_iou_loss"]
MOST = {"distance": 2, "complete": 3, "efficient": 4, "scylla": 3}
every = pytest.mark.parametrize("name", NAMES)
both = pytest.mark.parametrize("source", ["op", "reference"])

Loss = Callable[..., Tensor]


def loss_of(name: str, source: str = "op") -> Loss:
    loss: Loss = getattr(reference if source == "reference" else hqod_ops, name)
    return loss if source == "reference" else on_device(loss)


@both
@pytest.mark.numeric
@pytest.mark.require("torchvision")
@pytest.mark.parametrize(
    ("name", "eps"),
    [
        ("distance_box_iou_loss", 1e-7),
        ("distance_box_iou_loss", 0.1),
        ("complete_box_iou_loss", 1e-7),
    ],
)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_torchvision(source: str, name: str, eps: float, reduction: str) -> None:
    """Its values and gradients, called with its arguments in its order.

    torchvision's CIoU takes another eps in alpha alone.
    """
    import torchvision

    boxes = samples(2000)
    got = loss_of(name, source)(*boxes, reduction, eps)
    want = getattr(torchvision.ops, name)(*boxes, reduction, eps)
    # Both round in float64, in another order.
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    grads = [torch.autograd.grad(value.sum(), boxes) for value in (got, want)]
    for gradient, expected in zip(*grads, strict=True):
        assert (gradient - expected).norm() <= 1e-11 * expected.norm()


@pytest.mark.require("torchvision")
@pytest.mark.parametrize("name", NAMES)
def test_signature_of_torchvision(name: str) -> None:
    from torchvision.ops import distance_box_iou_loss as theirs

    ours = list(inspect.signature(getattr(hqod_ops, name)).parameters.values())
    wanted = list(inspect.signature(theirs).parameters.values())
    assert [(p.name, p.default) for p in ours[:4]] == [(p.name, p.default) for p in wanted]


@both
@pytest.mark.numeric
def test_by_hand(source: str) -> None:
    """A box of 2 x 4 beside one of 3 x 3, by the papers' formulas with their angles."""
    a = torch.tensor([[0.0, 0.0, 2.0, 4.0]], dtype=F64)
    b = torch.tensor([[1.0, 0.0, 4.0, 3.0]], dtype=F64)
    iou, dx, dy, hull = 3 / 14, -1.5, 0.5, 4.0
    diou = 1 - iou + (dx**2 + dy**2) / (2 * hull**2)
    v = 4 / math.pi**2 * (math.atan(3 / 3) - math.atan(2 / 4)) ** 2
    alpha = v / (1 - iou + v)
    sine = abs(dy) / math.hypot(dx, dy)
    angle = 1 - 2 * math.sin(math.asin(sine) - math.pi / 4) ** 2
    distance = sum(1 - math.exp(-(2 - angle) * (d / hull) ** 2) for d in (dx, dy))
    shape = (1 - math.exp(-1 / 3)) ** 4 + (1 - math.exp(-1 / 4)) ** 4
    wanted = {
        "distance_box_iou_loss": diou,
        "complete_box_iou_loss": diou + alpha * v,
        "efficient_box_iou_loss": diou + (1 / hull) ** 2 + (1 / hull) ** 2,
        "scylla_box_iou_loss": 1 - iou + (distance + shape) / 2,
    }
    for name, value in wanted.items():
        assert loss_of(name, source)(a, b, eps=0.0).item() == pytest.approx(value, rel=1e-13), name


@every
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_gradcheck(name: str, reduction: str) -> None:
    """CIoU's alpha is a constant, which finite differences do not know: it has torchvision's."""
    if name == "complete_box_iou_loss":
        pytest.skip("compared with torchvision's gradients")
    boxes = samples(9)
    weight = torch.rand(9, dtype=F64, requires_grad=True)
    for fixed in (None, weight.detach(), weight):

        def loss(a: Tensor, b: Tensor, w: Tensor | None = fixed) -> Tensor:
            return loss_of(name)(a, b, reduction, 0.2, weight=w)

        assert torch.autograd.gradcheck(loss, (*boxes, *([fixed] if fixed is weight else [])))


@every
@both
@pytest.mark.numeric
def test_symmetric(source: str, name: str) -> None:
    """Which box comes first makes no difference, to the last bit."""
    a, b = samples(500, torch.float32)
    loss = loss_of(name, source)
    assert_same_bits(loss(a, b).detach(), loss(b, a).detach(), "loss")
    swapped = torch.autograd.grad(loss(b, a).sum(), (a, b))
    for got, want in zip(torch.autograd.grad(loss(a, b).sum(), (a, b)), swapped, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)


@every
@both
@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_hard_boxes(source: str, name: str, dtype: torch.dtype) -> None:
    """Inverted, empty, tiny and huge boxes have a finite, bounded loss and finite gradients."""
    boxes = hard_pairs(dtype, EDGES[:-2], 20_000)
    value = loss_of(name, source)(*boxes)
    assert value.min() >= -1e-6 and value.max() <= MOST[name.partition("_")[0]] + 1e-6
    for gradient in torch.autograd.grad(value.sum(), boxes):
        assert gradient.isfinite().all()


@every
@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=lambda d: str(d)[6:])
def test_hard_gradients(name: str, dtype: torch.dtype) -> None:
    """Those of the reference in float64, in every place where they are not next to a rounding."""
    boxes = hard_pairs(dtype, (0.0, 1.0, 3.0, -2.0, 7.5), 20_000)
    wide = [x.detach().double().requires_grad_() for x in boxes]
    got = torch.autograd.grad(loss_of(name)(*boxes, eps=1e-3).sum(), boxes)
    want = torch.autograd.grad(loss_of(name, "reference")(*wide, eps=1e-3).sum(), wide)
    for gradient, expected in zip(got, want, strict=True):
        torch.testing.assert_close(
            gradient.double(), expected, rtol=1e-4, atol=1e-3 if dtype == torch.float32 else 1e-11
        )


@every
@both
@pytest.mark.numeric
def test_infinite_and_nan_are_never_hidden(source: str, name: str) -> None:
    boxes = [x.detach() for x in samples(40, torch.float32)]
    for bad_value, side, column in itertools.product(
        (float("nan"), float("inf"), float("-inf")), range(2), range(4)
    ):
        bad = [x.clone() for x in boxes]
        bad[side][17, column] = bad_value
        assert loss_of(name, source)(*bad).isnan().nonzero().tolist() == [[17]]


@every
@pytest.mark.numeric
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_equal_boxes(name: str, dtype: torch.dtype) -> None:
    boxes, _ = samples(300, dtype)
    twin = boxes.detach().clone().requires_grad_()
    value = loss_of(name)(boxes, twin)
    # eps = 1e-7 beside areas above 400 is lost to float32, not to float64.
    assert value.abs().max() <= (1e-9 if dtype == F64 else 0)
    for gradient in torch.autograd.grad(value.sum(), (boxes, twin)):
        assert gradient.abs().max() <= 1e-7


@pytest.mark.numeric
def test_an_empty_prediction_is_pulled_to_its_target() -> None:
    """Where torchvision's CIoU is NaN: a box without area, at the centre of its target."""
    point = torch.tensor([[5.0, 5.0, 5.0, 5.0]], requires_grad=True)
    value = loss_of("complete_box_iou_loss")(point, torch.tensor([[0.0, 0.0, 10.0, 10.0]]))
    (slope,) = torch.autograd.grad(value.sum(), point)
    assert value.item() == pytest.approx(1 + 0.25**2 / (1 + 0.25)) and slope.isfinite().all()
    for name in ("efficient_box_iou_loss", "scylla_box_iou_loss"):
        (slope,) = torch.autograd.grad(
            loss_of(name)(point, torch.tensor([[0.0, 0.0, 10.0, 10.0]])).sum(), point
        )
        assert (slope[0, :2] > 0).all() and (slope[0, 2:] < 0).all()  # it grows
