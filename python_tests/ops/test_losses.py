"""What is particular to the IoU and the losses: derivatives, ties, corners, hard boxes, options."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hqod_ops import reference
from hqod_ops.testing.cases import DTYPES, make_boxes, uniform
from hqod_ops.testing.device import (
    DEVICE,
    aligned_box_iou,
    harmonious_iou_loss,
    hqod_loss,
    tcorr_loss,
    to_device,
)
from hqod_ops.testing.oracle import assert_close, assert_same_bits

F64 = torch.float64


def samples(n: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes, targets, scores and IoUs, away from ties and from the ends of [0, 1]."""
    generator = torch.Generator().manual_seed(11)
    values = (*make_boxes(n, generator), *(uniform((n,), 0.1, 0.9, generator) for _ in range(2)))
    pred, target, scores, ious = (v.to(dtype).requires_grad_() for v in values)
    return pred, target, scores, ious


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_gradcheck(reduction: str) -> None:
    """Numerical derivatives in float64.

    TCorr's factor 1 + |p - u| is a constant to autograd but not to finite differences, so TCorr is
    checked over that factor, sample by sample, and weighted by hand.
    """
    pred, target, scores, ious = samples(9)
    weight = torch.rand(9, dtype=F64, requires_grad=True)
    avg = torch.tensor(4.0, dtype=F64, requires_grad=True)

    def check(function: Callable[..., Tensor], *inputs: Tensor) -> None:
        assert torch.autograd.gradcheck(function, inputs, fast_mode=False)

    def constant(p: Tensor, u: Tensor) -> Tensor:
        return 1 / (1 + (p - u).abs()).detach()

    check(aligned_box_iou, pred, target)
    check(lambda p, t: harmonious_iou_loss(p, t, gamma=0.5, reduction=reduction), pred, target)
    check(lambda p, t, w: harmonious_iou_loss(p, t, weight=w, reduction=reduction), pred, target,
          weight)  # fmt: skip
    fixed = weight.detach()
    check(lambda p, t: harmonious_iou_loss(p, t, weight=fixed, reduction=reduction), pred, target)
    for variant in ("official", "geometric"):

        def tcorr(p: Tensor, u: Tensor, variant: str = variant) -> Tensor:
            return tcorr_loss(p, u, variant=variant) * constant(p, u)

        def tcorr_logits(x: Tensor, u: Tensor, variant: str = variant) -> Tensor:
            return tcorr_loss(x, u, variant=variant, logits=True) * constant(x.sigmoid(), u)

        def whole(box: Tensor, t: Tensor, p: Tensor, variant: str = variant) -> Tensor:
            loss = hqod_loss(box, t, p, variant=variant, hiou_weight=0, tcorr_weight=2.0,
                             reduction="none")  # fmt: skip
            return loss * constant(p, aligned_box_iou(box, t))

        check(tcorr, scores, ious)
        check(tcorr_logits, scores.detach().logit().requires_grad_(), ious)
        check(whole, pred, target, scores)

    def hiou(box: Tensor, t: Tensor, w: Tensor, avg_factor: Tensor) -> Tensor:
        factor = avg_factor if reduction == "mean" else None
        return hqod_loss(box, t, scores.detach(), tcorr_weight=0, hiou_weight=1.5, weight=w,
                         avg_factor=factor, reduction=reduction)  # fmt: skip

    check(lambda *args: hiou(*args, avg), pred, target, weight)
    if reduction == "mean":
        check(hiou, pred, target, weight, avg)
        check(lambda box, a: hiou(box, target.detach(), fixed, a), pred, avg)


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_tied_edges_share_the_gradient(dtype: torch.dtype) -> None:
    """Where both boxes set an edge of the overlap, each gets half of its gradient."""
    # Areas 4 and 8, overlap 4: the left, top and bottom edges tie; the right one is pred's.
    pred = torch.tensor([[0, 0, 2, 2]], dtype=dtype, requires_grad=True)
    target = torch.tensor([[0, 0, 4, 2]], dtype=dtype, requires_grad=True)
    iou = aligned_box_iou(pred, target)
    assert iou.item() == 0.5
    dpred, dtarget = torch.autograd.grad(iou, (pred, target))
    # u = I / (A + B - I): du = (dI (A + B) - I (dA + dB)) / U^2 with I = 4, A + B = 12, U = 8.
    # dI / d(x1, y1, x2, y2) = (-2/2, -2/2, 2, 2/2) for pred; (-2/2, -2/2, 0, 2/2) for target.
    # dA = (-2, -2, 2, 2), dB = (-2, -4, 2, 4).
    expected = [(-12 + 8) / 64, (-12 + 8) / 64, (24 - 8) / 64, (12 - 8) / 64]
    assert dpred[0].tolist() == pytest.approx(expected, rel=1e-6)
    expected = [(-12 + 8) / 64, (-12 + 16) / 64, -8 / 64, (12 - 16) / 64]
    assert dtarget[0].tolist() == pytest.approx(expected, rel=1e-6)

    same = torch.tensor([[1, 2, 5, 8]], dtype=dtype, requires_grad=True)
    d1, d2 = torch.autograd.grad(aligned_box_iou(same, other := same.detach().requires_grad_()),
                                 (same, other))  # fmt: skip
    assert not d1.any() and not d2.any(), (
        "moving an edge of equal boxes: up one way, down the other"
    )


