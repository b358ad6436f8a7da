"""Every argument of the public functions is checked, and named where it is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hqod_ops import quant
from hqod_ops.quant import QATConfig, Rule, tuning

BATCHES = [torch.rand(2, 3, 8, 8)]


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


def prepared() -> nn.Module:
    return quant.prepare_qat(net(), "w8a8")


def calibrated() -> nn.Module:
    return quant.calibrate(prepared(), BATCHES, progress=False)


NO_MODEL: list[Any] = [None, 3, "model", nn.Conv2d]
NO_BATCHES: list[Any] = [None, 5, BATCHES[0], {"images": BATCHES[0]}, "images", nn.Identity()]
NO_FUNCTION: list[Any] = [3, "forward"]
NO_COUNT: list[Any] = [0, -1, 2.5, True, "2"]
NO_NAMES: list[Any] = [0, ["0", 1], "", [""], torch.zeros(2), {"0": 1}]
NO_FLAG: list[Any] = ["yes", 1, 0.0]
NO_BITS: list[Any] = [True, 1, 9, 4.0, "4"]
NO_RATE: list[Any] = [-1.0, float("nan"), float("inf"), "1", True]

EDGES = ("first", "prediction")

RUNS: dict[str, Callable[..., object]] = {
    "calibrate": lambda **a: quant.calibrate(**{"model": prepared(), "batches": BATCHES, **a}),
    "reestimate_batch_norm": lambda **a: tuning.reestimate_batch_norm(
        **{"model": calibrated(), "batches": BATCHES, **a}
    ),
    "correct_bias": lambda **a: tuning.correct_bias(
        **{"model": calibrated(), "float_model": net(), "batches": BATCHES, **a}
    ),
    "calibrate_scores": lambda **a: tuning.calibrate_scores(
        **{"model": calibrated(), "float_model": net(), "batches": BATCHES, "layers": "3", **a}
    ),
    "learn_rounding": lambda **a: tuning.learn_rounding(
        **{"model": calibrated(), "float_model": net(), "batches": BATCHES, **a}
    ),
    "sensitivity": lambda **a: tuning.sensitivity(**{"model": net(), "batches": BATCHES, **a}),
    "quantize": lambda **a: tuning.quantize(
        **{"model": net(), "batches": BATCHES, "config": "w8a8", **a}
    ),
    "summary": lambda **a: quant.summary(**{"model": calibrated(), **a}),
    "fold_batch_norm": lambda **a: quant.fold_batch_norm(
        **{"model": net(), "batch": BATCHES[0], **a}
    ),
    "freeze_batch_norm": lambda **a: quant.freeze_batch_norm(**{"model": net(), **a}),
    "use_level_batch_norm": lambda **a: quant.use_level_batch_norm(
        **{"model": net(), "pattern": "1", "levels": 2, **a}
    ),
    "place_on_producers": lambda **a: quant.place_on_producers(**{"model": prepared(), **a}),
    "prepare_qat": lambda **a: quant.prepare_qat(**{"model": net(), "config": "w8a8", **a}),
    "plan_qat": lambda **a: quant.plan_qat(**{"model": net(), "config": "w8a8", **a}),
    "parameter_groups": lambda **a: quant.parameter_groups(
        **{"model": prepared(), "weight_decay": 0.1, **a}
    ),
    "quantizer_parameters": lambda **a: quant.quantizer_parameters(**a),
    "float_state_dict": lambda **a: quant.float_state_dict(**a),
    "load_float_state_dict": lambda **a: quant.load_float_state_dict(
        **{"model": prepared(), "state_dict": {}, **a}
    ),
    "detection_network": lambda **a: quant.detection_network(**a),
    "QATConfig": lambda **a: QATConfig(**a),
    "Rule": lambda **a: Rule(**{"pattern": "*", **a}),
    "Distillation": lambda **a: tuning.Distillation(
        **{"student": calibrated(), "teacher": net().eval(), "features": "0", **a}
    ),
}

_PASSES = ("calibrate", "reestimate_batch_norm", "correct_bias", "calibrate_scores")
_ALL = (*_PASSES, "learn_rounding", "sensitivity", "quantize")
WRONG: list[tuple[str, str, list[Any]]] = [
    *((name, "model", NO_MODEL) for name in (*_ALL, "summary", "fold_batch_norm")),
    *((name, "model", NO_MODEL) for name in ("freeze_batch_norm", "use_level_batch_norm")),
    *((name, "model", NO_MODEL) for name in ("place_on_producers", "prepare_qat", "plan_qat")),
    *((name, "model", NO_MODEL) for name in ("parameter_groups", "quantizer_parameters")),
    *((name, "model", NO_MODEL) for name in ("float_state_dict", "load_float_state_dict")),
    ("detection_network", "model", NO_MODEL),
    *((name, "batches", NO_BATCHES) for name in _ALL),
    *((name, "forward", NO_FUNCTION) for name in (*_ALL, "summary", "fold_batch_norm")),
    *((name, "steps", NO_COUNT) for name in (*_PASSES, "learn_rounding")),
    *(
        (name, "float_model", [3, "model", nn.Conv2d])
        for name in ("reestimate_batch_norm", "correct_bias", "calibrate_scores", "learn_rounding")
    ),
    ("learn_rounding", "batch_size", NO_COUNT),
    ("learn_rounding", "seed", [1.5, "0"]),
    ("learn_rounding", "drop", [2, -0.1, "0", None]),
    *(("learn_rounding", name, NO_RATE) for name in ("rate", "tune", "cache_mb")),
    ("learn_rounding", "report", NO_FUNCTION),
    ("sensitivity", "metric", NO_FUNCTION),
    ("quantize", "correct", NO_FLAG),
    ("quantize", "learn", ["yes", 1, None]),
    ("use_level_batch_norm", "levels", NO_COUNT),
    ("use_level_batch_norm", "pattern", [None, *NO_NAMES]),
    ("freeze_batch_norm", "affine", NO_FLAG),
    ("place_on_producers", "skip", [None, *NO_NAMES]),
    ("place_on_producers", "absorb_relu", NO_FLAG),
    *((name, edge, NO_NAMES) for name in ("prepare_qat", "plan_qat") for edge in EDGES),
    ("prepare_qat", "foreach", NO_FLAG),
    ("prepare_qat", "config", [None, 4, "w3a3", {"weight_bits": 4}]),
    *(("parameter_groups", name, NO_RATE) for name in ("weight_decay", "scale_weight_decay")),
    ("load_float_state_dict", "state_dict", [None, 3, "file.pt"]),
    *(("QATConfig", name, NO_BITS) for name in ("weight_bits", "act_bits", "edge_bits")),
    *(("QATConfig", name, NO_FLAG) for name in ("per_channel", "foreach")),
    *(("QATConfig", name, NO_NAMES) for name in EDGES),
    ("QATConfig", "overrides", [None, 3, ["*"], Rule("*")]),
    *(("QATConfig", n, ["x", 3, ["lsq"]]) for n in ("weight_quantizer", "act_init", "batch_norm")),
    ("QATConfig", "weight_options", [3, "grad_scale", ["grad_scale"]]),
    ("Rule", "pattern", ["", 3, ["a", "b"]]),
    ("Rule", "type", ["Conv3d", nn.Conv2d]),
    ("Rule", "weight_bits", NO_BITS),
    *(("Rule", name, NO_FLAG) for name in ("per_channel", "skip")),
    *(("Distillation", name, NO_MODEL) for name in ("student", "teacher")),
    ("Distillation", "forward", NO_FUNCTION),
    *(("Distillation", name, NO_RATE) for name in ("feature_weight", "prediction_weight")),
]


@pytest.mark.parametrize(
    "function, argument, values", WRONG, ids=lambda x: x if isinstance(x, str) else ""
)
def test_wrong_arguments_are_named(function: str, argument: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises((TypeError, ValueError)) as caught:
            RUNS[function](**{argument: value})
        text = str(caught.value)
        assert text.startswith(f"{argument}:"), f"{value!r}: {text}"
        assert "\n" not in text and "expected" in text, text
