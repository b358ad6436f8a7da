"""Reading and changing a graph."""

from __future__ import annotations

from typing import Any

import numpy as np

from hqod_ops.quant.export._extras import require
from hqod_ops.quant.export.grid import Array


def constant(value: Any) -> Array | None:
    """The array of a tensor that is the same on every run; None of another."""
    found = require("onnx_ir.convenience").get_const_tensor(value)
    return None if found is None else np.asarray(found.numpy())


def attribute(node: Any, name: str, default: Any) -> Any:
    """The value of an attribute of a node."""
    return node.attributes[name].value if name in node.attributes else default


def only_reader(value: Any) -> Any:
    """The node that alone reads a tensor; None if there are more, or it leaves the graph."""
    uses = value.uses()
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def set_constant(graph: Any, name: str, array: Array) -> Any:
    """A constant of this name, which may have had another value."""
    ir = require("onnx_ir")
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = graph.initializers.get(name)
    if value is None:
        value = ir.Value(name=name)
        value.const_value = tensor
        graph.register_initializer(value)
    value.const_value, value.shape, value.dtype = tensor, tensor.shape, tensor.dtype
    return value


def free_name(graph: Any, name: str) -> str:
    """A name for a constant that no constant has yet."""
    taken, number, free = graph.initializers, 0, name
    while free in taken:
        number, free = number + 1, f"{name}.{number}"
    return free


def insert_before(place: Any, kind: str, inputs: list[Any], output: str, **attributes: Any) -> Any:
    """The output of a new node in front of another."""
    ir = require("onnx_ir")
    tape = ir.tape.Tape()
    value = tape.op(kind, inputs, attributes or None, name=output, output=ir.val(output))
    place.graph.insert_before(place, tape.nodes)
    return value


def take_over(node: Any, last: Any) -> None:
    """Let the output of a node stand for a tensor that was computed from it, under its name."""
    output, name = node.outputs[0], last.name
    output.shape, output.dtype = last.shape, last.dtype
    last.name = f"{name}.before"
    last.replace_all_uses_with(output, replace_graph_outputs=True)
    output.name = name
