"""Placeholders become QuantizeLinear and DequantizeLinear, weights become packed integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hqod_ops.quant.export._extras import require
from hqod_ops.quant.export.evaluate import least_ir_version
from hqod_ops.quant.export.grid import Array, Grid
from hqod_ops.quant.export.targets import Target
from hqod_ops.quant.export.trace import DOMAIN, PLACEHOLDER, SITE

MOVED_BEHIND = {"ArgMax", "MaxPool", "Reshape", "Slice", "Squeeze", "Unsqueeze"}
"""ONNX Runtime (1.32) moves a DequantizeLinear behind these, and then has no kernel for them on
types below 8 bits. A Max that changes nothing holds it in its place."""


@dataclass(frozen=True)
class Chain:
    """One quantized activation, from the tensor before to the one after, by the tensors' names.

    Attributes:
        grid (Grid): of the quantizer.
        source (str): the tensor before.
        outputs (tuple of str): of its nodes, which have the same names, in order.
    """

    grid: Grid
    source: str
    outputs: tuple[str, ...]

    @property
    def output(self) -> str:
        """The tensor after."""
        return self.outputs[-1]


@dataclass
class Lowered:
    """A finished graph.

    Attributes:
        model (onnx_ir.Model): the graph.
        chains (list of Chain): its quantized activations.
        weights (dict of str to Grid): its quantized weights, by the tensor after.
    """

    model: Any
    chains: list[Chain] = field(default_factory=list)
    weights: dict[str, Grid] = field(default_factory=dict)

    @property
    def grids(self) -> list[Grid]:
        """Of weights, then of activations."""
        return [*self.weights.values(), *(chain.grid for chain in self.chains)]


def lower(model: Any, grids: Sequence[Grid], target: Target) -> Lowered:
    """Replace the placeholders, in place.

    Args:
        model (onnx_ir.Model): from :func:`hqod_ops.quant.export.trace.trace`.
        grids (sequence of Grid): what the placeholders stand for.
        target (Target): of the file.
    """
    result = Lowered(model)
    narrow = any(grid.storage.bits < 8 for grid in grids)
    dequantized: dict[int, Any] = {}
    for node in model.graph:
        if (node.domain, node.op_type) != (DOMAIN, PLACEHOLDER):
            continue
        site = node.attributes[SITE].as_int()
        if site in dequantized:
            node.outputs[0].replace_all_uses_with(dequantized[site], replace_graph_outputs=True)
            continue
        replacement = _Replacement(model.graph, node, grids[site])
        if grids[site].codes is None:
            source = node.inputs[0].name
            outputs = replacement.activation(narrow, target.limit_codes)
            result.chains.append(Chain(grids[site], source, tuple(v.name for v in outputs)))
        else:
            dequantized[site] = replacement.weight()
            result.weights[dequantized[site].name] = grids[site]
    return result


def finish(lowered: Lowered) -> None:
    """Drop what nothing reads any more, and check the graph.

    Args:
        lowered (Lowered): changed in place.
    """
    model = lowered.model
    model.ir_version = max(model.ir_version, least_ir_version(model.opset_imports[""]))
    for value in require("onnx_ir.convenience").create_value_mapping(model.graph).values():
        value.metadata_props.clear()  # the pass below leaves those of values
    passes = require("onnx_ir.passes.common")
    for step in (
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.ClearMetadataAndDocStringPass(),  # file paths of this machine, and most of the bytes
        passes.CheckerPass(full_check=True),
    ):
        step(model)


class _Replacement:
    """The nodes that take the place of a placeholder; they are named as their outputs."""

    def __init__(self, graph: Any, placeholder: Any, grid: Grid) -> None:
        self._ir = require("onnx_ir")
        self._graph, self._placeholder, self._grid = graph, placeholder, grid
        self._tape = self._ir.tape.Tape()

    def activation(self, narrow: bool, limit_codes: bool) -> list[Any]:
        """Quantize and dequantize, with what lies outside of the codes limited.

        Where the type alone does not do that, there are two ways. The codes can be limited: a
        QuantizeLinear directly behind a layer is one that runtimes fuse with it, and the
        DequantizeLinear behind the Clip still stands directly in front of the next one. An
        activation function that the quantizer took in is such a limit too.

        Or the values are limited in front, in float, the only way below 8 bits, where ONNX has no
        Clip. A limit is the value of the outermost code, whose code is that code again.

        In a file with types below 8 bits (narrow), the lower limit is always there, and it is a
        Max, not a Clip: ONNX Runtime (1.32) fuses a QuantizeLinear with the layers in front as if
        all types had 8 bits, but then has no kernels for the result. It cannot load a Clip or a
        MaxPool there, nor a convolution of 2-bit weights, and drops a ReLU in front of a signed
        type.
        """
        grid, (source,), (output,) = self._grid, self._placeholder.inputs, self._placeholder.outputs
        codes_limits = grid.code_limits if limit_codes and grid.storage.bits == 8 else None
        if codes_limits is None:
            source = self._limited(source, narrow)
        codes = self._quantized("QuantizeLinear", source, f"{grid.label}.codes")
        if codes_limits is not None and codes_limits != (grid.storage.low, grid.storage.high):
            ends = (
                self._constant(name, np.array(end, grid.storage.numpy_type))
                for name, end in zip(("low", "high"), codes_limits, strict=True)
            )
            codes = self._node("Clip", [codes, *ends], f"{grid.label}.limited")
        if grid.storage.bits < 8 and MOVED_BEHIND & {use.node.op_type for use in output.uses()}:
            values = self._quantized("DequantizeLinear", codes, f"{output.name}.values")
            self._node("Max", [values, self._constant("low", _bound(grid, grid.low))], output.name)
        else:
            self._quantized("DequantizeLinear", codes, output.name)
        return self._finish()

    def _limited(self, source: Any, narrow: bool) -> Any:
        """A tensor whose values have codes in the grid's range."""
        grid = self._grid
        if grid.activation is not None:
            source = self._limit("Max", source, "relu", np.array(0, np.float32))
        if grid.activation == "relu6":
            source = self._limit("Min", source, "relu6", np.array(6, np.float32))
        below, above = grid.clips
        if below or narrow:
            source = self._limit("Max", source, "low", _bound(grid, grid.low))
        if above:
            source = self._limit("Min", source, "high", _bound(grid, grid.high))
        return source

    def weight(self) -> Any:
        """Packed codes and their DequantizeLinear."""
        assert self._grid.codes is not None
        codes = self._constant("codes", self._grid.codes.astype(self._grid.storage.numpy_type))
        self._quantized("DequantizeLinear", codes, self._placeholder.outputs[0].name)
        return self._finish()[-1]

    def _limit(self, kind: str, source: Any, name: str, bound: Array) -> Any:
        output = f"{self._grid.label}.{name}.{kind.lower()}"
        return self._node(kind, [source, self._constant(name, bound)], output)

    def _quantized(self, kind: str, source: Any, output: str) -> Any:
        grid = self._grid
        scale = self._constant("scale", grid.scale)
        zero = self._constant("zero_point", grid.zero_point.astype(grid.storage.numpy_type))
        attributes = {} if grid.axis is None else {"axis": grid.axis}
        return self._node(kind, [source, scale, zero], output, attributes)

    def _constant(self, name: str, value: Array) -> Any:
        name = f"{self._grid.label}.{name}"
        if name not in self._graph.initializers:
            tensor = self._ir.tensor(np.asarray(value), name=name)
            self._graph.register_initializer(self._tape.initializer(tensor))
        return self._graph.initializers[name]

    def _node(self, kind: str, inputs: list[Any], output: str, attributes: Any = None) -> Any:
        value = self._ir.val(output)
        return self._tape.op(kind, inputs, attributes, name=output, output=value)

    def _finish(self) -> list[Any]:
        old, nodes = self._placeholder, self._tape.nodes
        outputs = [node.outputs[0] for node in nodes]
        self._ir.convenience.replace_nodes_and_values(
            self._graph, old, [old], nodes, old.outputs, outputs[-1:]
        )
        return outputs


def _bound(grid: Grid, code: int) -> Array:
    """The value of a code."""
    return grid.dequantize(np.full_like(grid.along(grid.zero_point), code))
