"""Networks: plain tensors in, plain tensors out, so that they can be traced and quantized."""

from hqod_ops.detection.models.backbone import ResNetFPN
from hqod_ops.detection.models.head import ATSSHead, Scale
from hqod_ops.detection.models.network import ATSSNetwork, RawOutputs

__all__ = ["ATSSHead", "ATSSNetwork", "RawOutputs", "ResNetFPN", "Scale"]
