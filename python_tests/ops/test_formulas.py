"""The mathematics, checked against what does not come from this package.

The published values of the method, formulas written out in NumPy, torchvision, pycocotools and
torch's own fake quantization. Each test runs on the public ops, on the device under test, and on
the reference, which is the oracle of every other test.
"""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from hqod_ops import reference
from hqod_ops.testing import device
from hqod_ops.testing.cases import CASES, make_boxes, uniform

pytestmark = pytest.mark.numeric
both = pytest.mark.parametrize("ops", [device, reference], ids=["ops", "reference"])

E = 2.220446049250313e-16
TARGET = (10.0, 10.0, 50.0, 50.0)
# box, p: IoU, TCorr, HIoU, dT/dp, dT/du, dH/du, d(T + H)/dbox (the published code in float64)
PARITY = {
    "A": ((12, 13, 52, 49), 0.8, 0.8181818182, 0.126234728, 0.439985554, -0.29211805, -0.26815949,
          -2.2263269, (0.053709, 0.0542516, 0.0439438, -0.0542516)),
    "B": ((30, 30, 70, 70), 0.95, 0.1428571429, 0.880834547, 1.43066524, 0.4337885, -1.5942014,
          -0.66764378, (0.013848, 0.013848, 0.00461601, 0.00461601)),
    "H": ((10, 10, 50, 30), 0.5, 0.5, 0.238651209, 1.0373714, -0.093057822, -0.093057822,
          -1.5214781, (0.00504542, 0.0100908, -0.00504542, -0.0403634)),
    # The published dT/du is -5.0e7 here: the guard holds it where 1 / (u + e) is 1e6.
    "N": ((60, 60, 90, 90), 0.5, 0.0, 0.948180802, 1.5, 8.0563842e-7, None, -0.3, (0, 0, 0, 0)),
    "T": (TARGET, 1.0, 1.0, -9.15e-9, 0.0, -0.36787944, -0.36787944, -2.6116517, (0, 0, 0, 0)),
}  # fmt: skip


