"""The quantizers by the names that configurations use, and what fits where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hqod_ops.quant.quantizers.base import Quantizer
from hqod_ops.quant.quantizers.dorefa import DoReFa
from hqod_ops.quant.quantizers.dsq import DSQ
from hqod_ops.quant.quantizers.lsq import LSQ
from hqod_ops.quant.quantizers.lsq_plus import LSQPlus
from hqod_ops.quant.quantizers.minmax import MinMaxSTE
from hqod_ops.quant.quantizers.pact import PACT
from hqod_ops.quant.quantizers.tqt import TQT, TQTFrozen

QUANTIZERS: dict[str, type[Quantizer]] = {
    "lsq": LSQ,
    "lsq_plus": LSQPlus,
    "tqt": TQT,
    "tqt_frozen": TQTFrozen,
    "pact": PACT,
    "dorefa": DoReFa,
    "dsq": DSQ,
    "minmax": MinMaxSTE,
}
"""The quantizers by the names that configurations use; what each is for: its ``roles``."""

_ROLES = {"weight": ("weight", "weights"), "act": ("input", "inputs")}
"""Role of a quantizer, and what it quantizes, by the prefix of a configuration's fields."""


def own_options(name: str) -> dict[str, Any]:
    """The options of a quantizer that not all quantizers have, with their defaults.

    Example:
        >>> own_options("minmax")
        {'symmetric': True}
    """
    common = Quantizer.defaults()
    return {key: value for key, value in QUANTIZERS[name].defaults().items() if key not in common}


def check_quantizer(
    part: str, name: str, options: Mapping[str, Any], per_channel: bool = False
) -> None:
    """Check that a quantizer fits what it is to do.

    Args:
        part (str): ``"weight"`` or ``"act"``.
        name (str): of the quantizer.
        options (mapping): options of its own.
        per_channel (bool): whether it gets a channel axis.

    Raises:
        ValueError: it does not.
    """
    role, plural = _ROLES[part]
    fitting = {key: other for key, other in QUANTIZERS.items() if role in other.roles}
    if name not in fitting:
        raise ValueError(
            f"{part}_quantizer: {name!r} does not quantize {plural}; "
            f"expected one of {', '.join(fitting)}"
        )
    if per_channel and not QUANTIZERS[name].per_channel:
        several = [key for key, other in fitting.items() if other.per_channel]
        raise ValueError(
            f"per_channel: {name!r} has one scale a tensor; expected one of {', '.join(several)}"
        )
    known = own_options(name)
    if part == "act":
        known["signed"] = None
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"{part}_options: {name!r} has no option {unknown[0]!r}; "
            f"its options are {', '.join(known) or 'none'}"
        )


def default_observer(part: str, name: str, image: bool = False) -> str:
    """The observer that a quantizer starts from, unless told otherwise.

    The quantizer's own where it has one, such as a power of two; else ``"minmax"`` for weights and
    ``"ema_mse"`` for inputs, as in the official code.

    Args:
        part (str): ``"weight"`` or ``"act"``.
        name (str): of the quantizer.
        image (bool): whether the layer's input is the network's, for which powers of two are taken
            from the range. Default: False

    Example:
        >>> default_observer("weight", "lsq"), default_observer("act", "tqt_frozen", image=True)
        ('minmax', 'power_of_two_range')
    """
    own: str = QUANTIZERS[name].defaults()["observer"]
    if part == "act" and image and own == "power_of_two":
        return "power_of_two_range"
    return "minmax" if part == "weight" and own == Quantizer.defaults()["observer"] else own


def make_quantizer(
    name: str, bits: int, *, scale_mode: str, options: Mapping[str, Any], **common: Any
) -> Quantizer:
    """A quantizer by name.

    Args:
        name (str), bits (int): which, with how many bits.
        scale_mode (str): for those that have it.
        options (mapping): options of its own; they win over scale_mode.
        **common: options that all quantizers have.
    """
    own = dict(options)
    if "scale_mode" in own_options(name):
        own.setdefault("scale_mode", scale_mode)
    return QUANTIZERS[name](bits, **common, **own)
