"""Parameters and state of a QAT model: the scales apart from the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hqod_ops import checks
from hqod_ops.quant.quantizers.base import Quantizer


def quantizer_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all quantizers of a model (its scales), each once.

    Args:
        model (nn.Module): a model from :func:`hqod_ops.quant.prepare_qat`, or a part of one.

    Returns:
        list of nn.Parameter: empty for a float model.
    """
    checks.module("model", model)
    found = {
        id(parameter): parameter
        for module in model.modules()
        if isinstance(module, Quantizer)
        for parameter in module.parameters()
    }
    return list(found.values())


def parameter_groups(
    model: nn.Module, weight_decay: float, scale_weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, with a weight decay of their own for the scales.

    Weight decay pulls a scale towards 0 and so towards more clipping. The official code decays
    scales like weights: ``scale_weight_decay=weight_decay``.

    Args:
        model (nn.Module): a model from :func:`hqod_ops.quant.prepare_qat`.
        weight_decay (float): of all other parameters.
        scale_weight_decay (float): of the scales. Default: 0.0

    Returns:
        list of dict: two groups, ``params`` and ``weight_decay`` in each: the scales last. Frozen
        parameters are left out.

    Raises:
        ValueError: a decay is negative or not finite.
        TypeError: model is no module, or a decay no number.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from hqod_ops.quant import parameter_groups, prepare_qat
        >>> model = prepare_qat(nn.Sequential(nn.Conv2d(3, 8, 3)), "w8a8")
        >>> optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.05), lr=1e-3)
        >>> [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups]
        [(2, 0.05), (2, 0.0)]
    """
    scales = quantizer_parameters(model)
    checks.at_least("weight_decay", weight_decay, 0)
    checks.at_least("scale_weight_decay", scale_weight_decay, 0)
    ids = {id(parameter) for parameter in scales}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    return [
        {"params": others, "weight_decay": weight_decay},
        {
            "params": [parameter for parameter in scales if parameter.requires_grad],
            "weight_decay": scale_weight_decay,
        },
    ]


def _quantizer_prefixes(model: nn.Module) -> tuple[str, ...]:
    checks.module("model", model)
    # A state_dict has the entries of a module under every name that leads to it.
    modules = model.named_modules(remove_duplicate=False)
    return tuple(f"{name}." for name, module in modules if isinstance(module, Quantizer))


def float_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of a QAT model without its quantizers: that of the float model.

    Weights are the trained, unquantized ones.

    Args:
        model (nn.Module): a model from :func:`hqod_ops.quant.prepare_qat`.

    Returns:
        dict of str to Tensor: loads into the float model with ``strict=True``.
    """
    prefixes = _quantizer_prefixes(model)
    return {
        name: value for name, value in model.state_dict().items() if not name.startswith(prefixes)
    }


def load_float_state_dict(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load a float model's state_dict into a QAT model; scales stay as they are.

    Like ``model.load_state_dict(state_dict, strict=False)``, but strict for all keys other than the
    quantizers'. Calibrate afterwards: scales made for other weights do not fit.

    Args:
        model (nn.Module): a model from :func:`hqod_ops.quant.prepare_qat`.
        state_dict (mapping): of the float model.

    Raises:
        ValueError: keys are missing or unknown; it names them.
        RuntimeError: shapes differ.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected a mapping, got {type(state_dict).__name__}")
    prefixes = _quantizer_prefixes(model)
    expected = {name for name in model.state_dict() if not name.startswith(prefixes)}
    missing, unknown = expected - set(state_dict), set(state_dict) - expected
    if missing or unknown:
        raise ValueError(
            f"state_dict: expected the keys of the float model; missing: {_names(missing)}, "
            f"unknown: {_names(unknown)}{_prefix_hint(missing, unknown)}"
        )
    model.load_state_dict(state_dict, strict=False)


def _prefix_hint(missing: set[str], unknown: set[str]) -> str:
    """What to do where the keys have a prefix that a wrapper of the model has put there."""
    for prefix in ("module.", "_orig_mod.", "model."):
        if missing and missing <= {key.removeprefix(prefix) for key in unknown}:
            return (
                f"; they have the prefix {prefix!r} of a wrapper: give "
                f"{{key.removeprefix({prefix!r}): value for key, value in state_dict.items()}}"
            )
    return ""


def _names(keys: set[str], most: int = 6) -> str:
    """Keys as a list, of many the first."""
    listed = sorted(keys)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return f"{listed[:most]}{more}"
