"""The edge layers of a model, which get bits of their own: the first and the prediction layers."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from hqod_ops.quant.adapters import find_adapter
from hqod_ops.quant.config.qat_config import QATConfig
from hqod_ops.quant.patterns import as_tuple

EDGES = ("first", "prediction")


def edge_patterns(
    model: nn.Module, layers: Mapping[str, nn.Module], config: QATConfig
) -> tuple[list[tuple[str, str]], list[str]]:
    """The patterns of the edge layers, those of the configuration or else those of the model.

    Args:
        model (nn.Module): asked for what config does not name.
        layers (mapping of str to nn.Module): the layers that can be quantized, in order.
        config (QATConfig): its first, prediction and bits.

    Returns:
        (list of (str, str), list of str): argument and pattern; of the edge layers that are not
        known what to say, with the layers that they may be.
    """
    if (config.edge("weight"), config.edge("act")) == (config.weight_bits, config.act_bits):
        known: dict[str, tuple[str, ...]] = {edge: () for edge in EDGES}
    else:
        known = known_edges(model, list(layers))
    edges: list[tuple[str, str]] = []
    problems: list[str] = []
    for argument in EDGES:
        patterns = getattr(config, argument)
        if patterns is None:
            patterns = known.get(argument)
        if patterns is None:
            likely = ", ".join(map(repr, _CANDIDATES[argument](layers)))
            problems.append(
                f"{argument}: the layers with {config.edge_bits} bits are not known for a "
                f"{type(model).__name__}; name them, or give () for none"
                + (f" (candidates: {likely})" if likely else "")
            )
            continue
        edges += [(argument, pattern) for pattern in patterns]
    return edges, problems


def _first_candidates(layers: Mapping[str, nn.Module]) -> list[str]:
    """The layer that may take the image: the first of few channels, or else the first."""
    few = [name for name, layer in layers.items() if 1 <= _channels(layer)[0] <= 4]
    return few[:1] or list(layers)[:1]


def _prediction_candidates(layers: Mapping[str, nn.Module], most: int = 8) -> list[str]:
    """The layers whose outputs have a number of channels that no layer takes, and the last one."""
    channels = {name: _channels(layer) for name, layer in layers.items()}
    taken = {count for count, _ in channels.values()}
    found = [name for name, (_, count) in channels.items() if count not in taken]
    last = list(layers)[-1:]
    return list(dict.fromkeys([*found[-most:], *last]))


_CANDIDATES = {"first": _first_candidates, "prediction": _prediction_candidates}


def _channels(layer: Any) -> tuple[int, int]:
    """Channels of input and output; 0 for what is neither a convolution nor a linear layer."""
    for names in (("in_channels", "out_channels"), ("in_features", "out_features")):
        if hasattr(layer, names[0]):
            return getattr(layer, names[0]), getattr(layer, names[1])
    return 0, 0


def known_edges(model: nn.Module, layers: list[str]) -> dict[str, tuple[str, ...]]:
    """The edge layers that a model or a part of it declares, or that its adapter knows.

    A part is asked only where no module around it has answered.

    Args:
        model (nn.Module): declares them by the attributes ``qat_first`` and ``qat_prediction``.
        layers (list of str): names of the layers that can be quantized, in order.

    Returns:
        dict of str to tuple of str: patterns by argument; what is not known is missing.
    """
    known: dict[str, tuple[str, ...]] = {}
    for edge in EDGES:
        answered: list[str] = []
        for name, module in model.named_modules():
            prefix = f"{name}." if name else ""
            if any(prefix.startswith(outer) for outer in answered):
                continue
            patterns = getattr(module, f"qat_{edge}", None)
            if patterns is None and (adapter := find_adapter(module)) is not None:
                inside = [name.removeprefix(prefix) for name in layers if name.startswith(prefix)]
                patterns = getattr(adapter, edge)(module, inside)
            if patterns is not None:
                answered.append(prefix)
                found = (prefix + pattern for pattern in as_tuple(patterns))
                known[edge] = (*known.get(edge, ()), *found)
    return known


def no_such_layer(argument: str, pattern: str, layers: Iterable[str]) -> str:
    """The error for a pattern that fits no layer, with the closest names."""
    inside = [name for name in layers if name.startswith(f"{pattern}.")]
    if inside:
        hint = f"it names a container: did you mean {pattern + '.*'!r}?"
    else:
        close = difflib.get_close_matches(pattern, layers, n=3, cutoff=0.0)
        hint = f"the closest are {', '.join(map(repr, close))}" if close else "the model has none"
    return f"{argument}: no convolution or linear layer fits the pattern {pattern!r}; {hint}"
