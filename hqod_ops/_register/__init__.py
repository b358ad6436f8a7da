"""The native backend: the twins of :mod:`hqod_ops.reference`, over ``torch.ops.hqod``."""

from hqod_ops._register.fake_quant import fake_quant, fake_quant_foreach
from hqod_ops._register.losses import FUNCTIONS

__all__ = ["fake_quant", "fake_quant_foreach", *FUNCTIONS]

globals().update(FUNCTIONS)
