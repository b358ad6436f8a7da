"""What is particular to the generalized IoU loss: torchvision's values, far and empty boxes."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import hqod_ops
from hqod_ops import GeneralizedBoxIoULoss, reference
from hqod_ops.testing.cases import DTYPES, make_boxes, uniform
from hqod_ops.testing.device import on_device
from hqod_ops.testing.oracle import assert_same_bits

F64 = torch.float64
generalized_box_iou_loss = on_device(hqod_ops.generalized_box_iou_loss)
both = pytest.mark.parametrize(
    "loss", [generalized_box_iou_loss, reference.generalized_box_iou_loss], ids=["op", "reference"]
)


def samples(n: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    """Boxes that overlap, and in the second half boxes that lie apart, by up to an image."""
    boxes1, boxes2 = make_boxes(n, torch.Generator().manual_seed(5))
    boxes2[n // 2 :] = boxes2[n // 2 :].roll(1, 0)
    return boxes1.to(dtype).requires_grad_(), boxes2.to(dtype).requires_grad_()


@both
@pytest.mark.numeric
@pytest.mark.require("torchvision")
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("eps", [1e-7, 0.1])
def test_torchvision(loss: Callable[..., Tensor], reduction: str, eps: float) -> None:
    """Its values and gradients, called with its arguments in its order."""
    from torchvision.ops import generalized_box_iou_loss as theirs

    boxes = samples(2000)
    got, want = loss(*boxes, reduction, eps), theirs(*boxes, reduction, eps)
    # Both round in float64, in another order; a sum of 2000 losses of 1 adds its own roundings.
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)
    grads = [torch.autograd.grad(value.sum(), boxes) for value in (got, want)]
    for gradient, expected in zip(*grads, strict=True):
        assert (gradient - expected).norm() <= 1e-13 * expected.norm()


@pytest.mark.require("torchvision")
def test_signature_of_torchvision() -> None:
    from torchvision.ops import generalized_box_iou_loss as theirs

    ours = list(inspect.signature(hqod_ops.generalized_box_iou_loss).parameters.values())
    wanted = list(inspect.signature(theirs).parameters.values())
    assert [(p.name, p.default) for p in ours[:4]] == [(p.name, p.default) for p in wanted]


@both
@pytest.mark.numeric
def test_by_hand(loss: Callable[..., Tensor]) -> None:
    """Two squares of side 2, apart by 2, over each other by half, and the same."""
    square = torch.tensor([[0.0, 0.0, 2.0, 2.0]], dtype=F64)
    move = torch.tensor([[4.0, 0.0], [1.0, 0.0], [0.0, 0.0]], dtype=F64).repeat(1, 2)
    boxes1 = square.repeat(3, 1).requires_grad_()
    value = loss(boxes1, square + move, eps=0.0)
    # I, U, C are 0, 8, 12; 2, 6, 6; 4, 4, 4.
    assert value.tolist() == pytest.approx([1 + 4 / 12, 1 - 2 / 6, 0])
    (slope,) = torch.autograd.grad(value.sum(), boxes1)
    # Apart: L = 2 - U / C, so dL = (U dC - C dU) / C^2. x1: dU = -2, dC = -2; x2: dU = 2, dC = 0;
    # y1, where C's edge ties: dU = -2, dC = -6 / 2.
    assert slope[0].tolist() == pytest.approx([(-16 + 24) / 144, 0, -24 / 144, 0])
    assert not slope[2].any()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_gradcheck(reduction: str) -> None:
    boxes = samples(9)
    weight = torch.rand(9, dtype=F64, requires_grad=True)
    for fixed in (None, weight.detach(), weight):

        def loss(a: Tensor, b: Tensor, w: Tensor | None = fixed) -> Tensor:
            return generalized_box_iou_loss(a, b, reduction, 0.2, weight=w)

        assert torch.autograd.gradcheck(loss, (*boxes, *([fixed] if fixed is weight else [])))


@both
@pytest.mark.numeric
def test_symmetric(loss: Callable[..., Tensor]) -> None:
    """Which box comes first makes no difference, to the last bit."""
    a, b = samples(500, torch.float32)
    assert_same_bits(loss(a, b).detach(), loss(b, a).detach(), "loss")
    swapped = torch.autograd.grad(loss(b, a).sum(), (a, b))
    for got, want in zip(torch.autograd.grad(loss(a, b).sum(), (a, b)), swapped, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


EDGES = (0.0, 1.0, 3.0, 1e-30, 3e18, 1e20, -1e20, float("inf"), float("-inf"))


def hard_pairs(dtype: torch.dtype, edges: tuple[float, ...], n: int) -> tuple[Tensor, Tensor]:
    """Pairs among all boxes whose coordinates are edges: empty, inverted, huge, equal, touching."""
    every = torch.tensor(list(itertools.product(edges, repeat=4)), dtype=dtype)
    chosen = torch.randint(len(every), (2, n), generator=torch.Generator().manual_seed(0))
    chosen[1, ::10] = chosen[0, ::10]
    return every[chosen[0]].requires_grad_(), every[chosen[1]].requires_grad_()


@both
@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_hard_boxes(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """Inverted, empty, tiny and huge boxes have a finite loss in [0, 2] and finite gradients."""
    boxes = hard_pairs(dtype, EDGES[:-2], 20_000)
    value = loss(*boxes)
    assert value.min() >= -1e-6 and value.max() <= 2 + 1e-6
    for gradient in torch.autograd.grad(value.sum(), boxes):
        assert gradient.isfinite().all()


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_infinite_coordinates(dtype: torch.dtype) -> None:
    """A loss that is finite has finite gradients; one that is not is NaN, and shows."""
    boxes = hard_pairs(dtype, EDGES, 20_000)
    value = generalized_box_iou_loss(*boxes)
    finite = value.isfinite()
    assert finite.any() and value[~finite].isnan().all()
    for gradient in torch.autograd.grad(value.sum(), boxes):
        assert gradient[finite].isfinite().all()


@both
@pytest.mark.numeric
def test_empty_and_inverted_boxes(loss: Callable[..., Tensor]) -> None:
    """An inverted box has area 0, an empty one still stretches what is around both."""
    unit = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(4, 1)
    boxes = torch.tensor(
        [[0, 0, 0, 0], [3, 0, 3, 1], [0.8, 0.2, 0.2, 0.8], [2, 0, 1, 1]], requires_grad=True
    )
    # U = 1, and C = 1, 3, 1 and 1: the last one begins beyond its end.
    value = loss(boxes, unit)
    torch.testing.assert_close(value.detach(), torch.tensor([1, 1 + 2 / 3, 1, 1.0]))
    (slope,) = torch.autograd.grad(value.sum(), boxes)
    # L = 2 - U / C. The second one grows to both sides, more to the near one: x1 has dU = -1 and
    # dC = 0, x2 has 1 and 1.
    assert slope[1, ::2].tolist() == pytest.approx([1 / 3, -2 / 9])
    assert slope.isfinite().all()
    nothing = torch.zeros(1, 4)
    assert loss(nothing, nothing).item() == 1


@pytest.mark.numeric
def test_touching_boxes_have_the_gradient_of_their_overlap() -> None:
    """As in aligned_box_iou: the right edge gains overlap. torchvision's misses that term."""
    left = torch.tensor([[0.0, 0.0, 2.0, 2.0]], requires_grad=True)
    right = torch.tensor([[2.0, 0.0, 4.0, 2.0]])
    (slope,) = torch.autograd.grad(generalized_box_iou_loss(left, right).sum(), left)
    # L = 2 - I / U - U / C at I = 0, U = C = 8, with dI = 2 and dU = 2 - 2 for x2.
    assert slope[0, 2].item() == pytest.approx(-2 / 8)


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_equal_boxes(dtype: torch.dtype) -> None:
    boxes, _ = samples(300, dtype)
    twin = boxes.detach().clone().requires_grad_()
    value = generalized_box_iou_loss(boxes, twin)
    # eps = 1e-7 beside areas above 400 is lost to float32, not to float64.
    assert value.abs().max() <= (1e-9 if dtype == F64 else 0)
    for gradient in torch.autograd.grad(value.sum(), (boxes, twin)):
        assert gradient.abs().max() <= 1e-7