@pytest.mark.numeric
def test_touching_boxes_have_a_gradient() -> None:
    """An overlap of length 0 passes gradient, so boxes that only touch are drawn together."""
    pred = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.9, 2.0]], requires_grad=True)
    target = torch.tensor([[2.0, 0.0, 4.0, 2.0], [2.0, 0.0, 4.0, 2.0]])
    (slope,) = torch.autograd.grad(aligned_box_iou(pred, target).sum(), pred)
    assert slope[0].tolist() == pytest.approx([0, 0, 2 / 8, 0])
    assert not slope[1].any(), "disjoint boxes have IoU 0 all around"


CORNERS = (0.0, 1e-45, 1e-20, 2.3e-16, 9.9e-7, 1e-6, 1e-3, 0.5, 1 - 2**-8, 1.0)


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("variant", ["official", "geometric"])
def test_corners_of_the_unit_square(dtype: torch.dtype, variant: str) -> None:
    """Finite values and gradients, below 4e4, which half precision holds; right to the last bit."""
    grid = torch.tensor(CORNERS, dtype=dtype)
    p, u = (x.reshape(-1) for x in torch.meshgrid(grid, grid, indexing="ij"))
    p, u = p.clone().requires_grad_(), u.clone().requires_grad_()
    loss = tcorr_loss(p, u, variant=variant)
    dp, du = torch.autograd.grad(loss.sum(), (p, u))
    p64, u64 = p.detach().double().requires_grad_(), u.detach().double().requires_grad_()
    want = reference.tcorr_loss(p64, u64, variant=variant)
    wanted = torch.autograd.grad(want.sum(), (p64, u64))
    assert loss.min() >= -1e-6 and loss.max() <= 1.2643
    assert max(dp.abs().max(), du.abs().max()) <= 4e4
    assert_close(loss.detach(), want.detach(), "loss")
    # Element by element: the norm would be that of the few large ones. exp turns the rounding of
    # u log p, up to 36 in size, into a relative error of some 1e-6. Where the derivative of the
    # logarithm is held, it may or may not count LOG_EPS / GRAD_GUARD, which is 2.2e-10.
    rtol = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}
    for got, expected in zip((dp, du), wanted, strict=True):
        torch.testing.assert_close(
            got.double(), expected, rtol=rtol[dtype], atol=6e-8 if dtype == torch.float16 else 1e-9
        )


