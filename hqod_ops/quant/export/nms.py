"""Non-maximum suppression as ONNX nodes behind a detector's network."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from hqod_ops.quant.export._extras import require
from hqod_ops.quant.export.evaluate import Feeds, Reference, evaluator, to_bytes
from hqod_ops.quant.export.verify import ExportError

OUTPUTS = ("detected_boxes", "detected_scores", "detected_labels", "detected_images")


@dataclass(frozen=True)
class NMS:
    """Settings of the non-maximum suppression in a file, which works within each class.

    The file then returns ``detected_boxes`` Tensor[N, 4], ``detected_scores`` Tensor[N],
    ``detected_labels`` int64 Tensor[N] and ``detected_images`` int64 Tensor[N], the index in the
    batch; by image, within it by class, and there the best first.

    Args:
        score (float): detections have a score above it. Default: 0.05
        iou (float): of two boxes with an IoU above it, the better stays. Default: 0.5
        per_class (int): so many at most of each class in an image. Default: 100

    Raises:
        ValueError: score or iou is outside [0, 1], per_class is less than 1.

    Example:
        >>> from hqod_ops.quant.export import NMS
        >>> NMS(score=0.3).per_class
        100
    """

    score: float = 0.05
    iou: float = 0.5
    per_class: int = 100

    def __post_init__(self) -> None:
        for name in ("score", "iou"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a value in [0, 1], got {getattr(self, name)}")
        if self.per_class < 1:
            raise ValueError(f"per_class: expected at least 1, got {self.per_class}")


def append_nms(model: Any, settings: NMS, feeds: Feeds) -> bytes:
    """A checked file: the model, and the suppression behind it.

    Args:
        model (onnx_ir.Model): its two outputs are boxes and scores.
        settings (NMS): thresholds.
        feeds (dict of str to array): an example.

    Raises:
        ValueError: the outputs are not boxes and scores.
        ExportError: the file does not give what ONNX's reference evaluator makes of the model's
            boxes and scores.
    """
    outputs = model.graph.outputs
    shapes = [[d if isinstance(d, int) else 0 for d in output.shape] for output in outputs]
    fits = len(shapes) == 2 and [len(shape) for shape in shapes] == [3, 3] and shapes[0][2] == 4
    if not fits:
        raise ValueError(
            "nms: expected a model that returns boxes Tensor[B, A, 4] and scores Tensor[B, A, "
            f"classes], such as detection_network(model, 'boxes'), got outputs of shape {shapes}"
        )
    suppression = require("onnx.parser").parse_model(
        _TEXT.format(
            ir_version=model.ir_version,
            opset=model.opset_imports[""],
            **dataclasses.asdict(settings),
        )
    )
    joined = require("onnx.compose").merge_models(
        require("onnx_ir").to_proto(model),
        suppression,
        [(outputs[0].name, "nms_boxes"), (outputs[1].name, "nms_scores")],
    )
    file: bytes = joined.SerializeToString()
    boxes, scores = evaluator(to_bytes(model))[0](feeds)
    run, _ = evaluator(file)
    expected = Reference(suppression.SerializeToString())(
        {"nms_boxes": boxes, "nms_scores": scores}
    )
    for name, ours, theirs in zip(OUTPUTS, run(feeds), expected, strict=True):
        if ours.shape != theirs.shape or not np.allclose(ours, theirs, rtol=1e-5, atol=1e-5):
            raise ExportError(f"{name}: {run.name} gives other detections than ONNX's definition")
    return file


_TEXT = """
<ir_version: {ir_version}, opset_import: ["": {opset}]>
nms (float[B, A, 4] nms_boxes, float[B, A, C] nms_scores) => (
    float[N, 4] detected_boxes, float[N] detected_scores,
    int64[N] detected_labels, int64[N] detected_images
) <
    int64[1] nms_per_class = {{{per_class}}}, float[1] nms_iou = {{{iou:.9g}}},
    float[1] nms_score = {{{score:.9g}}}, int64 nms_image = {{0}}, int64 nms_class = {{1}},
    int64[2] nms_image_and_anchor = {{0, 2}}
> {{
    nms_by_class = Transpose <perm = [0, 2, 1]> (nms_scores)
    nms_selected = NonMaxSuppression (nms_boxes, nms_by_class, nms_per_class, nms_iou, nms_score)
    nms_places = Gather <axis = 1> (nms_selected, nms_image_and_anchor)
    detected_boxes = GatherND (nms_boxes, nms_places)
    detected_scores = GatherND (nms_by_class, nms_selected)
    detected_labels = Gather <axis = 1> (nms_selected, nms_class)
    detected_images = Gather <axis = 1> (nms_selected, nms_image)
}}
"""
