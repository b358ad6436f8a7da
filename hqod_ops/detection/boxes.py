"""Overlap of boxes."""

from __future__ import annotations

import torch
from torch import Tensor

from hqod_ops import aligned_box_iou


def broadcast_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """IoU of boxes that broadcast against each other; see :func:`hqod_ops.aligned_box_iou`.

    Args:
        boxes1 (Tensor[..., 4]): boxes (x1, y1, x2, y2), in pixels.
        boxes2 (Tensor[..., 4]): the others, of the same dtype and device.

    Returns:
        Tensor[...]: values in [0, 1].

    Example:
        >>> import torch
        >>> from hqod_ops.detection.boxes import broadcast_iou
        >>> boxes = torch.tensor([[0., 0., 2., 2.], [0., 0., 2., 1.]])
        >>> broadcast_iou(boxes[:, None], boxes[None]).tolist()
        [[1.0, 0.5], [0.5, 1.0]]
    """
    boxes1, boxes2 = torch.broadcast_tensors(boxes1, boxes2)
    return aligned_box_iou(boxes1, boxes2)