@both
@pytest.mark.numeric
def test_nan_is_never_hidden(loss: Callable[..., Tensor]) -> None:
    boxes = [x.detach() for x in samples(40, torch.float32)]
    for side, column in itertools.product(range(2), range(4)):
        bad = [x.clone() for x in boxes]
        bad[side][17, column] = float("nan")
        assert loss(*bad).isnan().nonzero().tolist() == [[17]]


@pytest.mark.numeric
def test_weight() -> None:
    """It multiplies the loss, in float32 beside half boxes, and silences a sample with 0."""
    for dtype in (torch.float32, torch.bfloat16):
        boxes = samples(33, dtype)
        weight = uniform((33,), 0.1, 2, torch.Generator().manual_seed(1)).float()
        weight[::3] = 0
        value = generalized_box_iou_loss(*boxes, weight=weight)
        plain = generalized_box_iou_loss(*boxes)
        torch.testing.assert_close(value, plain * weight, rtol=1e-6, atol=0)
        for gradient in torch.autograd.grad(value.sum(), boxes):
            assert not gradient[::3].any() and gradient[1::3].any()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda b: generalized_box_iou_loss(b, b[:2]), ValueError, ("boxes1", "boxes2", "(2, 4)")),
        (lambda b: generalized_box_iou_loss(b[:, :3], b[:, :3]), ValueError, ("boxes1", "4]")),
        (lambda b: generalized_box_iou_loss(b, b.double()), TypeError, ("boxes2", "float64")),
        (lambda b: generalized_box_iou_loss(b.long(), b.long()), TypeError, ("boxes1", "int64")),
        (lambda b: generalized_box_iou_loss(b, b, "avg"), ValueError, ("reduction", "'avg'")),
        (lambda b: generalized_box_iou_loss(b, b, eps="x"), TypeError, ("eps", "'x'")),
        (lambda b: generalized_box_iou_loss(b, b, weight=b), ValueError, ("weight", "(3,)")),
        (lambda b: GeneralizedBoxIoULoss(eps=None), TypeError, ("eps", "None")),
        (lambda b: GeneralizedBoxIoULoss(reduction="x"), ValueError, ("reduction", "'x'")),
    ],
    ids=lambda value: None if callable(value) else "-",
)
def test_bad_input(
    call: Callable[[Tensor], object], error: type[Exception], words: tuple[str, ...]
) -> None:
    with pytest.raises(error) as caught:
        call(torch.ones(3, 4))
    assert all(word in str(caught.value) for word in words)
