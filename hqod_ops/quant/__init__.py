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

from hqod_ops.quant.batch_norm import fold_batch_norm, freeze_batch_norm
from hqod_ops.quant.calibrate import calibrate
from hqod_ops.quant.config import FLOAT_BITS, PRESETS, QATConfig, Rule
from hqod_ops.quant.dorefa import DoReFa
from hqod_ops.quant.dsq import DSQ
from hqod_ops.quant.export import NMS, ExportError, ExportReport, detection_network, export_onnx
from hqod_ops.quant.layers import QATConv2d, QATConvTranspose2d, QATLayer, QATLinear
from hqod_ops.quant.level_norm import LevelBatchNorm2d, use_level_batch_norm
from hqod_ops.quant.levels import reset_levels
from hqod_ops.quant.lsq import LSQ
from hqod_ops.quant.lsq_plus import LSQPlus
from hqod_ops.quant.minmax import MinMaxSTE
from hqod_ops.quant.observers import (
    EMAMSE,
    MSE,
    OBSERVERS,
    EMAMinMax,
    LSQInit,
    MinMax,
    Observer,
    Percentile,
    PowerOfTwo,
    PowerOfTwoRange,
)
from hqod_ops.quant.pact import PACT
from hqod_ops.quant.params import (
    float_state_dict,
    load_float_state_dict,
    parameter_groups,
    quantizer_parameters,
)
from hqod_ops.quant.plan import LayerPlan, Plan, plan_qat
from hqod_ops.quant.prepare import prepare_qat
from hqod_ops.quant.producers import Placement, place_on_producers, placement
from hqod_ops.quant.quantizer import Quantizer
from hqod_ops.quant.quantizers import QUANTIZERS
from hqod_ops.quant.summary import LayerSummary, Summary, summary
from hqod_ops.quant.toml import from_toml, load_config, save_config, to_toml
from hqod_ops.quant.tqt import TQT, TQTFrozen

__all__ = [
    "DSQ",
    "DoReFa",
    "EMAMSE",
    "EMAMinMax",
    "ExportError",
    "ExportReport",
    "FLOAT_BITS",
    "LSQ",
    "LSQInit",
    "LSQPlus",
    "LayerPlan",
    "LayerSummary",
    "LevelBatchNorm2d",
    "MSE",
    "MinMax",
    "MinMaxSTE",
    "NMS",
    "OBSERVERS",
    "Observer",
    "PACT",
    "PRESETS",
    "Percentile",
    "Placement",
    "Plan",
    "PowerOfTwo",
    "PowerOfTwoRange",
    "QATConfig",
    "QATConv2d",
    "QATConvTranspose2d",
    "QATLayer",
    "QATLinear",
    "QUANTIZERS",
    "Quantizer",
    "Rule",
    "Summary",
    "TQT",
    "TQTFrozen",
    "calibrate",
    "detection_network",
    "export_onnx",
    "float_state_dict",
    "fold_batch_norm",
    "freeze_batch_norm",
    "from_toml",
    "load_config",
    "load_float_state_dict",
    "parameter_groups",
    "place_on_producers",
    "placement",
    "plan_qat",
    "prepare_qat",
    "quantizer_parameters",
    "reset_levels",
    "save_config",
    "summary",
    "to_toml",
    "use_level_batch_norm",
]
