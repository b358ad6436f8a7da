"""Layers of a prepared model, and what becomes of its batch norms."""

from hqod_ops.quant.nn.batch_norm import freeze_batch_norm
from hqod_ops.quant.nn.layers import QATConv2d, QATConvTranspose2d, QATLayer, QATLinear
from hqod_ops.quant.nn.level_norm import LevelBatchNorm2d, use_level_batch_norm

__all__ = [
    "LevelBatchNorm2d",
    "QATConv2d",
    "QATConvTranspose2d",
    "QATLayer",
    "QATLinear",
    "freeze_batch_norm",
    "use_level_batch_norm",
]
