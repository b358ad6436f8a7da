"""Placeholders become QuantizeLinear and DequantizeLinear, weights become packed integers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hqod_ops.quant.export._extras import require
from hqod_ops.quant.export.grid import Array, Grid
from hqod_ops.quant.export.trace import DOMAIN, PLACEHOLDER, SITE

MOVED_BEHIND = {"ArgMax", "MaxPool", "Reshape", "Slice", "Squeeze", "Unsqueeze"}
"""ONNX Runtime (1.32) moves a DequantizeLinear behind these, and then has no kernel for them on
types below 8 bits. A Max that changes nothing holds it in its place."""


@dataclass(frozen=True)
class Chain:
    """The nodes of one quantized activation, from the tensor before to the one after."""

    grid: Grid
    source: str
    output: str
    nodes: tuple[Any, ...]


@dataclass
class Lowered:
    """A finished graph.

    Attributes:
        model (onnx.ModelProto): the graph.
        chains (list of Chain): its quantized activations.
        weights (dict of str to Grid): its quantized weights, by the name of their initializer.
    """

    model: Any
    chains: list[Chain] = field(default_factory=list)
    weights: dict[str, Grid] = field(default_factory=dict)


def lower(model: Any, grids: Sequence[Grid]) -> Lowered:
    """Replace the placeholders, in place, and drop what nothing reads any more.

    Args:
        model (onnx.ModelProto): from :func:`hqod_ops.quant.export.trace.trace`.
        grids (sequence of Grid): what the placeholders stand for.
    """
    result = Lowered(model)
    graph = model.graph
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    builder = _Builder(narrow=any(grid.storage.bits < 8 for grid in grids))
    dequantized: dict[int, str] = {}
    renamed: dict[str, str] = {}
    for node in graph.node:
        if (node.domain, node.op_type) != (DOMAIN, PLACEHOLDER):
            builder.nodes.append(node)
            continue
        site = next(attribute.i for attribute in node.attribute if attribute.name == SITE)
        grid, output = grids[site], node.output[0]
        if grid.codes is None:
            source = node.input[0]
            nodes = builder.activation(grid, source, output, readers.get(output, set()))
            result.chains.append(Chain(grid, source, output, nodes))
        elif site in dequantized:
            renamed[output] = dequantized[site]
        else:
            dequantized[site] = output
            result.weights[builder.weight(grid, output)] = grid
    for node in builder.nodes:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    _replace(graph.node, builder.nodes)
    graph.initializer.extend(builder.initializers)
    _strip(model)
    _prune(graph)
    _set_versions(model)
    require("onnx.checker").check_model(model, full_check=True)
    return result


class _Builder:
    def __init__(self, narrow: bool) -> None:
        self._narrow = narrow
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._known: set[str] = set()
        self._helper = require("onnx.helper")
        self._numpy_helper = require("onnx.numpy_helper")

    def activation(
        self, grid: Grid, source: str, output: str, readers: set[str]
    ) -> tuple[Any, ...]:
        """Quantize and dequantize, with the values limited first where the storage is too wide.

        The limits come first, in float: ONNX cannot limit 4-bit integers, and behind they would
        part the DequantizeLinear from the layer that a runtime fuses it with. A limit is the value
        of the outermost code, whose code is that code again.

        In a file with types below 8 bits, the lower limit is always there, and it is a Max, not a
        Clip: ONNX Runtime (1.32) fuses a QuantizeLinear with the layers in front as if all types
        had 8 bits, but then has no kernels for the result. It cannot load a Clip or a MaxPool
        there, nor a convolution of 2-bit weights, and drops a ReLU in front of a signed type.

        Args:
            grid (Grid): of the quantizer.
            source (str), output (str): the tensors before and after.
            readers (set of str): types of the nodes that read the output.
        """
        first = len(self.nodes)
        if grid.activation is not None:
            source = self._limit(source, f"{grid.label}.relu", np.array(0, np.float32), "Max")
        if grid.activation == "relu6":
            source = self._limit(source, f"{grid.label}.relu6", np.array(6, np.float32), "Min")
        below, above = grid.clips
        if below or self._narrow:
            source = self._limit(source, f"{grid.label}.low", _bound(grid, grid.low), "Max")
        if above:
            source = self._limit(source, f"{grid.label}.high", _bound(grid, grid.high), "Min")
        parameters, axis = self._parameters(grid), _axis(grid)
        codes = self._node("QuantizeLinear", [source, *parameters], f"{grid.label}.codes", **axis)
        if grid.storage.bits < 8 and readers & MOVED_BEHIND:
            values = self._node(
                "DequantizeLinear", [codes, *parameters], f"{output}.values", **axis
            )
            low = self._constant(f"{grid.label}.low", _bound(grid, grid.low))
            self._node("Max", [values, low], output)
        else:
            self._node("DequantizeLinear", [codes, *parameters], output, **axis)
        return tuple(self.nodes[first:])

    def weight(self, grid: Grid, output: str) -> str:
        """Packed codes and their DequantizeLinear; returns the name of the codes."""
        assert grid.codes is not None
        codes = self._constant(f"{grid.label}.codes", grid.codes.astype(grid.storage.numpy_type))
        parameters = self._parameters(grid)
        self._node("DequantizeLinear", [codes, *parameters], output, **_axis(grid))
        return codes

    def _parameters(self, grid: Grid) -> list[str]:
        zero_point = grid.zero_point.astype(grid.storage.numpy_type)
        return [
            self._constant(f"{grid.label}.scale", grid.scale),
            self._constant(f"{grid.label}.zero_point", zero_point),
        ]

    def _limit(self, source: str, name: str, bound: Array, kind: str) -> str:
        return self._node(kind, [source, self._constant(name, bound)], f"{name}.{kind.lower()}")

    def _constant(self, name: str, value: Array) -> str:
        if name not in self._known:
            self._known.add(name)
            self.initializers.append(self._numpy_helper.from_array(np.asarray(value), name))
        return name

    def _node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(self._helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output


def _axis(grid: Grid) -> dict[str, int]:
    return {} if grid.axis is None else {"axis": grid.axis}


def _bound(grid: Grid, code: int) -> Array:
    """The value of a code."""
    return grid.dequantize(np.full_like(grid.along(grid.zero_point), code))


def _replace(repeated: Any, values: Iterable[Any]) -> None:
    values = list(values)
    del repeated[:]
    repeated.extend(values)


def _inputs(node: Any) -> Iterator[str]:
    """What a node reads, the graphs inside of it included."""
    yield from node.input
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs]:
            for inner in graph.node:
                yield from _inputs(inner)
            yield from (output.name for output in graph.output)


def _prune(graph: Any) -> None:
    """Drop the nodes and initializers that no output needs."""
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(_inputs(node))
            kept.append(node)
    _replace(graph.node, reversed(kept))
    _replace(graph.initializer, [entry for entry in graph.initializer if entry.name in needed])
    known = needed.union(name for node in kept for name in node.output)
    _replace(graph.value_info, [entry for entry in graph.value_info if entry.name in known])


def _strip(model: Any) -> None:
    """Drop what torch writes about the trace: file paths of this machine, and most of the bytes."""
    graph = model.graph
    tables = (graph.node, graph.initializer, graph.value_info, graph.input, graph.output)
    for entry in [model, graph, *(entry for table in tables for entry in table)]:
        entry.ClearField("metadata_props")
        entry.doc_string = ""


def _set_versions(model: Any) -> None:
    _replace(model.opset_import, [entry for entry in model.opset_import if entry.domain != DOMAIN])
    least = require("onnx.helper").find_min_ir_version_for(model.opset_import, ignore_unknown=True)
    model.ir_version = max(model.ir_version, least)
