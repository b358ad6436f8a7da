"""From the names of quantizers to their objects, and what fits where."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from hqod_ops.quant.quantizers.base import Quantizer
from hqod_ops.quant.quantizers.registry import QUANTIZERS

_ROLES = {"weight": ("weight", "weights"), "act": ("input", "inputs")}
"""Role of a quantizer, and what it quantizes, by the prefix of a configuration's fields."""
_COMMON = frozenset(inspect.signature(Quantizer.__init__).parameters)


def own_options(name: str) -> list[str]:
    """The arguments of a quantizer that not all quantizers have.

    Example:
        >>> own_options("lsq")
        ['scale_mode', 'grad_scale']
    """
    parameters = inspect.signature(QUANTIZERS[name].__init__).parameters
    return [key for key in parameters if key not in _COMMON]


def check_quantizer(
    kind: str, name: str, options: Mapping[str, Any], per_channel: bool = False
) -> None:
    """Check that a quantizer fits what it is to do.

    Args:
        kind (str): ``"weight"`` or ``"act"``.
        name (str): of the quantizer.
        options (mapping): further arguments of it.
        per_channel (bool): whether it gets a channel axis.

    Raises:
        ValueError: it does not.
    """
    role, plural = _ROLES[kind]
    fitting = {key: other for key, other in QUANTIZERS.items() if role in other.roles}
    if name not in fitting:
        raise ValueError(
            f"{kind}_quantizer: {name!r} does not quantize {plural}; "
            f"expected one of {', '.join(fitting)}"
        )
    if per_channel and not QUANTIZERS[name].per_channel:
        several = [key for key, other in fitting.items() if other.per_channel]
        raise ValueError(
            f"per_channel: {name!r} has one scale a tensor; expected one of {', '.join(several)}"
        )
    unknown = sorted(set(options) - set(own_options(name)))
    if unknown:
        known = ", ".join(own_options(name)) or "none"
        raise ValueError(
            f"{kind}_options: {name!r} has no option {unknown[0]!r}; its options are {known}"
        )


def default_init(kind: str, name: str, image: bool = False) -> str:
    """The observer that a quantizer starts from, unless told otherwise.

    The quantizer's own where it has one, such as a power of two; else ``"minmax"`` for weights and
    ``"ema_mse"`` for inputs, as in the official code.

    Args:
        kind (str): ``"weight"`` or ``"act"``.
        name (str): of the quantizer.
        image (bool): whether the layer's input is the network's, for which powers of two are taken
            from the range. Default: False

    Example:
        >>> default_init("weight", "lsq"), default_init("act", "tqt_frozen", image=True)
        ('minmax', 'power_of_two_range')
    """
    own: str = inspect.signature(QUANTIZERS[name].__init__).parameters["observer"].default
    if kind == "act" and image and own == "power_of_two":
        return "power_of_two_range"
    common = inspect.signature(Quantizer.__init__).parameters["observer"].default
    return "minmax" if kind == "weight" and own == common else own


def make_quantizer(
    name: str, bits: int, *, scale_mode: str, options: Mapping[str, Any], **common: Any
) -> Quantizer:
    """A quantizer by name.

    Args:
        name (str), bits (int): which, with how many bits.
        scale_mode (str): for those that have it.
        options (mapping): its own arguments; they win over scale_mode.
        **common: arguments that all quantizers have.
    """
    arguments = dict(options)
    if "scale_mode" in own_options(name):
        arguments.setdefault("scale_mode", scale_mode)
    return QUANTIZERS[name](bits, **common, **arguments)
