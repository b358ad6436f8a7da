"""The documented contract of every op."""

from hqod_ops.functional.box_losses import (
    complete_box_iou_loss,
    distance_box_iou_loss,
    efficient_box_iou_loss,
    generalized_box_iou_loss,
    scylla_box_iou_loss,
)
from hqod_ops.functional.losses import (
    aligned_box_iou,
    harmonious_iou_loss,
    hqod_loss,
    tcorr_loss,
)
from hqod_ops.functional.quantize import fake_quant, fake_quant_foreach

__all__ = [
    "aligned_box_iou",
    "complete_box_iou_loss",
    "distance_box_iou_loss",
    "efficient_box_iou_loss",
    "fake_quant",
    "fake_quant_foreach",
    "generalized_box_iou_loss",
    "harmonious_iou_loss",
    "hqod_loss",
    "scylla_box_iou_loss",
    "tcorr_loss",
]