@pytest.mark.numeric
def test_outside_the_unit_square() -> None:
    """Scores and IoUs are clamped into [0, 1]; beyond it they get no gradient."""
    p = torch.tensor([-0.5, 1.5, 0.5, 0.5], requires_grad=True)
    u = torch.tensor([0.4, 0.4, -2.0, 7.0], requires_grad=True)
    loss = tcorr_loss(p, u)
    clamped = tcorr_loss(p.detach().clamp(0, 1), u.detach().clamp(0, 1))
    assert_same_bits(loss.detach(), clamped, "clamped")
    dp, du = torch.autograd.grad(loss.sum(), (p, u))
    assert (dp[:2] == 0).all() and (dp[2:] != 0).all()
    assert (du[2:] == 0).all() and (du[:2] != 0).all()


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["float32", "float64"])
@pytest.mark.parametrize("variant", ["official", "geometric"])
def test_logits(dtype: torch.dtype, variant: str) -> None:
    """The fused sigmoid is the sigmoid, and the gradient to a logit stays small everywhere."""
    x = torch.linspace(-60, 60, 241, dtype=dtype)
    u = torch.linspace(0, 1, 241, dtype=dtype).flip(0)
    x, u = (v.reshape(-1) for v in torch.meshgrid(x, u, indexing="ij"))
    x = x.clone().requires_grad_()
    fused = tcorr_loss(x, u, logits=True, variant=variant)
    (dx,) = torch.autograd.grad(fused.sum(), x)
    separate = tcorr_loss(x.detach().sigmoid(), u, variant=variant)
    torch.testing.assert_close(fused.detach(), separate, rtol=1e-5, atol=2e-6)
    assert dx.isfinite().all()
    assert dx.abs().max() <= 0.27


@pytest.mark.numeric
def test_logits_beyond_every_range() -> None:
    x = torch.tensor([-3e38, -1e4, 1e4, 3e38, float("-inf"), float("inf")], requires_grad=True)
    loss = tcorr_loss(x, torch.full((6,), 0.7), logits=True)
    (dx,) = torch.autograd.grad(loss.sum(), x)
    assert loss.isfinite().all() and dx.isfinite().all()


HARD = torch.tensor(
    [
        [0, 0, 0, 0], [5, 5, 5, 9], [9, 9, 2, 2], [3, 8, 9, 1], [0, 0, 1e-30, 1e-30],
        [-1e20, -1e20, 1e20, 1e20], [1e20, 1e20, -1e20, -1e20], [0, 0, 1e20, 1],
        [1e20, 1e20, 1.1e20, 1.1e20], [-4, -4, -2, -2], [0, 0, 1e-4, 1e-4], [1, 2, 30, 40],
        [0, 0, 1e18, 1e18], [0, 0, 3e18, 1e-18],
    ]
)  # fmt: skip


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_hard_boxes(dtype: torch.dtype) -> None:
    """Inverted, empty, tiny and astronomically large boxes, each against each: all stays finite."""
    n = len(HARD)
    pred = HARD.to(dtype).repeat_interleave(n, 0).requires_grad_()
    target = HARD.to(dtype).repeat(n, 1).requires_grad_()
    iou = aligned_box_iou(pred, target)
    assert ((iou >= 0) & (iou <= 1 + 1e-6)).all()
    grads = torch.autograd.grad(iou.sum(), (pred, target))
    scores = torch.full((n * n,), 0.3, dtype=dtype, requires_grad=True)
    loss = hqod_loss(pred, target, scores, reduction="none")
    losses = torch.autograd.grad(loss.sum(), (pred, target, scores))
    hiou = harmonious_iou_loss(pred, target)
    more = torch.autograd.grad(hiou.sum(), (pred, target))
    for got in (loss, hiou, *grads, *losses, *more):
        assert got.isfinite().all()
    inverted = (HARD[:, 2:] <= HARD[:, :2]).any(1).repeat_interleave(n)
    assert not iou[inverted].any(), "an inverted or empty box has area 0"
    # A box meets itself with IoU 1, but for an area below eps (in units of 2**140 if it is huge).
    sides = HARD[:, 2:] - HARD[:, :2]
    same = torch.arange(n)[(sides.amin(1) >= 1) & (sides.amax(1) < 100 * sides.amin(1))] * (n + 1)
    assert len(same) == 5
    torch.testing.assert_close(iou[same], torch.ones_like(iou[same]))
    torch.testing.assert_close(hiou[same], torch.zeros_like(hiou[same]), rtol=0, atol=1e-5)


