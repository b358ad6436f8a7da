"""Where training runs were in 0.1; now see :mod:`hqod_ops.training`."""

from hqod_ops.moved import moved

__getattr__ = moved(
    __name__,
    "hqod_ops.training.run",
    "hqod_ops.training.build",
    "hqod_ops.training.data",
    "hqod_ops.training.evaluate",
    "hqod_ops.training.files",
    "hqod_ops.training.reading",
)
