"""The file's graph with every quantizer reading what the model's quantizer read."""

from __future__ import annotations

import copy
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
        onnx.ModelProto: outputs are those of the file, then those quantized activations that are
        not among them.
    """
    helper, float_type = require("onnx.helper"), require("onnx").TensorProto.FLOAT
    model = copy.deepcopy(lowered.model)
    graph = model.graph
    own = {node.name for chain in lowered.chains for node in chain.nodes[1:]}
    copies: list[Any] = []
    renamed: dict[str, str] = {}
    for chain in lowered.chains:
        names = {chain.source: forced_input(chain)}
        for node in chain.nodes:
            twin = copy.deepcopy(node)
            twin.name = f"{PREFIX}{node.name}"
            twin.input[:] = [names.get(name, name) for name in node.input]
            names.update((name, f"{PREFIX}{name}") for name in node.output)
            twin.output[:] = [names[name] for name in node.output]
            copies.append(twin)
        renamed[chain.output] = names[chain.output]
    for node in graph.node:
        if node.name not in own:
            node.input[:] = [renamed.get(name, name) for name in node.input]
    nodes = [*copies, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    known = {output.name for output in graph.output}
    for chain in lowered.chains:
        dims = [None] * chain.grid.dims
        graph.input.append(helper.make_tensor_value_info(forced_input(chain), float_type, dims))
        if chain.output not in known:
            graph.output.append(helper.make_tensor_value_info(chain.output, float_type, dims))
    return model
