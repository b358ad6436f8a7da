"""The file's graph with every quantizer reading what the model's quantizer read."""

from __future__ import annotations

from typing import Any

from hqod_ops.quant.export._extras import require
from hqod_ops.quant.export.lowering import Chain, Lowered

PREFIX = "forced/"


def forced_input(chain: Chain) -> str:
    """The input of the cut graph that a quantizer's consumers depend on."""
    return f"{PREFIX}{chain.grid.label}"


def cut(lowered: Lowered) -> Any:
    """A graph in which rounding differences cannot travel from one quantizer to the next.

    Every quantized activation is there twice. What follows it reads a copy that quantizes a new
    input of the graph (:func:`forced_input`); the original, computed from the layers before as in
    the file, is an output. Nothing else changes, so a runtime may fuse what it fuses in the file.

    Returns:
        onnx_ir.Model: outputs are those of the file, then those quantized activations that are not
        among them.
    """
    ir = require("onnx_ir")
    model = lowered.model.clone()
    graph, copies = model.graph, ir.tape.Tape()
    values = ir.convenience.create_value_mapping(graph)
    for chain in lowered.chains:
        forced = ir.val(forced_input(chain), ir.DataType.FLOAT, [None] * chain.grid.dims)
        graph.inputs.append(forced)
        twins = {chain.source: forced}
        for name in chain.outputs:
            node, twin = values[name].producer(), ir.val(f"{PREFIX}{name}")
            inputs = [twins.get(value.name, value) for value in node.inputs]
            twins[name] = copies.op(
                node.op_type, inputs, node.attributes, name=twin.name, output=twin
            )
        output = values[chain.output]
        for node, index in output.uses():
            node.replace_input_with(index, twins[chain.output])
        if output not in graph.outputs:
            output.dtype = ir.DataType.FLOAT
            graph.outputs.append(output)
    graph.insert_before(graph[0], copies.nodes)
    return model
