"""Modules by what they are for or by name: prediction layers, and those that patterns name."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from hqod_ops.quant.config.edge_layers import known_edges
from hqod_ops.quant.nn.twins import TWINS
from hqod_ops.quant.patterns import Patterns, as_tuple


def prediction_layers(model: nn.Module) -> list[str]:
    """The names of the prediction layers that a model declares, or that are known of its class."""
    names = [name for name, module in model.named_modules() if isinstance(module, tuple(TWINS))]
    patterns = known_edges(model, names).get("prediction") or ()
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def select(argument: str, model: nn.Module, patterns: Patterns) -> list[str]:
    """The names of the modules that names or globs fit.

    Raises:
        ValueError: one fits none.
    """
    found: list[str] = []
    known = [name for name, _ in model.named_modules() if name]
    for pattern in as_tuple(patterns):
        fitting = [name for name in known if fnmatchcase(name, pattern)]
        if not fitting:
            raise ValueError(f"{argument}: no module fits {pattern!r}")
        found += fitting
    return list(dict.fromkeys(found))
