"""Quantization-aware training: quantizers, observers, and a whole model prepared in three lines.

Example:
    >>> import torch
    >>> from torch import nn
    >>> from hqod_ops.quant import QATConfig, calibrate, parameter_groups, prepare_qat
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    >>> model = prepare_qat(model, QATConfig(weight_bits=4, act_bits=4, first="0", prediction="2"))
    >>> model = calibrate(model, [torch.randn(2, 3, 16, 16)], progress=False)
    >>> optimizer = torch.optim.SGD(parameter_groups(model, weight_decay=1e-4), lr=1e-3)

It needs torch alone.
"""

from hqod_ops.quant.calibrate import calibrate
from hqod_ops.quant.config import FLOAT_BITS, PRESETS, QATConfig, Rule
from hqod_ops.quant.layers import QATConv2d, QATConvTranspose2d, QATLayer, QATLinear
from hqod_ops.quant.lsq import LSQ
from hqod_ops.quant.observers import EMAMSE, OBSERVERS, LSQInit, MinMax, Observer
from hqod_ops.quant.params import (
    float_state_dict,
    load_float_state_dict,
    parameter_groups,
    quantizer_parameters,
)
from hqod_ops.quant.prepare import prepare_qat
from hqod_ops.quant.quantizer import Quantizer, reset_levels
from hqod_ops.quant.summary import LayerSummary, Summary, summary

__all__ = [
    "EMAMSE",
    "FLOAT_BITS",
    "LSQ",
    "OBSERVERS",
    "PRESETS",
    "LSQInit",
    "LayerSummary",
    "MinMax",
    "Observer",
    "QATConfig",
    "QATConv2d",
    "QATConvTranspose2d",
    "QATLayer",
    "QATLinear",
    "Quantizer",
    "Rule",
    "Summary",
    "calibrate",
    "float_state_dict",
    "load_float_state_dict",
    "parameter_groups",
    "prepare_qat",
    "quantizer_parameters",
    "reset_levels",
    "summary",
]
