"""The observers by the names that configurations use."""

from __future__ import annotations

from hqod_ops.quant.observers.base import Observer
from hqod_ops.quant.observers.histogram import MSE, Percentile
from hqod_ops.quant.observers.power_of_two import PowerOfTwo, PowerOfTwoRange
from hqod_ops.quant.observers.ranges import EMAMinMax, LSQInit, MinMax
from hqod_ops.quant.observers.search import EMAMSE

OBSERVERS: dict[str, type[Observer]] = {
    "minmax": MinMax,
    "ema_minmax": EMAMinMax,
    "percentile": Percentile,
    "mse": MSE,
    "ema_mse": EMAMSE,
    "lsq": LSQInit,
    "power_of_two": PowerOfTwo,
    "power_of_two_range": PowerOfTwoRange,
}
"""The observers by the names that configurations use; :class:`Observer` says what each is asked."""


def check_observer(name: str, symmetric: bool = True) -> None:
    """Check that there is an observer of that name, and that it finds what is wanted.

    Args:
        name (str): of the observer.
        symmetric (bool): whether no zero point is wanted. Default: True

    Raises:
        ValueError: there is none, or it finds no zero point.
    """
    if name not in OBSERVERS:
        raise ValueError(f"observer: expected one of {', '.join(OBSERVERS)}, got {name!r}")
    if not symmetric and not OBSERVERS[name].asymmetric:
        able = ", ".join(key for key, kind in OBSERVERS.items() if kind.asymmetric)
        raise ValueError(f"observer: expected one that finds a zero point, {able}, got {name!r}")
