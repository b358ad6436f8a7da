"""Which layers have a twin, and how they become it."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from hqod_ops.quant.nn.attention import (
    PROJECTIONS,
    Projection,
    QATMultiheadAttention,
    QATProjection,
)
from hqod_ops.quant.nn.layers import (
    QATConv2d,
    QATConvTranspose2d,
    QATLayer,
    QATLinear,
    become,
    float_class,
)
from hqod_ops.quant.nn.subclass import problem, subclass_twin
from hqod_ops.quant.quantizers.base import Quantizer

TWINS: dict[type[nn.Module], type[QATLayer]] = {
    twin.float_type: twin for twin in (QATConv2d, QATConvTranspose2d, QATLinear)
}
"""The twin of every float class that has one."""

_LAYERS: Any = tuple(TWINS)


def layer_kind(layer: nn.Module) -> type[nn.Module]:
    """The class of :data:`TWINS` that a layer is of, or stands for."""
    if isinstance(layer, Projection):
        return nn.Linear
    return next(kind for kind in TWINS if isinstance(layer, kind))


def twin_class(layer: nn.Module) -> type[QATLayer]:
    """The twin of a layer of :func:`find_layers`."""
    if isinstance(layer, Projection):
        return QATProjection
    kind = float_class(layer)
    return TWINS[kind] if kind in TWINS else subclass_twin(kind, TWINS[layer_kind(layer)])


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a float model that have a twin, by name; those that lack one are warned of.

    Layers of fixed whole numbers, which compute a formula, are left out.

    Raises:
        ValueError: the model is prepared already.
    """
    layers: dict[str, nn.Module] = {}
    odd: list[str] = []
    within: set[nn.Module] = set()  # attention that is left alone
    for name, module in model.named_modules():
        if isinstance(module, (QATLayer, Quantizer)):
            raise ValueError(
                "model: expected a float model, "
                f"{name or type(module).__name__!r} is prepared already"
            )
        kind = float_class(module)
        if isinstance(module, nn.MultiheadAttention):
            if kind is nn.MultiheadAttention:
                parts = {p: Projection(module, p) for p in PROJECTIONS}
                layers |= {f"{name}.in_proj_{p}".lstrip("."): made for p, made in parts.items()}
            else:
                odd.append(f"{name} ({kind.__name__}): it is a subclass of MultiheadAttention")
                within.add(module.out_proj)
        elif kind in TWINS:
            if not _is_constant(module):
                layers[name] = module
        elif isinstance(module, _LAYERS) and module not in within:
            why = problem(module, layer_kind(module))
            if why is None:
                layers[name] = module
            else:
                odd.append(f"{name} ({kind.__name__}): {why}")
    if odd:
        warnings.warn("layers of a subclass stay in float: " + "; ".join(odd), stacklevel=4)
    return layers


def _is_constant(layer: nn.Module) -> bool:
    """Whether a layer is a formula that is written as one, such as the sum over the bins of a box
    distribution (weights 0, 1, 2...): fixed whole numbers."""
    weight: Any = layer._parameters.get("weight")
    if weight is None or any(p.requires_grad for p in layer.parameters()) or weight.is_meta:
        return False
    return bool((weight == weight.round()).all())


def attach_attention(layers: dict[str, nn.Module]) -> None:
    """Let attention call its projections, where one of them is quantized.

    Args:
        layers (dict of str to nn.Module): of :func:`find_layers`, with their quantizers.
    """
    parts = [layer for layer in layers.values() if isinstance(layer, Projection)]
    quantized = {
        part.owner
        for part in parts
        if isinstance(part, QATLayer) or isinstance(part.owner.out_proj, QATLayer)
    }
    for part in parts:
        if part.owner in quantized:
            if not isinstance(part.owner, QATMultiheadAttention):
                become(part.owner, QATMultiheadAttention)
            part.owner.add_module(f"in_proj_{part.part}", part)


def without_fast_path(model: nn.Module) -> None:
    """Let torch's transformers call their layers also where nothing needs a gradient."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        elif isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
