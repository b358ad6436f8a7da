"""The quantizers of a model, their grids, and what they do on an example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hqod_ops.quant.export.grid import Array, Grid, read_grid
from hqod_ops.quant.nn.layers import QATLayer
from hqod_ops.quant.nn.upstream import tag
from hqod_ops.quant.quantizers.base import Quantizer
from hqod_ops.quant.quantizers.calls import reset_levels


def quantizers(model: nn.Module) -> tuple[dict[str, Quantizer], dict[str, QATLayer]]:
    """The quantizers that are on, those of weights apart, as the layers that have them.

    Returns:
        tuple: the others by name, and the layers with a quantized weight by its quantizer's name.
    """
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, QATLayer)
    }
    weights = {
        f"{name}.weight_quantizer".lstrip("."): layer
        for name, layer in layers.items()
        if layer.weight_quantizer is not None and layer.weight_quantizer.enabled
    }
    of_weights = {id(layer.weight_quantizer) for layer in layers.values()}
    others = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Quantizer) and id(module) not in of_weights and module.enabled
    }
    return others, weights


def call_name(name: str, quantizer: Quantizer, call: int) -> str:
    """The name of a quantizer's call: its own one where it has one level."""
    return name if quantizer.levels == 1 and call == 0 else f"{name}.{call}"


@dataclass
class Recording:
    """What a model computed on the example.

    Attributes:
        calls (dict of str to (Quantizer, int)): quantizer and level of every quantized activation.
        before (dict of str to array), after (dict of str to array): its values.
        outputs (list of array): all tensors that the model returned.
    """

    calls: dict[str, tuple[Quantizer, int]] = field(default_factory=dict)
    before: dict[str, Array] = field(default_factory=dict)
    after: dict[str, Array] = field(default_factory=dict)
    outputs: list[Array] = field(default_factory=list)


@torch.no_grad()
def record(model: nn.Module, example: tuple[Any, ...]) -> Recording:
    """Run a model and keep what goes into and out of its activation quantizers.

    Raises:
        RuntimeError: a layer's input has not passed the quantizer that was placed for it.
    """
    result = Recording()
    calls: dict[str, int] = {}

    def keep(name: str, quantizer: Quantizer) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            call = calls[name] = calls.get(name, -1) + 1
            label = call_name(name, quantizer, call)
            result.calls[label] = quantizer, call if quantizer.levels > 1 else 0
            # Copies: layers that work in place may overwrite both.
            result.before[label] = args[0].numpy().copy()
            result.after[label] = output.numpy().copy()
            tag(quantizer, output)

        return hook

    def verify(layer: Any, args: tuple[Tensor, ...]) -> None:
        if layer.upstream is not None and layer.input_quantizer in others.values():
            layer.upstream.verify(args[0])

    others, _ = quantizers(model)
    handles = [q.register_forward_hook(keep(name, q)) for name, q in others.items()]
    layers = [module for module in model.modules() if isinstance(module, QATLayer)]
    handles += [layer.register_forward_pre_hook(verify) for layer in layers]
    try:
        reset_levels(model)
        outputs = model(*example)
    finally:
        for handle in handles:
            handle.remove()
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    result.outputs = [leaf.numpy().copy() for leaf in leaves]
    return result


def read_grids(
    model: nn.Module, recording: Recording, opset: int, *, unsigned_weights: bool = False
) -> list[Grid]:
    """The grids of a model's weights, and of its activations on the example.

    Args:
        model (nn.Module): on the CPU.
        recording (Recording): of the model.
        opset (int): the highest that may be used.
        unsigned_weights (bool): codes of weights in uint8, not int8. Default: False

    Raises:
        ValueError: ONNX cannot express a quantizer.
    """
    grids = [
        read_grid(name, quantizer, level, recording.before[name].ndim, opset)
        for name, (quantizer, level) in recording.calls.items()
    ]
    for name, layer in quantizers(model)[1].items():
        assert layer.weight_quantizer is not None
        weight = layer.weight.detach()
        grid = read_grid(name, layer.weight_quantizer, 0, weight.dim(), opset, weight)
        grids.append(grid.unsigned() if unsigned_weights else grid)
    return grids
