"""Fused losses and fake quantization for quantization-aware training of object detectors."""

from hqod_ops._debug import debug
from hqod_ops._loader import build_info
from hqod_ops._loader import check_environment as check_environment
from hqod_ops._version import __version__
from hqod_ops.functional import (
    aligned_box_iou,
    fake_quant,
    fake_quant_foreach,
    generalized_box_iou_loss,
    harmonious_iou_loss,
    hqod_loss,
    tcorr_loss,
)
from hqod_ops.modules import (
    FakeQuant,
    GeneralizedBoxIoULoss,
    HarmoniousIoULoss,
    HQODLoss,
    TCorrLoss,
)

__all__ = [
    "FakeQuant",
    "GeneralizedBoxIoULoss",
    "HQODLoss",
    "HarmoniousIoULoss",
    "TCorrLoss",
    "__version__",
    "aligned_box_iou",
    "build_info",
    "debug",
    "fake_quant",
    "fake_quant_foreach",
    "generalized_box_iou_loss",
    "harmonious_iou_loss",
    "hqod_loss",
    "tcorr_loss",
]