def double(*values: object, grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def derivative(y: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(y.sum(), x, retain_graph=True)[0]


@both
@pytest.mark.parametrize("name", PARITY)
def test_published_values(ops: ModuleType, name: str) -> None:
    """The table of the method's own numbers; its last digit is rounded."""
    box, p, u, tcorr, hiou, dt_dp, dt_du, dh_du, dbox = PARITY[name]
    # The published code subtracts exp(-1) rounded to float32.
    tcorr += (1 + abs(p - u)) * (torch.tensor(math.exp(-1)).item() - math.exp(-1))
    pred, target, score = double(box, grad=True), double(TARGET), double(p, grad=True)
    iou = ops.aligned_box_iou(pred, target)
    assert iou.item() == pytest.approx(u, abs=1e-10)
    assert ops.harmonious_iou_loss(pred, target).item() == pytest.approx(hiou, rel=1e-8, abs=1e-11)

    free = iou.detach().requires_grad_()
    loss = ops.tcorr_loss(score, free)
    assert loss.item() == pytest.approx(tcorr, rel=2e-9, abs=1e-11)
    assert derivative(loss, score).item() == pytest.approx(dt_dp, rel=1e-7)
    if dt_du is None:
        k = E**p
        dt_du = -(1 + p) * math.exp(E - k) * k * (p / 1e-6 + math.log(p + E))
    assert derivative(loss, free).item() == pytest.approx(dt_du, rel=1e-7)

    moved = pred.detach().requires_grad_()
    slope = derivative(ops.harmonious_iou_loss(moved, target), moved)
    iou_slope = derivative(ops.aligned_box_iou(moved, target), moved)
    torch.testing.assert_close(slope, dh_du * iou_slope, rtol=1e-7, atol=1e-12)

    whole = ops.hqod_loss(pred, target, score, reduction="none")
    assert whole.item() == pytest.approx(tcorr + hiou, rel=0, abs=1e-8)
    assert derivative(whole, pred)[0].tolist() == pytest.approx(dbox, rel=5e-6, abs=1e-12)
    assert derivative(whole, score).item() == pytest.approx(dt_dp, rel=1e-7)


@both
def test_published_lsq_row(ops: ModuleType) -> None:
    x = double(-1.2, -0.9, -0.3, 0.1, 0.26, 0.59, 0.7, 1.5, grad=True)
    scale = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    y = ops.fake_quant(x, scale, quant_min=-2, quant_max=1, grad_scale="lsq")
    y.sum().backward()
    assert y.tolist() == pytest.approx([-0.8, -0.8, -0.4, 0, 0.4, 0.4, 0.4, 0.4])
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 1, 1, 0, 0]
    # -2 + .25 - .25 - .25 + .35 - .475 + 1 + 1 over sqrt(8 * 1); -.132582426 when run in float32.
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx(-0.375 / math.sqrt(8), rel=1e-12)
    assert scale.grad.item() == pytest.approx(-0.132582426, rel=1e-6)


@both
def test_hand_worked_boxes(ops: ModuleType) -> None:
    """Half overlap, containment, touching, apart, inverted, a point, and a point on a point."""
    a = double((0, 0, 2, 2), (0, 0, 4, 4), (0, 0, 1, 1), (0, 0, 1, 1), (2, 2, 0, 0), (1, 1, 1, 1),
               (3, 3, 3, 3))  # fmt: skip
    b = double((1, 0, 3, 2), (1, 1, 2, 3), (1, 0, 2, 1), (5, 5, 6, 6), (0, 0, 2, 2), (0, 0, 2, 2),
               (3, 3, 3, 3))  # fmt: skip
    expected = [1 / 3, 2 / 16, 0, 0, 0, 0, 0]
    assert ops.aligned_box_iou(a, b).tolist() == pytest.approx(expected)
    assert ops.aligned_box_iou(b, a).tolist() == pytest.approx(expected)
    losses = [1.5 * (1 - u) * (1 + u) ** 0.8 for u in expected]
    assert ops.harmonious_iou_loss(a, b).tolist() == pytest.approx(losses)


@both
def test_union_below_eps(ops: ModuleType) -> None:
    """Two equal boxes of area 1e-8: the union is held at 1e-6, and is a constant."""
    box = double((0, 0, 1e-4, 1e-4), grad=True)
    iou = ops.aligned_box_iou(box, box.detach())
    assert iou.item() == pytest.approx(1e-2)
    # inter = w * h with both edges tied, half of each: d/dx2 = h / 2 / 1e-6.
    assert derivative(iou, box)[0].tolist() == pytest.approx([-50, -50, 50, 50])


@both
def test_iou_against_torch_and_numpy(ops: ModuleType) -> None:
    pred, target = make_boxes(500, torch.Generator().manual_seed(3))
    a, b = pred.numpy(), target.numpy()
    wh = np.clip(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), 0, None)
    inter = wh.prod(1)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - inter
    np.testing.assert_allclose(ops.aligned_box_iou(pred, target).numpy(), inter / union, rtol=1e-12)


@pytest.mark.require("torchvision")
@both
def test_iou_against_torchvision(ops: ModuleType) -> None:
    from torchvision.ops import box_iou

    pred, target = make_boxes(200, torch.Generator().manual_seed(4))
    torch.testing.assert_close(
        ops.aligned_box_iou(pred, target), box_iou(pred, target).diagonal(), rtol=1e-12, atol=0
    )


@pytest.mark.require("pycocotools")
@both
def test_iou_against_pycocotools(ops: ModuleType) -> None:
    from pycocotools import mask

    pred, target = make_boxes(200, torch.Generator().manual_seed(5))
    a, b = (torch.cat([x[:, :2], x[:, 2:] - x[:, :2]], dim=1).numpy() for x in (pred, target))
    expected = np.diagonal(mask.iou(a, b, [0] * len(b)))
    np.testing.assert_allclose(ops.aligned_box_iou(pred, target).numpy(), expected, rtol=1e-10)


