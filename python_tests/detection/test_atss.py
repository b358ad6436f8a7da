"""The ATSS detector and its loss: formulas in float64, training, images without objects."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("torchvision")

from hqod_ops import reference
from hqod_ops.detection.models import RawOutputs, ResNetFPN
from hqod_ops.detection.models.atss import ATSS, LOG_SIZE_LIMIT
from hqod_ops.detection.models.losses import atss_losses, centerness_target, gather_targets, total
from hqod_ops.detection.models.options import LossConfig, ModelConfig, TestConfig

TINY = ModelConfig(stem=8, widths=(8, 8, 16), channels=8, head_depth=1, groups=2)


def _case(seed: int, positives: int) -> dict[str, Any]:
    """Outputs at 2 x 30 anchors, some of them positive, in float64 and away from ties."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    corner = random(positives, 2) * 40
    boxes = torch.cat([corner, corner + 8 + random(positives, 2) * 20], dim=1)
    centre = boxes[:, :2] + (boxes[:, 2:] - boxes[:, :2]) * (0.1 + 0.8 * random(positives, 2))
    return {
        "outputs": RawOutputs(
            (random(2, 30, 5) * 4 - 2).requires_grad_(),
            random(2, 30, 4).requires_grad_(),
            (random(2, 30) * 4 - 2).requires_grad_(),
        ),
        "anchors": torch.cat([centre - 8, centre + 8], dim=1),
        "decoded": (boxes + random(positives, 4) * 6 - 3).requires_grad_(),
        "assigned": torch.randperm(60, generator=generator)[:positives],
        "labels": torch.randint(5, (positives,), generator=generator),
        "boxes": boxes,
    }


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _expected(case: dict[str, Any], config: LossConfig) -> dict[str, float]:
    """The loss of the specification, one number after the other."""
    logits = case["outputs"].logits.detach().flatten(0, 1).tolist()
    centerness = case["outputs"].centerness.detach().flatten().tolist()
    target = {
        (a, c) for a, c in zip(case["assigned"].tolist(), case["labels"].tolist(), strict=True)
    }
    focal = 0.0
    for a, row in enumerate(logits):
        for c, logit in enumerate(row):
            p = _sigmoid(logit)
            if (a, c) in target:
                focal -= 0.25 * (1 - p) ** 2 * math.log(p)
            else:
                focal -= 0.75 * p**2 * math.log(1 - p)
    box = cross = hqod = weights = 0.0
    iterated = zip(
        case["anchors"].tolist(),
        case["decoded"].tolist(),
        case["boxes"].tolist(),
        case["assigned"].tolist(),
        case["labels"].tolist(),
        strict=True,
    )
    for anchor, b, g, a, c in iterated:
        x, y = (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2
        l, t, r, d = x - g[0], y - g[1], g[2] - x, g[3] - y  # noqa: E741
        weight = math.sqrt(min(l, r) / max(l, r) * min(t, d) / max(t, d))
        inter = max(0.0, min(b[2], g[2]) - max(b[0], g[0])) * max(
            0.0, min(b[3], g[3]) - max(b[1], g[1])
        )
        union = (b[2] - b[0]) * (b[3] - b[1]) + (g[2] - g[0]) * (g[3] - g[1]) - inter
        hull = (max(b[2], g[2]) - min(b[0], g[0])) * (max(b[3], g[3]) - min(b[1], g[1]))
        u, p, q = inter / union, _sigmoid(logits[a][c]), _sigmoid(centerness[a])
        box += 2 * (1 - (u - (hull - union) / hull)) * weight
        cross -= weight * math.log(q) + (1 - weight) * math.log(1 - q)
        tcorr = (1 + abs(p - u)) * (math.exp(-(p**u * u**p)) - math.exp(-1))
        hiou = 1.5 * (1 - u) * (1 + u) ** 0.8
        hqod += config.hiou_weight * hiou + config.tcorr_weight * tcorr
        weights += weight
    count = max(1.0, len(case["assigned"]))
    losses = {"cls": focal / count, "box": box / max(1.0, weights), "centerness": cross / count}
    if config.hqod:
        losses["hqod"] = hqod / (max(1.0, weights) if config.normaliser == "official" else count)
    return losses


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "config",
    [
        LossConfig(),
        LossConfig(hqod=True),
        LossConfig(hqod=True, normaliser="num_pos", hiou_weight=0.5, tcorr_weight=2.0),
    ],
    ids=["base", "hqod", "options"],
)
@pytest.mark.parametrize("positives", [1, 12])
def test_loss_is_the_specified_one(seed: int, config: LossConfig, positives: int) -> None:
    case = _case(seed, positives)
    losses = atss_losses(**case, config=config)
    assert {
        name: pytest.approx(value, rel=1e-6) for name, value in _expected(case, config).items()
    } == {name: value.item() for name, value in losses.items()}