@pytest.mark.numeric
def test_nan_is_never_hidden() -> None:
    """A NaN anywhere in the input is a NaN in the loss of its sample, and only there."""
    pred, target, scores, ious = (v.detach() for v in samples(40, torch.float32))
    for column in range(4):
        for boxes in (pred, target):
            bad = boxes.clone()
            bad[17, column] = float("nan")
            pair = (bad, target) if boxes is pred else (pred, bad)
            for loss in (
                aligned_box_iou(*pair),
                harmonious_iou_loss(*pair),
                hqod_loss(*pair, scores, reduction="none"),
            ):
                assert loss.isnan().nonzero().tolist() == [[17]]
    for logits in (False, True):
        for variant in ("official", "geometric"):
            options = {"logits": logits, "variant": variant}
            bad = scores.clone()
            bad[3] = float("nan")
            assert tcorr_loss(bad, ious, **options).isnan().nonzero().tolist() == [[3]]
            loss = hqod_loss(pred, target, bad, reduction="none", **options)
            assert loss.isnan().nonzero().tolist() == [[3]]
            bad = ious.clone()
            bad[5] = float("nan")
            assert tcorr_loss(scores, bad, **options).isnan().nonzero().tolist() == [[5]]


@pytest.mark.numeric
def test_fused_is_the_sum_of_its_parts() -> None:
    pred, target, scores, _ = samples(65, torch.float32)
    weight = torch.rand(65)
    for logits in (False, True):
        fused = hqod_loss(
            pred,
            target,
            scores,
            logits=logits,
            alpha=1.2,
            gamma=0.6,
            hiou_weight=0.7,
            tcorr_weight=1.9,
            weight=weight,
            avg_factor=31.0,
        )
        iou = aligned_box_iou(pred, target)
        parts = 0.7 * harmonious_iou_loss(pred, target, alpha=1.2, gamma=0.6, weight=weight)
        parts = parts + 1.9 * tcorr_loss(scores, iou, logits=logits, weight=weight)
        whole = parts.sum() / 31
        torch.testing.assert_close(fused, whole, rtol=1e-6, atol=0)
        for got, want in zip(
            torch.autograd.grad(fused, (pred, target, scores)),
            torch.autograd.grad(whole, (pred, target, scores)),
            strict=True,
        ):
            assert_close(got, want.double(), "gradient", slack=2)


@pytest.mark.numeric
def test_leading_dimensions() -> None:
    """[..., 4] of any rank, a single box included, gives [...]."""
    pred, target, scores, ious = samples(24, torch.float32)
    flat = hqod_loss(pred, target, scores, reduction="none"), tcorr_loss(scores, ious)
    for shape in ((24,), (2, 12), (2, 3, 4), (24, 1)):
        boxes = (pred.reshape(*shape, 4), target.reshape(*shape, 4))
        loss = hqod_loss(*boxes, scores.reshape(shape), reduction="none")
        assert_same_bits(loss, flat[0].reshape(shape), "hqod_loss")
        assert_same_bits(
            tcorr_loss(scores.reshape(shape), ious.reshape(shape)), flat[1].reshape(shape), "tcorr"
        )
        assert harmonious_iou_loss(*boxes).shape == aligned_box_iou(*boxes).shape == shape
    one = hqod_loss(pred[0], target[0], scores[0], reduction="none")
    assert one.shape == () and one.item() == pytest.approx(flat[0][0].item(), rel=1e-6)
    one.backward()


@pytest.mark.numeric
def test_weight_reaches_value_and_gradient() -> None:
    """A weight of 0 silences a sample; whether the weight learns does not change the loss."""
    pred, target, scores, ious = samples(20)
    weight = torch.rand(20, dtype=F64)
    weight[::3] = 0
    for reduction in ("none", "sum", "mean"):
        for avg_factor in (None, 5.0, torch.tensor(5.0, dtype=F64)):
            if avg_factor is not None and reduction != "mean":
                continue
            losses = [
                (hqod_loss(pred, target, scores, weight=w, reduction=reduction,
                           avg_factor=avg_factor),
                 harmonious_iou_loss(pred, target, weight=w, reduction=reduction),
                 tcorr_loss(scores, ious, weight=w, reduction=reduction))
                for w in (weight, weight.clone().requires_grad_())
            ]  # fmt: skip
            for fixed, learned in zip(*losses, strict=True):
                torch.testing.assert_close(fixed, learned, rtol=1e-12, atol=0)
                leaf = scores if fixed is losses[0][2] else pred
                slopes = [torch.autograd.grad(loss.sum(), leaf)[0] for loss in (fixed, learned)]
                torch.testing.assert_close(*slopes, rtol=1e-12, atol=0)
                assert not slopes[0][::3].any() and slopes[0].any()


