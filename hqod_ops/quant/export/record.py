"""What the quantizers of a model do on an example, and their grids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hqod_ops.quant.export.grid import Array, Grid, read_grid, usable_storages
from hqod_ops.quant.export.inventory import Inventory
from hqod_ops.quant.export.targets import Target
from hqod_ops.quant.nn.upstream import tag
from hqod_ops.quant.quantizers.base import Quantizer


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
def record(inventory: Inventory, example: tuple[Any, ...]) -> Recording:
    """Run a model and keep what goes into and out of its activation quantizers.

    Raises:
        RuntimeError: a layer's input has not passed the quantizer that was placed for it.
    """
    result = Recording()

    def keep(name: str, quantizer: Quantizer) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            label, level = inventory.next_call(name)
            result.calls[label] = quantizer, level
            # Copies: layers that work in place may overwrite both.
            result.before[label] = args[0].numpy().copy()
            result.after[label] = output.numpy().copy()
            tag(quantizer, output)

        return hook

    def verify(layer: Any, args: tuple[Tensor, ...]) -> None:
        if layer.upstream and layer.input_quantizer in inventory.activations.values():
            layer.upstream.verify(args[0])

    handles = [q.register_forward_hook(keep(name, q)) for name, q in inventory.activations.items()]
    handles += [layer.register_forward_pre_hook(verify) for layer in inventory.layers]
    try:
        inventory.begin()
        outputs = inventory.model(*example)
    finally:
        for handle in handles:
            handle.remove()
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    result.outputs = [leaf.numpy().copy() for leaf in leaves]
    return result


def read_grids(
    inventory: Inventory,
    recording: Recording,
    target: Target,
    opset: int,
    *,
    unsigned_weights: bool = False,
) -> list[Grid]:
    """The grids of a model's weights, and of its activations on the example.

    Args:
        inventory (Inventory): of the model, on the CPU.
        recording (Recording): of the model.
        target (Target): of the file.
        opset (int): the highest that may be used.
        unsigned_weights (bool): codes of weights in uint8, not int8. Default: False

    Raises:
        ValueError: ONNX cannot express a quantizer, or the target does not know it.
    """
    storages = usable_storages(target, opset)
    grids = []
    for name, (quantizer, level) in recording.calls.items():
        grid = read_grid(name, quantizer, level, recording.before[name].ndim, storages)
        grids.append(grid.unsigned() if target.unsigned_activations else grid)
    for name, (layer, quantizer) in inventory.weights.items():
        weight = layer.weight.detach()
        grid = read_grid(name, quantizer, 0, weight.dim(), storages, weight)
        if target.spread_weights:
            grid = grid.spread()
        grids.append(grid.unsigned() if unsigned_weights and grid.storage.bits == 8 else grid)
    return [grid.symmetric(target.name) for grid in grids] if target.symmetric else grids
