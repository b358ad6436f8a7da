"""export_onnx: a QAT model as a file that runtimes execute."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hqod_ops import checks
from hqod_ops.quant.export._extras import require
from hqod_ops.quant.export.evaluate import to_bytes, usable_opset
from hqod_ops.quant.export.grid import BASE_OPSET
from hqod_ops.quant.export.inventory import Inventory
from hqod_ops.quant.export.lowering import Lowered, finish, lower
from hqod_ops.quant.export.nms import NMS, append_nms
from hqod_ops.quant.export.record import read_grids, record
from hqod_ops.quant.export.rewrites.affine import fold_affine
from hqod_ops.quant.export.targets import DEFAULT, find_target
from hqod_ops.quant.export.trace import trace
from hqod_ops.quant.export.verify import Verification, check_expressible, verify
from hqod_ops.quant.nn.derived import settle, without_graph


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far it is from the model.

    Attributes:
        path (Path): the file.
        opset (int): its opset.
        size (int): bytes of the file.
        float_size (int): bytes of the same weights in float32.
        storage (dict of str to int): number of weights and activations by integer type.
        evaluator (str): what ran the file.
        steps (int): largest difference of a quantized activation from identical inputs, in codes:
            0 or 1.
        flipped (float): share of the codes of all activations that differ so.
        difference (float): largest difference of an output end to end, in its unit.
        relative_difference (float): L2 norm of the difference end to end over that of the output,
            the largest of all outputs.
        output_steps (tuple of float or None): largest difference of every output end to end in
            quantization steps, where a quantizer makes the output.
    """

    path: Path
    opset: int
    size: int
    float_size: int
    storage: dict[str, int]
    evaluator: str
    steps: int
    flipped: float
    difference: float
    relative_difference: float
    output_steps: tuple[float | None, ...]

    def __str__(self) -> str:
        types = ", ".join(f"{count} {name.lower()}" for name, count in self.storage.items())
        return (
            f"{self.path}: opset {self.opset}, {self.size / 1e6:.2f} MB "
            f"({self.float_size / 1e6:.2f} MB of weights in float), {types}; {self.evaluator}: "
            f"{self.steps} steps from identical inputs ({self.flipped:.2g} of the codes), "
            f"end to end {self.difference:.3g} ({self.relative_difference:.2g} relative)"
        )