@pytest.mark.numeric
def test_float32_weight_beside_half_inputs() -> None:
    """As it happens under autocast: the product is formed in float32."""
    pred, target, scores, ious = (v.detach() for v in samples(33, torch.bfloat16))
    weight = torch.rand(33)
    for loss, plain in (
        (harmonious_iou_loss(pred, target, weight=weight), harmonious_iou_loss(pred, target)),
        (tcorr_loss(scores, ious, weight=weight), tcorr_loss(scores, ious)),
        (hqod_loss(pred, target, scores, weight=weight, reduction="none"),
         hqod_loss(pred, target, scores, reduction="none")),
    ):  # fmt: skip
        torch.testing.assert_close(loss, plain * weight, rtol=1e-6, atol=0)


@pytest.mark.numeric
def test_loss_scaling_saves_small_half_gradients() -> None:
    """A loss scale, as in mixed precision, comes before the rounding to half, not after it.

    The mean over 20,011 boxes has gradients near 1e-7, where float16 has hardly a digit left.
    """
    for dtype in (torch.float16, torch.bfloat16):
        pred, target, scores, ious = (v.detach().to(dtype) for v in samples(20011))
        for loss, inputs in (
            (hqod_loss, (pred, target, scores)),
            (lambda *args: harmonious_iou_loss(*args, reduction="mean"), (pred, target)),
            (lambda *args: tcorr_loss(*args, reduction="mean"), (scores, ious)),
        ):
            leaves = [x.clone().requires_grad_() for x in inputs]
            scale = torch.tensor(2.0**14)
            grads = torch.autograd.grad(loss(*leaves), leaves, scale)
            wide = [x.double().requires_grad_() for x in inputs]
            expected = torch.autograd.grad(loss(*wide), wide, scale.double())
            for got, want in zip(grads, expected, strict=True):
                assert_close(got, want, f"{loss} {dtype}")


@pytest.mark.numeric
def test_expanded_target_collects_its_gradient() -> None:
    """One box against many, by expand: the gradient of the box is the sum over all."""
    pred, target, scores, _ = samples(50)
    one = to_device(target.detach()[:1].clone()).requires_grad_()
    hqod_loss(pred, one.expand(50, 4), scores, reduction="sum").backward()
    many = one.detach().repeat(50, 1).requires_grad_()
    hqod_loss(pred, many, scores, reduction="sum").backward()
    assert one.grad is not None and many.grad is not None
    torch.testing.assert_close(one.grad, many.grad.sum(0, keepdim=True), rtol=1e-12, atol=1e-15)


@pytest.mark.numeric
def test_pred_against_itself() -> None:
    """The same tensor twice: both gradients are added."""
    boxes = torch.tensor([[1.0, 2.0, 5.0, 8.0]], device=DEVICE, requires_grad=True)
    loss = harmonious_iou_loss(boxes, boxes, reduction="sum")
    loss.backward()
    assert loss.item() == 0 and boxes.grad is not None and not boxes.grad.any()


def test_training_raises_iou_and_score() -> None:
    """Gradient descent on the fused loss moves boxes onto their targets and scores up."""
    torch.manual_seed(0)
    target = torch.tensor([[20.0, 20.0, 60.0, 70.0]]).repeat(32, 1)
    pred = (target + 12 * torch.randn(32, 4)).requires_grad_()
    logit = torch.zeros(32, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [pred], "lr": 0.5}, {"params": [logit], "lr": 0.1}])
    for _ in range(150):
        optimizer.zero_grad()
        hqod_loss(pred, target, logit, logits=True).backward()
        optimizer.step()
    assert aligned_box_iou(pred, target).min() > 0.9
    assert logit.sigmoid().min() > 0.9


@pytest.mark.numeric
@pytest.mark.parametrize("average", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
def test_no_samples_and_an_average_over_none(average: float | Tensor) -> None:
    """A batch without positives: avg_factor is their number."""
    pred = torch.zeros(0, 4, requires_grad=True)
    for function in (hqod_loss, reference.hqod_loss):
        loss = function(pred, torch.zeros(0, 4), torch.zeros(0), avg_factor=average)
        assert loss.item() == 0 and loss.requires_grad
        (gradient,) = torch.autograd.grad(loss, pred)
        assert gradient.shape == (0, 4)
