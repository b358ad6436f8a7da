"""The parts of a model whose outputs are reconstructed: blocks, or layers with what follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from hqod_ops.quant.batches import call, evaluating
from hqod_ops.quant.nn import LevelBatchNorm2d
from hqod_ops.quant.nn.layers import QATLayer
from hqod_ops.quant.patterns import Patterns, as_tuple
from hqod_ops.quant.tuning.pairs import Followers, hooked

MOST_LAYERS = 8
"""Quantized layers of a block that is found rather than named, at most."""


@dataclass(frozen=True)
class Part:
    """Modules that are called one after the other, the output of each the input of the next.

    Attributes:
        names (tuple of str): their names: of a block, or of a layer and its batch normalisation.
        layers (tuple of str): the quantized layers in it.
    """

    names: tuple[str, ...]
    layers: tuple[str, ...]

    @property
    def name(self) -> str:
        """That of the block or the layer."""
        return self.names[0]

    def modules(self, model: nn.Module) -> list[nn.Module]:
        """The modules in a model."""
        return [model.get_submodule(name) for name in self.names]


def find_parts(
    model: Any,
    batch: Any,
    forward: Callable[[Any, Any], object] | None,
    blocks: Patterns | None,
) -> list[Part]:
    """The parts of a prepared model, in the order in which they are first called.

    Args:
        model (nn.Module): with quantized layers.
        batch: one batch for it.
        forward (callable, optional): ``forward(model, batch)`` runs it.
        blocks (str or sequence of str, optional): names or globs of modules that are parts; or
            ``"auto"``: the largest modules with 2 to :data:`MOST_LAYERS` layers, a tensor in and a
            tensor out. Layers outside of them are parts of their own, with the batch normalisation
            that reads their output. None: no blocks.

    Raises:
        ValueError: a name or glob fits no module with a quantized layer, a tensor in and out.
    """
    watch = _Calls()
    with (
        torch.no_grad(),
        evaluating(model),
        hooked(dict(model.named_modules()), before=watch.before, after=watch.after),
    ):
        call(model, batch, forward)
    called = {
        name: module
        for name in watch.order
        if isinstance(module := model.get_submodule(name), QATLayer)
    }
    inside = {
        name: tuple(layer for layer in called if layer.startswith(f"{name}."))
        for name, module in model.named_modules()
        if name in watch.plain and name not in called and name
    }
    inside = {name: layers for name, layers in inside.items() if layers}
    parts: dict[str, Part] = {}
    for name in _chosen(inside, blocks):
        part = Part((name,), inside[name])
        parts.update(dict.fromkeys(part.layers, part))
    norms = (nn.modules.batchnorm._BatchNorm, LevelBatchNorm2d)
    for name in called:
        if name not in parts:
            readers = watch.followers.after.get(name, set())
            norm = [r for r in watch.order if r in readers and isinstance(_at(model, r), norms)]
            # Of a batch normalisation and a level within it the outer one is called first.
            parts[name] = Part((name, *norm[:1]), (name,))
    return list(dict.fromkeys(parts[name] for name in called))


def _at(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name)


def _chosen(inside: Mapping[str, tuple[str, ...]], blocks: Patterns | None) -> list[str]:
    """The blocks, none within another."""
    if blocks is None:
        return []
    if blocks == "auto":
        fitting = [name for name, layers in inside.items() if 2 <= len(layers) <= MOST_LAYERS]
    else:
        for pattern in as_tuple(blocks):
            if not any(fnmatchcase(name, pattern) for name in inside):
                raise ValueError(
                    f"blocks: expected a module with quantized layers that takes and returns one "
                    f"tensor, {pattern!r} fits none"
                )
        fitting = [name for name in inside if any(fnmatchcase(name, p) for p in as_tuple(blocks))]
    return [
        name
        for name in fitting
        if not any(name.startswith(f"{other}.") for other in fitting if other != name)
    ]


class _Calls:
    """The modules in the order of their first calls, and those of a tensor in and a tensor out."""

    def __init__(self) -> None:
        self.order: dict[str, None] = {}
        self.plain: set[str] = set()
        self.followers = Followers()

    def before(self, name: str, args: tuple[Any, ...]) -> None:
        self.order[name] = None
        if args:
            self.followers.read(name, args[0])

    def after(self, name: str, args: tuple[Any, ...], output: Any) -> None:
        if len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            self.plain.add(name)
            self.followers.made(name, output)