def test_hqod_is_added_to_an_unchanged_loss() -> None:
    """HQOD adds its term; it leaves the others as they are, and reaches class and box branches."""
    case = _case(0, 12)
    plain = atss_losses(**case, config=LossConfig())
    both = atss_losses(**case, config=LossConfig(hqod=True))
    assert {name: both[name].item() for name in plain} == {k: v.item() for k, v in plain.items()}
    logits, boxes, centerness = torch.autograd.grad(
        both["hqod"],
        (case["outputs"].logits, case["decoded"], case["outputs"].centerness),
        allow_unused=True,
    )
    assert logits.count_nonzero() == 12 and boxes.count_nonzero() > 0 and centerness is None
    weights = centerness_target(case["anchors"], case["boxes"]).sum()
    score = case["outputs"].logits.flatten(0, 1)[case["assigned"], case["labels"]]
    expected = reference.hqod_loss(
        case["decoded"], case["boxes"], score, logits=True, avg_factor=weights
    )
    torch.testing.assert_close(both["hqod"].double(), expected)


def test_variant_reaches_the_loss() -> None:
    case = _case(0, 12)
    values = {
        variant: atss_losses(**case, config=LossConfig(hqod=True, variant=variant))["hqod"].item()
        for variant in ("official", "geometric")
    }
    assert values["official"] != values["geometric"]


def test_divisors_are_means_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a rank without objects, each divisor is half of this rank's own."""
    case = _case(0, 12)
    alone = atss_losses(**case, config=LossConfig(hqod=True))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda total: None)
    halved = atss_losses(**case, config=LossConfig(hqod=True))
    for name, value in alone.items():
        torch.testing.assert_close(halved[name], 2 * value)


@pytest.mark.parametrize("hqod", [False, True])
@pytest.mark.parametrize("objects", [0, 1])
def test_images_without_objects(hqod: bool, objects: int) -> None:
    """Finite losses and a gradient for every parameter: distributed training waits for them all."""
    model = ATSS(TINY, 10)
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    one = {"boxes": torch.tensor([[8.0, 8.0, 24.0, 24.0]]), "labels": torch.tensor([3])}
    losses = model.losses(
        torch.rand(2, 3, 32, 32), [empty, one if objects else empty], LossConfig(hqod=hqod)
    )
    assert all(value.isfinite() for value in losses.values())
    assert objects or all(losses[name] == 0 for name in losses if name != "cls")
    total(losses).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("hqod", [False, True])
