"""Quantization-aware training: quantizers, observers, and a whole model prepared in three lines.

Example:
    >>> import torch
    >>> from torch import nn
    >>> from hqod_ops.quant import QATConfig, calibrate, parameter_groups, prepare_qat
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    >>> model = prepare_qat(model, QATConfig(weight_bits=4, act_bits=4, first="0", prediction="2"))
    >>> model = calibrate(model, [torch.randn(2, 3, 16, 16)], progress=False)
    >>> optimizer = torch.optim.SGD(parameter_groups(model, weight_decay=1e-4), lr=1e-3)

What a training script calls stands here; the classes behind it are in ``quantizers``,
``observers``, ``nn``, ``config``, ``dataflow``, ``adapters`` and ``export``, what keeps accuracy at
low bits in ``tuning``; all can be had from here too. It needs torch alone.
"""

from __future__ import annotations

import importlib
from typing import Any

from hqod_ops.quant.calibrate import calibrate
from hqod_ops.quant.config import (
    QATConfig,
    Rule,
    from_toml,
    load_config,
    plan_qat,
    save_config,
    to_toml,
)
from hqod_ops.quant.dataflow import fold_batch_norm, place_on_producers, placement
from hqod_ops.quant.export import detection_network, export_onnx
from hqod_ops.quant.nn import freeze_batch_norm, use_level_batch_norm
from hqod_ops.quant.parameters import (
    float_state_dict,
    load_float_state_dict,
    parameter_groups,
    quantizer_parameters,
)
from hqod_ops.quant.prepare import prepare_qat
from hqod_ops.quant.quantizers import reset_levels
from hqod_ops.quant.summary import summary

__all__ = [
    "QATConfig",
    "Rule",
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

_WINGS = ("config", "quantizers", "observers", "nn", "dataflow", "adapters", "export", "summary")


def __getattr__(name: str) -> Any:
    for wing in _WINGS:
        module = importlib.import_module(f"{__name__}.{wing}")
        if name in module.__all__:
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
