"""ATSS assignment against loops written from the paper's algorithm."""

from __future__ import annotations

import math
import os
import statistics

import pytest
import torch

if "torchvision" not in os.environ.get("HQOD_REQUIRE", ""):
    pytest.importorskip("torchvision")

from hqod_ops.detection.models.assigner import atss_assign


def _iou(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    inter = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / union if union > 0 else 0.0


def _centre(box: list[float]) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def brute_force(
    levels: list[list[list[float]]], objects: list[list[float]], topk: int
) -> list[int]:
    anchors = [anchor for level in levels for anchor in level]
    owner, overlap = [-1] * len(anchors), [-math.inf] * len(anchors)
    for number, box in enumerate(objects):
        candidates: list[int] = []
        start = 0
        for level in levels:
            by_distance = sorted(
                range(len(level)), key=lambda i: math.dist(_centre(level[i]), _centre(box))
            )
            candidates += [start + i for i in by_distance[:topk]]
            start += len(level)
        ious = [_iou(anchors[c], box) for c in candidates]
        spread = statistics.stdev(ious) if len(ious) > 1 else 0.0
        threshold = statistics.fmean(ious) + spread
        for c, iou in zip(candidates, ious, strict=True):
            x, y = _centre(anchors[c])
            inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if iou >= threshold and inside and iou > overlap[c]:
                owner[c], overlap[c] = number, iou
    return owner


def _levels(generator: torch.Generator, size: int = 64) -> list[torch.Tensor]:
    """Square anchors on grids of stride 8, 16 and 32; jittered, so that no two distances tie."""
    levels = []
    for stride in (8, 16, 32):
        step = torch.arange(0, size, stride, dtype=torch.float64)
        centre = torch.cartesian_prod(step, step)
        centre = centre + torch.rand(centre.shape, generator=generator, dtype=torch.float64)
        levels.append(torch.cat([centre - 1.5 * stride, centre + 1.5 * stride], dim=1))
    return levels


def _objects(generator: torch.Generator, count: int, size: int = 64) -> torch.Tensor:
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * size * 0.7
    side = 6 + torch.rand(count, 2, generator=generator, dtype=torch.float64) * size * 0.5
    return torch.cat([corner, corner + side], dim=1)


@pytest.mark.parametrize("topk", [1, 4, 9, 50])
@pytest.mark.parametrize("seed", range(8))
def test_agrees_with_loops(seed: int, topk: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    levels = _levels(generator)
    batch = [_objects(generator, count) for count in (1, 5, 0, 9)]
    expected = [
        brute_force([level.tolist() for level in levels], objects.tolist(), topk)
        for objects in batch
    ]
    assert [image.tolist() for image in atss_assign(levels, batch, topk)] == expected
    assert any(index >= 0 for image in expected for index in image)


def test_padding_changes_nothing() -> None:
    """An image's assignment does not depend on how many objects its neighbours have."""
    generator = torch.Generator().manual_seed(0)
    levels = _levels(generator)
    few, many = _objects(generator, 2), _objects(generator, 20)
    alone = atss_assign(levels, [few])[0]
    together = atss_assign(levels, [many, few])[1]
    assert torch.equal(alone, together)


def test_no_objects() -> None:
    levels = _levels(torch.Generator().manual_seed(0))
    empty = torch.zeros(0, 4, dtype=torch.float64)
    assert all((a == -1).all() for a in atss_assign(levels, [empty, empty]))


def test_degenerate_object_gets_no_anchor() -> None:
    levels = _levels(torch.Generator().manual_seed(0))
    flat = torch.tensor([[10.0, 10.0, 10.0, 30.0]], dtype=torch.float64)
    assert (atss_assign(levels, [flat])[0] == -1).all()


def test_greatest_overlap_wins() -> None:
    anchor = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    objects = torch.tensor([[0.0, 0.0, 10.0, 20.0], [0.0, 0.0, 10.0, 11.0]])
    assert atss_assign([anchor], [objects])[0].tolist() == [1]


@pytest.mark.parametrize(("anchors", "topk"), [([], 9), ([torch.zeros(1, 4)], 0)])
def test_bad_input(anchors: list[torch.Tensor], topk: int) -> None:
    with pytest.raises(ValueError, match="expected at least one level and topk >= 1"):
        atss_assign(anchors, [torch.zeros(0, 4)], topk)
