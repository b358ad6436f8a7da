"""Quantizers: each puts a tensor on a grid of its own kind, with what is learned of that grid."""

from hqod_ops.quant.quantizers.base import Quantizer
from hqod_ops.quant.quantizers.calls import reset_levels
from hqod_ops.quant.quantizers.dorefa import DoReFa
from hqod_ops.quant.quantizers.dsq import DSQ
from hqod_ops.quant.quantizers.lsq import LSQ
from hqod_ops.quant.quantizers.lsq_plus import LSQPlus
from hqod_ops.quant.quantizers.minmax import MinMaxSTE
from hqod_ops.quant.quantizers.pact import PACT
from hqod_ops.quant.quantizers.registry import QUANTIZERS
from hqod_ops.quant.quantizers.tqt import TQT, TQTFrozen

__all__ = [
    "DSQ",
    "DoReFa",
    "LSQ",
    "LSQPlus",
    "MinMaxSTE",
    "PACT",
    "QUANTIZERS",
    "Quantizer",
    "TQT",
    "TQTFrozen",
    "reset_levels",
]
