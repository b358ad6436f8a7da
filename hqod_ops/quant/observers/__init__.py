"""Observers: they look at data and say with which scale (and zero point) to start."""

from hqod_ops.quant.observers.base import (
    MAX_BITS,
    MIN_BITS,
    Observer,
    affine_for_range,
    check_bits,
    code_range,
    gather,
    scale_for_range,
)
from hqod_ops.quant.observers.histogram import MSE, Percentile
from hqod_ops.quant.observers.power_of_two import PowerOfTwo, PowerOfTwoRange
from hqod_ops.quant.observers.ranges import EMAMinMax, LSQInit, MinMax
from hqod_ops.quant.observers.registry import OBSERVERS
from hqod_ops.quant.observers.search import EMAMSE

__all__ = [
    "EMAMSE",
    "MAX_BITS",
    "MIN_BITS",
    "MSE",
    "OBSERVERS",
    "EMAMinMax",
    "LSQInit",
    "MinMax",
    "Observer",
    "Percentile",
    "PowerOfTwo",
    "PowerOfTwoRange",
    "affine_for_range",
    "check_bits",
    "code_range",
    "gather",
    "scale_for_range",
]
