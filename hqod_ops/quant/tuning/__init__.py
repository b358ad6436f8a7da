"""What a trained model and unlabelled images can do in few bits."""

from hqod_ops.quant.tuning.batch_norm import reestimate_batch_norm
from hqod_ops.quant.tuning.bias import correct_bias
from hqod_ops.quant.tuning.bits import search_bits
from hqod_ops.quant.tuning.distill import Distillation, channel_wise_loss
from hqod_ops.quant.tuning.post_training import Report, quantize
from hqod_ops.quant.tuning.rounding import learn_rounding
from hqod_ops.quant.tuning.scores import calibrate_scores
from hqod_ops.quant.tuning.sensitivity import LayerSensitivity, Sensitivity, sensitivity

__all__ = [
    "Distillation",
    "LayerSensitivity",
    "Report",
    "Sensitivity",
    "calibrate_scores",
    "channel_wise_loss",
    "correct_bias",
    "learn_rounding",
    "quantize",
    "reestimate_batch_norm",
    "search_bits",
    "sensitivity",
]
