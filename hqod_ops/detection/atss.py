"""Where the detector was in 0.1; now see :mod:`hqod_ops.detection.models.atss`."""

from hqod_ops.moved import moved

__getattr__ = moved(__name__, "hqod_ops.detection.models.atss")
