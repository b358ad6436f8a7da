"""ONNX's QuantizeLinear and DequantizeLinear, at 2 to 16 bits: the values of ``fake_quant``.

The node cases are those that the onnx package makes; its reference evaluator and ONNX Runtime say
what a graph computes.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from hqod_ops import fake_quant

onnx: Any = pytest.importorskip("onnx")
pytest.importorskip("onnx.reference")
ort: Any = pytest.importorskip("onnxruntime")

OPSET = {2: 25, 4: 21, 8: 19, 16: 21}
"""By bits, where the types come in; before 19 the reference evaluator knows no DequantizeLinear."""
TYPES = [f"{sign}INT{bits}" for bits in OPSET for sign in ("", "U")]


def limits(kind: str) -> tuple[int, int]:
    bits = int(kind.rpartition("INT")[2])
    return (0, 2**bits - 1) if kind.startswith("U") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def graph(kind: str, zero: np.ndarray, scale: np.ndarray, axis: int, shape: tuple[int, ...]) -> Any:
    """x through QuantizeLinear and DequantizeLinear."""
    helper, number = onnx.helper, getattr(onnx.TensorProto, kind)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=axis),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=axis),
    ]
    x, y = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("x", "y")
    )
    constants = [
        helper.make_tensor("s", onnx.TensorProto.FLOAT, scale.shape, scale.ravel()),
        helper.make_tensor("z", number, zero.shape, zero.ravel()),
    ]
    opset = OPSET[int(kind.rpartition("INT")[2])]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], constants),
        opset_imports=[helper.make_opsetid("", opset)],
    )
    model.ir_version = min(model.ir_version, 13 if opset == 25 else 10)
    return model


def runtime(model: Any, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    # Optimizations might leave the pair out.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its own types, by version
        pytest.skip(f"ONNX Runtime {ort.__version__}: {str(error).splitlines()[0][:100]}")
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("evaluator", ["reference", "runtime"])
def test_types(kind: str, axis: int | None, evaluator: str) -> None:
    if not hasattr(onnx.TensorProto, kind):
        pytest.skip(f"onnx {onnx.__version__} has no {kind}")
    low, high = limits(kind)
    rng = np.random.default_rng(0)
    shape = (6, 5, 7)
    count = () if axis is None else (shape[axis],)
    scale = rng.uniform(0.01, 0.1, count).astype(np.float32)
    zero = rng.integers(low, high + 1, count)
    codes = rng.uniform(low - 3.0, high + 3.0, shape)
    codes[::2] = np.round(codes[::2] * 2) / 2  # half of them on ties between two codes or on one
    along = [1] * len(shape)
    if axis is not None:
        along[axis] = -1
    x = ((codes - zero.reshape(along)) * scale.reshape(along)).astype(np.float32)
    model = graph(kind, np.asarray(zero), np.asarray(scale), axis or 0, shape)
    if evaluator == "reference":
        expected = onnx.reference.ReferenceEvaluator(model).run(None, {"x": x})[0]
    else:
        expected = runtime(model, x)
    found = fake_quant(
        torch.from_numpy(x),
        torch.from_numpy(np.atleast_1d(scale)),
        torch.from_numpy(np.atleast_1d(zero)),
        quant_min=low,
        quant_max=high,
        ch_axis=axis,
    )
    np.testing.assert_array_equal(found.numpy(), expected)


def node_cases() -> list[Any]:
    """What onnx's package says a QuantizeLinear gives: integers, one scale or one for a channel."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("onnx.backend.test.case.node")
        cases = module.collect_testcases("QuantizeLinear")
    return [case for case in cases if case.name.startswith("test_quantizelinear")]


def array(value: Any) -> np.ndarray:
    """Of NumPy, or of a TensorProto where NumPy has no such type."""
    proto = isinstance(value, onnx.TensorProto)
    return np.asarray(onnx.numpy_helper.to_array(value) if proto else value)


@pytest.mark.parametrize("case", node_cases(), ids=lambda case: case.name)
def test_node_cases(case: Any) -> None:
    (node,) = case.model.graph.node
    options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    kind = case.model.graph.output[0].type.tensor_type.elem_type
    name = onnx.TensorProto.DataType.Name(kind)
    for pair in case.data_sets:
        inputs, outputs = (list(map(array, values)) for values in pair)
        x, scale = inputs[:2]
        if "INT" not in name or options.get("block_size") or x.dtype != np.float32:
            pytest.skip(f"{name}, {options}: no case of fake_quant")
        low, high = limits(name)
        zero = inputs[2] if len(inputs) > 2 else np.zeros(scale.shape)
        axis = options.get("axis", 1) if scale.ndim else None
        found = fake_quant(
            torch.from_numpy(x.copy()),
            torch.from_numpy(np.atleast_1d(scale).copy()),
            torch.from_numpy(np.atleast_1d(zero).astype(np.int64)),
            quant_min=low,
            quant_max=high,
            ch_axis=axis,
        )
        along = [1] * x.ndim
        if axis is not None:
            along[axis] = -1
        codes = outputs[0].astype(np.float32) - zero.astype(np.float32).reshape(along)
        np.testing.assert_array_equal(found.numpy(), codes * scale.reshape(along))
