"""The documented contract of every op."""

from hqod_ops.functional.losses import (
    aligned_box_iou,
    generalized_box_iou_loss,
    harmonious_iou_loss,
    hqod_loss,
    tcorr_loss,
)
from hqod_ops.functional.quantize import fake_quant, fake_quant_foreach

__all__ = [
    "aligned_box_iou",
    "fake_quant",
    "fake_quant_foreach",
    "generalized_box_iou_loss",
    "harmonious_iou_loss",
    "hqod_loss",
    "tcorr_loss",
]