def test_learns_a_batch_by_heart(hqod: bool) -> None:
    torch.set_num_threads(1)
    model = ATSS(TINY, 10)
    images = torch.rand(2, 3, 48, 48)
    targets = [
        {"boxes": torch.tensor([[4.0, 4.0, 28.0, 30.0]]), "labels": torch.tensor([1])},
        {"boxes": torch.tensor([[14.0, 10.0, 40.0, 40.0]]), "labels": torch.tensor([7])},
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    values = []
    for _ in range(60):
        loss = total(model.losses(images, targets, LossConfig(hqod=hqod)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.5 * values[0]
    found = model.detect(images)
    assert [f["labels"][0].item() for f in found] == [1, 7]


def test_detections_are_what_decoding_by_hand_gives() -> None:
    """One confident place: its box, its score (class times centerness), and nothing else."""
    model = ATSS(TINY, 10)
    images = torch.rand(1, 3, 32, 32)
    anchors = torch.cat(model.anchors(images))
    logits = torch.full((1, len(anchors), 10), -9.0)
    deltas, centerness = torch.zeros(1, len(anchors), 4), torch.zeros(1, len(anchors))
    place = 5
    logits[0, place, 4] = 2.0
    deltas[0, place] = torch.tensor([1.0, -1.0, 0.5, 0.0])
    model.network = _Constant(logits, deltas, centerness)
    (found,) = model.detect(images)
    assert found["labels"].tolist() == [4]
    assert found["scores"].item() == pytest.approx(_sigmoid(2.0) * 0.5)
    x1, y1, x2, y2 = anchors[place].tolist()
    side = x2 - x1
    x, y, width, height = (
        (x1 + x2) / 2 + 0.1 * side,
        (y1 + y2) / 2 - 0.1 * side,
        side * math.exp(0.1),
        side,
    )
    box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    assert found["boxes"][0].tolist() == pytest.approx([min(max(v, 0), 32) for v in box], abs=1e-4)


class _Constant(torch.nn.Module):
    def __init__(self, *outputs: torch.Tensor) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.outputs


def test_log_sizes_are_bounded_both_ways() -> None:
    model = ATSS(TINY, 10)
    anchor = torch.tensor([[0.0, 0.0, 16.0, 16.0]]).repeat(2, 1)
    boxes = model.decode(torch.tensor([[0.0, 0.0, 99.0, 99.0], [0.0, 0.0, -99.0, -99.0]]), anchor)
    sides = boxes[:, 2:] - boxes[:, :2]
    limit = math.exp(LOG_SIZE_LIMIT)
    assert sides[0].tolist() == pytest.approx([16 * limit] * 2, rel=1e-4)
    assert sides[1].tolist() == pytest.approx([16 / limit] * 2, rel=1e-3)


def test_limits_of_detection() -> None:
    model = ATSS(TINY, 10)
    images = torch.rand(1, 3, 64, 64)
    found = model.detect(images, TestConfig(score_threshold=0.0, max_detections=7, nms_iou=1.0))[0]
    assert len(found["scores"]) == 7
    assert torch.equal(found["scores"], found["scores"].sort(descending=True).values)
    none = model.detect(images, TestConfig(score_threshold=1.0))[0]
    assert none["boxes"].shape == (0, 4)


def test_anchors_lie_on_the_places_of_the_features() -> None:
    model = ATSS(TINY, 10)
    images = torch.rand(1, 3, 50, 70)
    features = model.network.backbone(images)  # type: ignore[operator, union-attr]
    for level, feature, stride in zip(model.anchors(images), features, model.strides, strict=True):
        height, width = feature.shape[-2:]
        centres = (level[:, :2] + level[:, 2:]) / 2
        assert len(level) == height * width
        assert centres[0].tolist() == [0, 0]
        assert centres[-1].tolist() == [(width - 1) * stride, (height - 1) * stride]


def test_gather_targets_keeps_images_apart() -> None:
    boxes = [torch.rand(2, 4), torch.zeros(0, 4), torch.rand(1, 4)]
    labels = [torch.tensor([3, 4]), torch.zeros(0, dtype=torch.int64), torch.tensor([5])]
    assigned = [torch.tensor([1, -1]), torch.tensor([-1, -1]), torch.tensor([-1, 0])]
    position, matched, classes = gather_targets(assigned, boxes, labels)
    assert position.tolist() == [0, 5] and classes.tolist() == [4, 5]
    assert torch.equal(matched, torch.stack([boxes[0][1], boxes[2][0]]))


def test_network_settings_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="depths: expected 3 values"):
        ResNetFPN(8, (8, 8, 8), (1, 1), 2, 8)
    with pytest.raises(ValueError, match="levels: expected a value in"):
        ResNetFPN(8, (8, 8), (1, 1), 3, 8)
