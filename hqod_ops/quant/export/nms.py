"""Non-maximum suppression as ONNX nodes behind a detector's network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hqod_ops.quant.export._extras import require
from hqod_ops.quant.export.evaluate import Feeds, Reference, evaluator
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
        model (onnx.ModelProto): its two outputs are boxes and scores.
        settings (NMS): thresholds.
        feeds (dict of str to array): an example.

    Raises:
        ValueError: the outputs are not boxes and scores.
        ExportError: the file does not give what ONNX's reference evaluator makes of the model's
            boxes and scores.
    """
    outputs = list(model.graph.output)
    shapes = [[d.dim_value for d in o.type.tensor_type.shape.dim] for o in outputs]
    fits = len(shapes) == 2 and [len(shape) for shape in shapes] == [3, 3] and shapes[0][2] == 4
    if not fits:
        raise ValueError(
            "nms: expected a model that returns boxes Tensor[B, A, 4] and scores Tensor[B, A, "
            f"classes], such as detection_network(model, 'boxes'), got outputs of shape {shapes}"
        )
    suppression = _graph(model, settings)
    joined = require("onnx.compose").merge_models(
        model, suppression, [(outputs[0].name, "nms.boxes"), (outputs[1].name, "nms.scores")]
    )
    file: bytes = joined.SerializeToString()
    boxes, scores = evaluator(model.SerializeToString())[0](feeds)
    run, _ = evaluator(file)
    expected = Reference(suppression.SerializeToString())(
        {"nms.boxes": boxes, "nms.scores": scores}
    )
    for name, ours, theirs in zip(OUTPUTS, run(feeds), expected, strict=True):
        if ours.shape != theirs.shape or not np.allclose(ours, theirs, rtol=1e-5, atol=1e-5):
            raise ExportError(f"{name}: {run.name} gives other detections than ONNX's definition")
    return file


def _graph(model: Any, settings: NMS) -> Any:
    helper, types = require("onnx.helper"), require("onnx").TensorProto
    constants = {
        "nms.per_class": np.array([settings.per_class], np.int64),
        "nms.iou": np.array([settings.iou], np.float32),
        "nms.score": np.array([settings.score], np.float32),
        "nms.image": np.array(0, np.int64),
        "nms.class": np.array(1, np.int64),
        "nms.image_and_anchor": np.array([0, 2], np.int64),
    }
    boxes, scores, labels, images = OUTPUTS
    nodes: list[tuple[list[str], str, str, dict[str, Any]]] = [
        (["nms.scores"], "Transpose", "nms.by_class", {"perm": [0, 2, 1]}),
        (
            ["nms.boxes", "nms.by_class", "nms.per_class", "nms.iou", "nms.score"],
            "NonMaxSuppression",
            "nms.selected",
            {},
        ),
        (["nms.selected", "nms.image_and_anchor"], "Gather", "nms.places", {"axis": 1}),
        (["nms.boxes", "nms.places"], "GatherND", boxes, {}),
        (["nms.by_class", "nms.selected"], "GatherND", scores, {}),
        (["nms.selected", "nms.class"], "Gather", labels, {"axis": 1}),
        (["nms.selected", "nms.image"], "Gather", images, {"axis": 1}),
    ]
    kinds = {boxes: (types.FLOAT, ["N", 4]), scores: (types.FLOAT, ["N"])}
    kinds |= {name: (types.INT64, ["N"]) for name in (labels, images)}
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node(op, i, [o], name=o, **attributes) for i, op, o, attributes in nodes],
        "nms",
        [info(name, types.FLOAT, [None] * 3) for name in ("nms.boxes", "nms.scores")],
        [info(name, *kinds[name]) for name in OUTPUTS],
        [require("onnx.numpy_helper").from_array(v, name) for name, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
