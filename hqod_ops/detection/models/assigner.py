"""Adaptive training sample selection: which anchor learns which object."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_area

from hqod_ops.detection.boxes import broadcast_iou

CENTRE_MARGIN = 0.01
"""How far inside its object an anchor's centre must lie, in pixels."""


def _centres(boxes: Tensor) -> Tensor:
    return (boxes[..., :2] + boxes[..., 2:]) / 2


@torch.no_grad()
def atss_assign(anchors: Sequence[Tensor], boxes: Sequence[Tensor], topk: int = 9) -> list[Tensor]:
    """Assign anchors to the objects of a batch of images.

    For every object: the ``topk`` anchors of each level with the nearest centres are candidates;
    the mean plus the (unbiased) standard deviation of their IoUs with the object is its threshold;
    candidates at or above it with their centre inside the object are positive. An anchor that is
    positive for several objects goes to the one with the greatest IoU (the first of equals).

    Args:
        anchors (sequence of Tensor[A_i, 4]): anchors of every level, (x1, y1, x2, y2) in pixels.
        boxes (sequence of Tensor[G_b, 4]): objects of every image, (x1, y1, x2, y2) in pixels.
        topk (int): candidates per level and object; all anchors of a level that has fewer.
            Default: 9

    Returns:
        list of Tensor[A]: for every image the index of each anchor's object, int64, -1 for
        background; A is the sum of A_i.

    Raises:
        ValueError: no anchors, or topk < 1.

    Source: ATSS (arXiv:1912.02424), with the details of its code.

    Example:
        >>> import torch
        >>> from hqod_ops.detection.models.assigner import atss_assign
        >>> anchors = [torch.tensor([[0., 0., 8., 8.], [8., 0., 16., 8.], [20., 0., 28., 8.]])]
        >>> atss_assign(anchors, [torch.tensor([[1., 0., 9., 8.]])])
        [tensor([ 0, -1, -1])]
    """
    if not anchors or topk < 1:
        raise ValueError(
            f"anchors and topk: expected at least one level and topk >= 1, "
            f"got {len(anchors)} levels and topk = {topk}"
        )
    every = torch.cat(list(anchors))
    counts = [len(b) for b in boxes]
    padded = every.new_zeros(len(boxes), max(counts, default=0), 4)
    if padded.numel() == 0:
        return [every.new_full((len(every),), -1, dtype=torch.int64) for _ in boxes]
    for image, objects in enumerate(boxes):
        padded[image, : counts[image]] = objects

    # [B, G, A], one level at a time: the candidates of every object of every image at once.
    candidates, start = [], 0
    for level in anchors:
        distance = torch.cdist(
            _centres(padded), _centres(level), compute_mode="donot_use_mm_for_euclid_dist"
        )
        nearest = distance.topk(min(topk, len(level)), dim=-1, largest=False).indices
        candidates.append(nearest + start)
        start += len(level)
    index = torch.cat(candidates, dim=-1)  # [B, G, K]
    chosen = every[index]
    iou = broadcast_iou(chosen, padded[:, :, None])
    spread = iou.std(dim=-1, keepdim=True) if iou.shape[-1] > 1 else 0.0
    threshold = iou.mean(dim=-1, keepdim=True) + spread
    centre = _centres(chosen)
    margin = torch.cat([centre - padded[:, :, None, :2], padded[:, :, None, 2:] - centre], dim=-1)
    real = box_area(padded.flatten(0, 1)).view(padded.shape[:2]) > 0
    positive = (iou >= threshold) & (margin.amin(dim=-1) > CENTRE_MARGIN) & real[..., None]

    best = iou.new_full((*padded.shape[:2], len(every)), -1.0)
    best.scatter_(-1, index, torch.where(positive, iou, -1.0))
    value, owner = best.max(dim=1)  # [B, A]
    return list(torch.where(value >= 0, owner, -1))
