"""Runs an ONNX model: by ONNX Runtime, or by ONNX's own reference evaluator."""

from __future__ import annotations

import functools
from typing import Any, Protocol

import numpy as np
import torch

from hqod_ops.quant.export._extras import require
from hqod_ops.quant.export.grid import BASE_OPSET, STORAGES, Array

Feeds = dict[str, Array]

EXACT_SUMS = "session.x64quantprecision"
"""The entry of ONNX Runtime's session configuration that keeps its kernels for uint8 activations
and int8 weights from overflowing: on x86 processors without VNNI they add pairs of products in 16
bits, which two of 255 * 127 exceed."""


def to_bytes(model: Any) -> bytes:
    """An onnx_ir.Model as it stands in a file."""
    file: bytes = require("onnx_ir").to_proto(model).SerializeToString()
    return file


class Evaluator(Protocol):
    """Runs a model: feeds in, all outputs out."""

    name: str

    def __call__(self, feeds: Feeds) -> list[Array]: ...


class OnnxRuntime:
    """ONNX Runtime on the CPU, as users run it, or as told.

    Args:
        model (bytes or str): a file's content, or its path.
        optimized (bool), exact_sums (bool): see :func:`evaluator`.
        keep (str): a path for the model as it was optimized; empty for none. Default: ``""``

    Raises:
        Exception: it cannot load the model; its exceptions share no base class of their own.
    """

    def __init__(
        self, model: bytes | str, optimized: bool = True, exact_sums: bool = False, keep: str = ""
    ) -> None:
        runtime = require("onnxruntime")
        self.name = f"onnxruntime {runtime.__version__}"
        options = runtime.SessionOptions()
        if exact_sums:
            self.name += f" with {EXACT_SUMS}=1"
            options.add_session_config_entry(EXACT_SUMS, "1")
        if not optimized:
            self.name += " without optimizations"
            options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4
        options.optimized_model_filepath = keep
        self._session = runtime.InferenceSession(
            model, sess_options=options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, feeds: Feeds) -> list[Array]:
        outputs: list[Array] = self._session.run(None, feeds)
        return outputs


@functools.cache
def _openvino_core() -> Any:
    """The one of this process, which stays.

    The CPU plugin of a core gives the thread another stack for signals, and frees it when the core
    goes. Where two cores go in the order in which they came, the thread is left with the first
    one's, freed: the next signal with a handler, such as that of a child which ends, kills the
    process.
    """
    return require("openvino").Core()


class OpenVINO:
    """OpenVINO on the CPU, in float32 where a model is not quantized.

    Args:
        model (bytes or str): a file's content, or its path.

    Raises:
        RuntimeError: it cannot load the model.
    """

    def __init__(self, model: bytes | str) -> None:
        openvino = require("openvino")
        self.name = f"openvino {openvino.__version__.partition('-')[0]}"
        core = _openvino_core()
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        compiled = core.compile_model(
            core.read_model(model) if isinstance(model, str) else core.read_model(model, b""),
            "CPU",
            settings,
        )
        self.compiled = compiled
        self._request = compiled.create_infer_request()
        self._inputs = [next(iter(port.names)) for port in compiled.inputs]
        self._outputs = list(compiled.outputs)

    def __call__(self, feeds: Feeds) -> list[Array]:
        results = self._request.infer({name: feeds[name] for name in self._inputs})
        return [np.array(results[output]) for output in self._outputs]


class Reference:
    """ONNX's reference evaluator."""

    def __init__(self, model: bytes) -> None:
        self.name = f"onnx.reference {require('onnx').__version__}"
        loaded = require("onnx").load_model_from_string(model)
        self._evaluator = require("onnx.reference").ReferenceEvaluator(loaded)

    def __call__(self, feeds: Feeds) -> list[Array]:
        try:
            outputs: list[Array] = self._evaluator.run(None, feeds)
        except Exception as error:
            raise RuntimeError(
                f"{self.name} cannot run the exported model, and onnxruntime cannot load it: "
                f"{first_line(error)}"
            ) from error
        return outputs


def evaluator(
    model: bytes, *, optimized: bool = True, exact_sums: bool = False
) -> tuple[Evaluator, str]:
    """ONNX Runtime, or what else can load a model.

    Args:
        model (bytes): the file.
        optimized (bool): with the runtime's default optimizations, else without any. Default: True
        exact_sums (bool): with :data:`EXACT_SUMS`. Default: False

    Returns:
        tuple: what runs the model, and why it is not the runtime as asked for, or an empty text: if
        the runtime cannot load it so, it without optimizations; if it cannot do that, ONNX's
        reference evaluator.

    Raises:
        RuntimeError: nothing can load it.
    """
    try:
        return OnnxRuntime(model, optimized, exact_sums), ""
    except ImportError:
        raise
    except Exception as error:  # the runtime's exceptions share no base class of their own
        problem = error
    for way in (functools.partial(OnnxRuntime, optimized=False), Reference):
        try:
            found: Evaluator = way(model)
        except Exception:
            continue
        return found, first_line(problem)
    raise RuntimeError(f"nothing can load the exported model: {first_line(problem)}") from problem


@functools.cache
def usable_opset() -> int:
    """The highest opset that a storage needs, of those that the installed packages have.

    Asked of the packages themselves, since ONNX Runtime does not tell: by a model of one node.
    """
    onnx = require("onnx")
    for opset, kind in sorted(((s.opset, s.name.lower()) for s in STORAGES), reverse=True):
        if opset > onnx.defs.onnx_opset_version():
            continue
        model = onnx.parser.parse_model(f"""
            <ir_version: {least_ir_version(opset)}, opset_import: ["": {opset}]>
            probe (float[1] x, float scale, {kind} zero) => ({kind}[1] y) {{
                y = QuantizeLinear (x, scale, zero)
            }}
        """)
        try:
            OnnxRuntime(model.SerializeToString())
        except Exception:
            continue
        return opset
    return BASE_OPSET


def least_ir_version(opset: int) -> int:
    """The version of the format that came with an opset."""
    helper = require("onnx.helper")
    imports = [helper.make_opsetid("", opset)]
    return int(helper.find_min_ir_version_for(imports, ignore_unknown=True))


def first_line(error: BaseException) -> str:
    """What an exception of a long story says first, of a chain the one that it began with."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