def export_onnx(
    model: nn.Module,
    example: Tensor | tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    nms: NMS | None = None,
    max_steps: int = 1,
    unsigned_weights: bool = False,
    target: str = DEFAULT,
) -> ExportReport:
    """Write a QAT model as quantized ONNX, and check that the file computes what the model does.

    Weights are stored as integers with their trained scales, in front of a DequantizeLinear;
    activations pass QuantizeLinear and DequantizeLinear with the trained scales. Biases and all
    that is not quantized stay in float32. A layer shared by several levels has one weight and the
    scales of every level.

    **Targets.** A file runs in every runtime that knows its opset; the target says where it is
    fast:

    ===============  =========================  =====  ======================
    target           integer types              opset  checked in
    ===============  =========================  =====  ======================
    ``onnxruntime``  int8, uint8                18     ONNX Runtime
    ``openvino``     int8, uint8                18     OpenVINO, if installed
    ``tensorrt``     int8, zero points of 0     18     ONNX Runtime
    ``smallest``     2 bits: int2, uint2;       25     ONNX Runtime
                     3, 4 bits: int4, uint4;    21
                     5 to 8: int8, uint8        18
    ===============  =========================  =====  ======================

    All but ``smallest`` compute in 8 bits, whatever the codes' bits are: that is what processors
    are fast in. Two rewrites, which change no value but for rounding in float32, let runtimes fuse
    convolutions with what quantizes their outputs: batch norms go into the scales of the weights
    and into the biases, and codes of fewer than 8 bits are limited as integers (for ``tensorrt``
    in float).

    The file has the lowest opset that its types need. Where ``opset`` or the installed packages are
    older, the next larger type holds the codes.

    **What is checked.** A sum in another order differs in the last bit; where such a difference
    lies at the middle between two codes, the code differs by one step, and the layers behind it
    amplify that, the more the fewer bits there are. So a comparison of the outputs alone can prove
    nothing. Instead, besides the codes of the weights, which must be equal, the file runs with
    *every quantized activation recomputed from what the model's own quantizers read*: from
    identical inputs, every code must be the model's or its neighbour, and a float output may differ
    by 0.1 % of its largest value. This holds with the default optimizations of ONNX Runtime, which
    may round biases too, and without them, where besides at most 1 % of a tensor's codes (or 16)
    may be neighbours. Then the file runs end to end; if no code was a neighbour, the same bound
    holds there. The report has the differences of both. If the runtime cannot load the file so, it
    runs without optimizations or ONNX's reference evaluator does, with a warning.

    **8 bits on older processors.** On x86 without VNNI (before Ice Lake and Zen 4) ONNX Runtime
    adds pairs of products of uint8 activations and int8 weights in 16 bits, which overflow where
    both are large. Exporting on such a processor warns when the example shows it; the file is
    right, and is checked with ``session.x64quantprecision`` on, which avoids it.
    ``unsigned_weights=True`` avoids it in the file, for runtimes that take weights in uint8.

    The model is copied, and exported as it is in eval mode; the copy and the file's activations on
    the example need memory.

    Args:
        model (nn.Module): a calibrated model from :func:`hqod_ops.quant.prepare_qat`, in float32.
            It must be one that ``torch.export`` can trace; of a detector, see
            :func:`hqod_ops.quant.detection_network`.
        example (Tensor or tuple): the positional arguments, such as a batch of real images. Its
            shapes are those of the file, unless ``dynamic_shapes`` says otherwise.
        path (str or path-like): the file. It is only written when it was found right.
        opset (int, optional): the highest that the runtime knows. Default: None, the highest that
            the installed onnx and onnxruntime know
        dynamic_shapes (optional): see ``torch.export.export``. Default: None
        input_names (sequence of str, optional), output_names (sequence of str, optional): names in
            the file. Default: None, torch's
        nms (NMS, optional): non-maximum suppression at the end, for a model whose outputs are boxes
            Tensor[B, A, 4] and scores Tensor[B, A, classes], such as
            ``detection_network(model, "boxes")``. Default: None
        max_steps (int): the difference of a code from identical inputs that is still accepted, for
            models whose activations are rounding errors (a normalisation of single values).
            Default: 1
        unsigned_weights (bool): store weights of 5 to 8 bits as uint8 with the zero point 128, not
            as int8. The values are the same. Default: False
        target (str): ``"onnxruntime"``, ``"openvino"``, ``"tensorrt"`` or ``"smallest"``, see
            above. Default: ``"onnxruntime"``

    Returns:
        ExportReport: opset, sizes, and differences.

    Raises:
        ImportError: onnx, onnx-ir, onnxscript or onnxruntime is missing; the message names the
            extra.
        ValueError: the model has no quantized layer, was not calibrated, or has a quantizer that
            ONNX or the target cannot express; the opset is below 18, there is no such target or
            directory.
        TypeError: a parameter or the example is float16, bfloat16 or float64; an argument is of
            another type.
        RuntimeError: torch cannot export the model, or a module was replaced after
            :func:`hqod_ops.quant.place_on_producers`, so that a layer reads floats.
        ExportError: the file does not compute what the model does.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from hqod_ops.quant import calibrate, prepare_qat
        >>> from hqod_ops.quant.export import export_onnx  # needs hqod_ops[export]
        >>> model = prepare_qat(nn.Sequential(nn.Conv2d(3, 8, 3)), "w8a8")
        >>> model = calibrate(model, [torch.rand(1, 3, 8, 8)], progress=False)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     report = export_onnx(model, torch.rand(1, 3, 8, 8), f"{directory}/model.onnx")
        >>> report.opset, report.storage
        (18, {'INT8': 1, 'UINT8': 1})
    """
    checks.module("model", model)
    checks.file_path("path", path)
    for module in ("onnx", "onnx_ir", "onnxscript", "onnxruntime"):
        require(module)
    for name, several in (("input_names", input_names), ("output_names", output_names)):
        if isinstance(several, str):
            raise TypeError(f"{name}: expected a sequence of names, got the str {several!r}")
    if nms is not None and not isinstance(nms, NMS):
        raise TypeError(f"nms: expected an NMS or None, got {type(nms).__name__}")
    checks.count("max_steps", max_steps, 0)
    checks.flag("unsigned_weights", unsigned_weights)
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"path: there is no directory {str(path.parent)!r}")
    row = find_target(target)
    limit = _opset_limit(opset)
    arguments = pytree.tree_map(_to_cpu, example if isinstance(example, tuple) else (example,))
    without_graph(model)
    inventory = Inventory(copy.deepcopy(model).cpu().eval())
    settle(inventory.model)
    inventory.verify()
    _check_dtypes(inventory.model, arguments)
    recording = record(inventory, arguments)
    grids = read_grids(inventory, recording, row, limit, unsigned_weights=unsigned_weights)
    check_expressible(recording, grids)
    traced = trace(
        inventory,
        arguments,
        grids,
        dynamic_shapes=dynamic_shapes,
        input_names=input_names,
        output_names=output_names,
    )
    lowered = lower(traced, grids, row)
    if row.fold_affine:
        fold_affine(lowered)
    finish(lowered)
    file = to_bytes(lowered.model)
    tensors = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
    names = [entry.name for entry in lowered.model.graph.inputs]
    feeds = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
    verification = verify(lowered, file, recording, feeds, max_steps, row.runtime)
    if nms is not None:
        file = append_nms(lowered.model, nms, feeds)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(file)
    part.replace(path)
    return _report(path, lowered, len(file), verification)


def _opset_limit(opset: int | None) -> int:
    if opset is None:
        return usable_opset()
    opset = checks.integer("opset", opset)
    if opset < BASE_OPSET:
        raise ValueError(f"opset: expected at least {BASE_OPSET}, got {opset}")
    return min(opset, int(require("onnx.defs").onnx_opset_version()))


def _to_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _check_dtypes(model: nn.Module, arguments: tuple[Any, ...]) -> None:
    named = [*model.named_parameters(), *model.named_buffers()]
    leaves = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
    named += [(f"example[{index}]", leaf) for index, leaf in enumerate(leaves)]
    for name, tensor in named:
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise TypeError(
                f"{name}: expected float32, got {tensor.dtype}; use model.float() and a float32 "
                "example"
            )


def _report(path: Path, lowered: Lowered, size: int, verification: Verification) -> ExportReport:
    saved = sum(
        4 * grid.codes.size - -(-grid.codes.size * grid.storage.bits // 8)
        for grid in lowered.weights.values()
        if grid.codes is not None
    )
    return ExportReport(
        path=path,
        opset=lowered.model.opset_imports[""],
        size=size,
        float_size=size + saved,
        storage=dict(sorted(Counter(grid.storage.name for grid in lowered.grids).items())),
        **dataclasses.asdict(verification),
    )
