"""From a QAT model to an ONNX graph in which every quantizer is one placeholder node."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hqod_ops.quant.export._extras import require
from hqod_ops.quant.export.evaluate import first_line
from hqod_ops.quant.export.grid import BASE_OPSET, Grid
from hqod_ops.quant.export.inventory import Inventory

DOMAIN = "hqod"
PLACEHOLDER = "FakeQuant"
SITE = "site"


def trace(
    inventory: Inventory,
    example: tuple[Any, ...],
    grids: Sequence[Grid],
    *,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Any:
    """Trace a model; its quantizers are replaced in place, so give a copy's.

    Args:
        inventory (Inventory): of a model that is calibrated, in eval mode, on the CPU.
        example (tuple): its positional arguments.
        grids (sequence of Grid): of all its quantizers; a placeholder has the place of its one in
            the attribute ``site``.
        dynamic_shapes (optional): see ``torch.export.export``. Default: None, all fixed
        input_names (sequence of str, optional), output_names (sequence of str, optional): in the
            file. Default: None, torch's

    Returns:
        onnx_ir.Model: the graph with placeholders, in the lowest opset with the grids' types.

    Raises:
        RuntimeError: torch cannot export the model.
    """
    model = inventory.model
    _replace(inventory, grids)
    needed = max([BASE_OPSET, *(grid.storage.opset for grid in grids)])
    model.register_forward_pre_hook(lambda _module, _args: inventory.begin(), prepend=True)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # Deprecations inside of torch and onnxscript, which the caller cannot change.
            warnings.simplefilter("ignore", category=DeprecationWarning)
            warnings.simplefilter("ignore", category=FutureWarning)
            program = torch.export.export(
                model, example, dynamic_shapes=dynamic_shapes, strict=False
            )
            exported = torch.onnx.export(
                program,
                example,
                dynamo=True,
                opset_version=needed,
                input_names=input_names,
                output_names=output_names,
                verbose=False,
            )
    except Exception as error:
        raise RuntimeError(
            f"model: torch cannot export {type(model).__name__} to ONNX: {first_line(error)}"
        ) from error
    assert exported is not None
    if exported.model.opset_imports[""] == needed:
        return exported.model
    converter = require("onnx.version_converter")
    return require("onnx_ir").from_proto(converter.convert_version(exported.model_proto, needed))


def _replace(inventory: Inventory, grids: Sequence[Grid]) -> None:
    """Let the quantizers emit placeholders."""
    sites = {grid.name: index for index, grid in enumerate(grids)}

    def placeholder(name: str, x: Tensor) -> Tensor:
        if name not in sites:
            raise RuntimeError(f"{name}: not called when the model ran on the example")
        y: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{PLACEHOLDER}",
            (x,),
            {SITE: sites[name]},
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )
        return y

    def quantize(name: str, x: Tensor) -> Tensor:
        return placeholder(inventory.next_call(name)[0], x)

    for name, quantizer in inventory.activations.items():
        quantizer.forward = functools.partial(quantize, name)  # type: ignore[method-assign]
    for name, (layer, quantizer) in inventory.weights.items():
        quantizer.enabled = False  # where all weights are quantized together, not here
        # A part of a weight has a graph to the whole, which torch.export would mention.
        weight = layer.weight if isinstance(layer.weight, nn.Parameter) else layer.weight.detach()
        layer.quantized_weight = functools.partial(  # type: ignore[method-assign]
            placeholder, name, weight
        )