def tcorr_numpy(
    p: np.ndarray, u: np.ndarray, variant: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss, dT/dp and dT/du as the method states them, w = 1 + |p - u| being a constant."""
    w = 1 + np.abs(p - u)
    if variant == "official":
        k = (p + E) ** u * (u + E) ** p
        s = np.exp(-(k - E))
        dp, du = u / (p + E) + np.log(u + E), p / (u + E) + np.log(p + E)
    else:
        k = np.sqrt((p + E) * (u + E))
        s = np.exp(-k)
        dp, du = 0.5 / (p + E), 0.5 / (u + E)
    return w * (s - np.exp(-1)), -w * s * k * dp, -w * s * k * du


@both
@pytest.mark.parametrize("variant", ["official", "geometric"])
@pytest.mark.parametrize("logits", [False, True])
def test_tcorr_formulas(ops: ModuleType, variant: str, logits: bool) -> None:
    grid = torch.linspace(2e-6, 1, 41, dtype=torch.float64)
    p, u = (x.reshape(-1) for x in torch.meshgrid(grid, grid, indexing="ij"))
    if logits:
        p = p * 0.99 + 0.005
    score = (p.logit() if logits else p.clone()).requires_grad_()
    iou = u.clone().requires_grad_()
    loss = ops.tcorr_loss(score, iou, variant=variant, logits=logits)
    expected, dp, du = tcorr_numpy(p.numpy(), u.numpy(), variant)
    if logits:
        dp = dp * (p * (1 - p)).numpy()
    # The derivative crosses zero and the loss is 0 at (1, 1), hence the absolute tolerance.
    for got, want in (
        (loss.detach(), expected), (derivative(loss, score), dp), (derivative(loss, iou), du)
    ):  # fmt: skip
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-10, atol=1e-13)


@both
@pytest.mark.parametrize("alpha, gamma", [(1.5, 0.8), (1.0, 0.0), (2.0, 1.7)])
def test_hiou_formulas(ops: ModuleType, alpha: float, gamma: float) -> None:
    """Side by side boxes have IoU (1 - t) / (1 + t) for a shift t, so that dL/dt is known."""
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    target = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64).expand(99, 4)
    shift = t.clone().requires_grad_()
    move = torch.stack([shift, torch.zeros(99), shift, torch.zeros(99)], dim=1)
    loss = ops.harmonious_iou_loss(target + move, target, alpha=alpha, gamma=gamma)
    u = ((1 - t) / (1 + t)).numpy()
    np.testing.assert_allclose(
        loss.detach().numpy(), alpha * (1 - u) * (1 + u) ** gamma, rtol=1e-12
    )
    slope = -alpha * (1 + u) ** (gamma - 1) * ((1 - gamma) + (1 + gamma) * u)
    np.testing.assert_allclose(
        derivative(loss, shift).numpy(), slope * -2 / (1 + t.numpy()) ** 2, rtol=1e-10, atol=1e-13
    )


@both
def test_tcorr_as_the_method_describes_it(ops: ModuleType) -> None:
    """What the method's analysis says of both variants."""

    def tcorr(p: float, u: float, variant: str = "official") -> float:
        return ops.tcorr_loss(double(p), double(u), variant=variant).item()

    assert tcorr(1 / math.e, 1 / math.e) == pytest.approx(0.25144, abs=1e-5)
    assert tcorr(0.1, 0.1) == pytest.approx(0.1642, abs=1e-4)
    assert tcorr(0.1, 0.1) < tcorr(0.5, 0.5)
    assert tcorr(0, 0) == pytest.approx(0, abs=1e-12), "the published second optimum"
    assert tcorr(0, 1) == tcorr(1, 0) == pytest.approx(2 * (1 - math.exp(-1)))
    assert tcorr(0, 0, "geometric") == pytest.approx(1 - math.exp(-1))
    assert tcorr(1, 1, "geometric") == pytest.approx(0, abs=1e-12)

    grid = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    p, u = (x.reshape(-1).requires_grad_() for x in torch.meshgrid(grid, grid, indexing="ij"))
    lowered = (derivative(ops.tcorr_loss(p, u), p) > 0).double().mean().item()
    assert lowered == pytest.approx(0.391, abs=2e-3)
    assert (derivative(ops.tcorr_loss(p, u, variant="geometric"), p) <= 0).all()


def lsq_numpy(
    x: np.ndarray, s: np.ndarray, z: np.ndarray, low: int, high: int, dy: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """y and the terms of dx, ds and dz (s and z as large as x), as LSQ and LSQ+ state them."""
    zero = np.rint(z)
    code = np.rint(x / s) + zero
    level = np.clip(code, low, high) - zero
    inside = (low <= code) & (code <= high)
    return (
        level * s,
        dy * inside,
        dy * np.where(inside, level - x / s, level),
        dy * np.where(inside, 0.0, -s),
    )


RANGES = [(-(2 ** (b - 1)), 2 ** (b - 1) - 1) for b in range(2, 9)]
RANGES += [(0, 2**b - 1) for b in range(2, 9)] + [(-128, 127), (-127, 127), (0, 1), (-1, 0), (3, 9)]


@both
def test_lsq_formulas(ops: ModuleType) -> None:
    """2 to 8 bits, signed and unsigned, every axis, fractional zero points of both signs."""
    shape = (4, 5, 3)
    generator = torch.Generator().manual_seed(0)
    for low, high in RANGES:
        for axis in (None, 0, 1, 2):
            c = 1 if axis is None else shape[axis]
            along = [c if i == axis else 1 for i in range(3)]
            s = uniform((c,), 0.05, 0.3, generator).requires_grad_()
            z = uniform((c,), -6, 6, generator).requires_grad_()
            codes = uniform(shape, low - 2, high + 2, generator).round()
            codes = codes + uniform(shape, -0.4, 0.4, generator) - z.detach().round().view(along)
            x = (codes * s.detach().view(along)).requires_grad_()
            dy = uniform(shape, -1, 2, generator)
            y = ops.fake_quant(
                x, s, z, quant_min=low, quant_max=high, ch_axis=axis, grad_scale=0.37
            )
            dx, ds, dz = torch.autograd.grad(y, (x, s, z), dy)
            full = [v.detach().view(along).expand(shape).numpy() for v in (s, z)]
            want = lsq_numpy(x.detach().numpy(), *full, low, high, dy.numpy())
            over = tuple(i for i in range(3) if i != axis)
            np.testing.assert_allclose(y.detach().numpy(), want[0], rtol=1e-12)
            np.testing.assert_array_equal(dx.numpy(), want[1])
            np.testing.assert_allclose(
                ds.numpy().reshape(-1), 0.37 * want[2].sum(axis=over).reshape(-1), rtol=1e-9
            )
            np.testing.assert_allclose(
                dz.numpy().reshape(-1), 0.37 * want[3].sum(axis=over).reshape(-1), rtol=1e-9
            )


@both
def test_fake_quant_against_torch(ops: ModuleType) -> None:
    """torch's own learnable op, where the two agree.

    Off rounding ties, since it multiplies by 1 / scale, and with zero point 0, since its per-tensor
    backward truncates negative ones.
    """
    variant = CASES["fake_quant"].variant("per_channel_axis0")
    inputs = CASES["fake_quant"].make(variant, (16, 5, 7), device="cpu")
    x, scale = inputs["x"], inputs["scale"]
    for axis, low, high, s in (
        (0, -8, 7, scale),
        (None, 0, 15, scale[:1]),
        (None, -8, 7, scale[:1]),
    ):
        zero = torch.zeros_like(s, requires_grad=True)
        dy = torch.randn(x.shape)
        y = ops.fake_quant(x, s, quant_min=low, quant_max=high, ch_axis=axis, grad_scale=0.3)
        if axis is None:
            theirs = torch._fake_quantize_learnable_per_tensor_affine(x, s, zero, low, high, 0.3)
        else:
            theirs = torch._fake_quantize_learnable_per_channel_affine(
                x, s, zero, axis, low, high, 0.3
            )
        for got, want in zip(
            (y, *torch.autograd.grad(y, (x, scale), dy)),
            (theirs, *torch.autograd.grad(theirs, (x, scale), dy)),
            strict=True,
        ):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@both
def test_fake_quant_against_torch_with_zero_points(ops: ModuleType) -> None:
    """torch's op with fixed parameters takes any zero point in its range: values and dx."""
    variant = CASES["fake_quant"].variant("per_channel_last_zero_point")
    inputs = CASES["fake_quant"].make(variant, (9, 6), device="cpu")
    x, scale = inputs["x"], inputs["scale"]
    zero = inputs["zero_point"].detach().round().int()
    dy = torch.randn(x.shape)
    y = ops.fake_quant(x, scale, zero.float(), quant_min=0, quant_max=15, ch_axis=1)
    theirs = torch.fake_quantize_per_channel_affine(x, scale.detach(), zero, 1, 0, 15)
    torch.testing.assert_close(y, theirs, rtol=1e-6, atol=1e-6)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(theirs, x, dy)[0])
