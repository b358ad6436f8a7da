"""The native backend: the twins of :mod:`hqod_ops.reference`, over ``torch.ops.hqod``."""

from hqod_ops._register.box_iou import aligned_box_iou
from hqod_ops._register.fake_quant import fake_quant, fake_quant_foreach
from hqod_ops._register.harmonious_iou import harmonious_iou_loss
from hqod_ops._register.hqod import hqod_loss
from hqod_ops._register.tcorr import tcorr_loss

__all__ = [
    "aligned_box_iou",
    "fake_quant",
    "fake_quant_foreach",
    "harmonious_iou_loss",
    "hqod_loss",
    "tcorr_loss",
]
