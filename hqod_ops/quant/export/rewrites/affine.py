"""Batch norms go into the scales of weights and into biases, so that nothing parts a convolution
from the QuantizeLinear behind it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from hqod_ops.quant.export.grid import Array, Grid
from hqod_ops.quant.export.lowering import Lowered
from hqod_ops.quant.export.rewrites.edit import (
    attribute,
    constant,
    free_name,
    insert_before,
    only_reader,
    set_constant,
    take_over,
)

CONVOLUTIONS = {"Conv": 0, "ConvTranspose": 1}
"""With the axis of the weight that the output's channels lie on."""


@dataclass(frozen=True)
class Affine:
    """What is done to each channel: ``factor * y + offset``, float64 arrays [C]."""

    factor: Array
    offset: Array

    def then(self, other: Affine) -> Affine:
        """This, then another."""
        return Affine(self.factor * other.factor, self.offset * other.factor + other.offset)


def fold_affine(lowered: Lowered) -> None:
    """Let convolutions of quantized weights do what is done to the channels of their outputs.

    ``factor * (conv(x, (k - z) * s) + bias) + offset`` is
    ``conv(x, (k - z) * (factor * s)) + (factor * bias + offset)``. A scale is positive: where a
    factor is negative, the channel's codes change their sign, and where it is 0, they become 0.
    What does not fit, such as a code -128 that would have to become 128, stays as it is.

    Args:
        lowered (Lowered): changed in place.
    """
    for node in list(lowered.model.graph):
        if node.op_type in CONVOLUTIONS and not node.domain:
            _fold(lowered, node)


def _fold(lowered: Lowered, node: Any) -> None:
    weight, axis = node.inputs[1], CONVOLUTIONS[node.op_type]
    grid = lowered.weights.get(weight.name)
    in_groups = axis == 1 and attribute(node, "group", 1) != 1  # no axis has the output's channels
    if grid is None or grid.codes is None or in_groups:
        return
    channels = grid.codes.shape[axis]
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(channels)
    steps = list(_steps(node.outputs[0], channels, grid.dims))
    if bias is None or not steps:
        return
    total = Affine(np.ones(channels), bias.astype(np.float64))
    for step, _ in steps:
        total = total.then(step)
    scaled = _scaled(grid, axis, total.factor)
    if scaled is None:
        return
    _set_weight(lowered, node, scaled)
    bias_name = f"{grid.label.removesuffix('weight')}bias"
    _set_bias(node, bias_name, total.offset.astype(np.float32))
    take_over(node, steps[-1][1])


def _steps(value: Any, channels: int, dims: int) -> Iterator[tuple[Affine, Any]]:
    """What is done to the channels of a tensor, and the tensors after."""
    while (node := only_reader(value)) is not None:
        found = _batch_norm(node) if node.op_type == "BatchNormalization" else None
        if node.op_type in ("Mul", "Add", "Sub", "Div"):
            found = _arithmetic(node, value, channels, dims)
        if found is None:
            return
        value = node.outputs[0]
        yield found, value


def _batch_norm(node: Any) -> Affine | None:
    values = [constant(value) for value in node.inputs[1:]]
    if any(value is None for value in values) or attribute(node, "training_mode", 0):
        return None
    weight, bias, mean, variance = (np.asarray(value, np.float64) for value in values)
    factor = weight / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
    return Affine(factor, bias - mean * factor)


def _arithmetic(node: Any, value: Any, channels: int, dims: int) -> Affine | None:
    first, second = node.inputs
    known = constant(second if first is value else first)
    if known is None or (first is not value and node.op_type in ("Sub", "Div")):
        return None
    shape = [1] * (dims - known.ndim) + list(known.shape)
    if len(shape) != dims or any(size != 1 for i, size in enumerate(shape) if i != 1):
        return None
    if shape[1] not in (1, channels) or (node.op_type == "Div" and not known.all()):
        return None
    other = np.broadcast_to(known.astype(np.float64).reshape(-1), channels)
    if node.op_type in ("Mul", "Div"):
        return Affine(other if node.op_type == "Mul" else 1 / other, np.zeros(channels))
    return Affine(np.ones(channels), other if node.op_type == "Add" else -other)


def _scaled(grid: Grid, axis: int, factor: Array) -> Grid | None:
    """A weight times a factor a channel; None where codes do not fit."""
    assert grid.codes is not None
    if grid.axis not in (None, axis):
        return None
    along = [1] * grid.dims
    along[axis] = -1
    sign = np.sign(factor).astype(np.int64).reshape(along)
    zero = np.broadcast_to(grid.zero_point, factor.shape)
    codes = zero.reshape(along) + sign * (grid.codes - zero.reshape(along))
    if codes.min() < grid.storage.low or grid.storage.high < codes.max():
        return None
    size = np.where(factor == 0, 1, np.abs(factor))  # a scale of 0 could not be divided by
    return dataclasses.replace(
        grid,
        scale=(grid.scale.astype(np.float64) * size).astype(np.float32),
        zero_point=zero.copy(),
        low=int(codes.min()),
        high=int(codes.max()),
        axis=axis,
        codes=codes,
    )


def _set_weight(lowered: Lowered, node: Any, grid: Grid) -> None:
    """A weight of this convolution's own; others may read the one that it had."""
    assert grid.codes is not None
    graph, old = node.graph, node.inputs[1]
    if len(old.uses()) == 1:
        before = lowered.weights.pop(old.name)
    else:
        before = lowered.weights[old.name]
        number = sum(other.name.startswith(f"{grid.name}.") for other in lowered.weights.values())
        grid = dataclasses.replace(grid, name=f"{grid.name}.{number}")
    assert grid.codes is not None
    kind, codes = grid.storage.numpy_type, old.producer().inputs[0]
    if not np.array_equal(grid.codes, np.asarray(before.codes)):
        codes = set_constant(graph, f"{grid.label}.codes", grid.codes.astype(kind))
    scale = set_constant(graph, f"{grid.label}.scale", grid.scale)
    zero = set_constant(graph, f"{grid.label}.zero_point", grid.zero_point.astype(kind))
    inputs, output = [codes, scale, zero], f"{grid.label}.values"
    values = insert_before(node, "DequantizeLinear", inputs, output, axis=grid.axis)
    node.replace_input_with(1, values)
    lowered.weights[output] = grid


def _set_bias(node: Any, label: str, bias: Array) -> None:
    graph, old = node.graph, node.inputs[2] if len(node.inputs) > 2 else None
    if old is not None and old.name in graph.initializers and len(old.uses()) == 1:
        set_constant(graph, old.name, bias)
        return
    value = set_constant(graph, free_name(graph, label), bias)
    if old is None:
        node.resize_inputs(3)
    node.replace_input_with(2, value)
