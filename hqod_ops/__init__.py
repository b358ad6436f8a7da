"""Fused losses and fake quantization for quantization-aware training of object detectors."""

from hqod_ops._debug import debug
from hqod_ops._loader import build_info
from hqod_ops._loader import check_environment as check_environment
from hqod_ops._version import __version__
from hqod_ops.functional import (
    aligned_box_iou,
    complete_box_iou_loss,
    distance_box_iou_loss,
    efficient_box_iou_loss,
    fake_quant,
    fake_quant_foreach,
    generalized_box_iou_loss,
    harmonious_iou_loss,
    hqod_loss,
    scylla_box_iou_loss,
    tcorr_loss,
)
from hqod_ops.modules import (
    CompleteBoxIoULoss,
    DistanceBoxIoULoss,
    EfficientBoxIoULoss,
    FakeQuant,
    GeneralizedBoxIoULoss,
    HarmoniousIoULoss,
    HQODLoss,
    ScyllaBoxIoULoss,
    TCorrLoss,
)

__all__ = [
    "CompleteBoxIoULoss",
    "DistanceBoxIoULoss",
    "EfficientBoxIoULoss",
    "FakeQuant",
    "GeneralizedBoxIoULoss",
    "HQODLoss",
    "HarmoniousIoULoss",
    "ScyllaBoxIoULoss",
    "TCorrLoss",
    "__version__",
    "aligned_box_iou",
    "build_info",
    "complete_box_iou_loss",
    "debug",
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
