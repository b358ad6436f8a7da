"""Low bits without loss: what a trained model and unlabelled images can do for few bits."""

from hqod_ops.quant.tuning.batch_norm import reestimate_batch_norm

__all__ = ["reestimate_batch_norm"]
