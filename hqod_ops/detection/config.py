"""Where settings were in 0.1; now see :mod:`hqod_ops.training`."""

from hqod_ops.moved import moved

__getattr__ = moved(
    __name__,
    "hqod_ops.training.settings",
    "hqod_ops.training.reading",
    "hqod_ops.training",
)
