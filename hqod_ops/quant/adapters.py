"""The part of a detector that is a function of tensors alone, and so can be exported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hqod_ops.quant.export._extras import require
from hqod_ops.quant.quantizers.calls import start_levels

OUTPUTS = ("raw", "boxes")


class _Network(nn.Module):
    """Parts of a detector, by the names they have there, so that its layers keep their names."""

    parts: tuple[str, ...] = ("backbone", "head")
    backbone: nn.Module
    head: nn.Module

    def __init__(self, model: Any, outputs: str) -> None:
        super().__init__()
        for name in self.parts:
            setattr(self, name, getattr(model, name))
        self.outputs = outputs
        self.train(model.training)
        self.register_forward_pre_hook(start_levels)


class _Dense(_Network):
    """torchvision's one-stage detectors: predictions at every anchor."""

    keys: tuple[str, ...] = ("cls_logits", "bbox_regression")

    def __init__(self, model: Any, outputs: str) -> None:
        super().__init__(model, outputs)
        self._anchors, self._coder = model.anchor_generator, model.box_coder

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = _features(self.backbone, images)
        predictions = self.head(features)
        raw = tuple(predictions[key] for key in self.keys)
        if self.outputs == "raw":
            return raw
        boxes = _clip(self.decode(raw[1], self.anchors(images, features)), images)
        return boxes, self.scores(*raw)

    def anchors(self, images: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Tensor[A, 4], in pixels."""
        lists = require("torchvision.models.detection.image_list")
        sizes = [(images.shape[-2], images.shape[-1])]
        anchors: list[Tensor] = self._anchors(lists.ImageList(images[:1], sizes), list(features))
        return anchors[0]

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """Tensor[B, A, 4] from Tensor[B, A, 4]."""
        return torch.stack([self._coder.decode_single(d, anchors) for d in deltas])

    def scores(self, logits: Tensor, deltas: Tensor) -> Tensor:
        """Tensor[B, A, classes]."""
        return logits.sigmoid()


class _FCOS(_Dense):
    keys = ("cls_logits", "bbox_regression", "bbox_ctrness")

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        boxes: Tensor = self._coder.decode(deltas, anchors)
        return boxes

    def scores(self, logits: Tensor, deltas: Tensor, *others: Tensor) -> Tensor:
        return (logits.sigmoid() * others[0].sigmoid()).sqrt()


class _SSD(_Dense):
    def scores(self, logits: Tensor, deltas: Tensor) -> Tensor:
        scores = logits.softmax(dim=-1)[..., 1:]
        return torch.nn.functional.pad(scores, (1, 0))


class _ATSS(_Network):
    parts = ("network",)
    network: nn.Module

    def __init__(self, model: Any, outputs: str) -> None:
        super().__init__(model, outputs)
        self._detector = [model]  # in a list: its layers are not to be registered a second time

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        logits, deltas, centerness = self.network(images)
        if self.outputs == "raw":
            return logits, deltas, centerness
        detector = self._detector[0]
        anchors = torch.cat(detector.anchors(images))
        boxes = torch.stack([detector.decode(d, anchors) for d in deltas])
        return _clip(boxes, images), logits.sigmoid() * centerness.sigmoid()[..., None]


class _FasterRCNN(_Network):
    parts = ("backbone", "rpn", "roi_heads")
    rpn: Any
    roi_heads: Any

    def forward(self, images: Tensor, proposals: Tensor) -> tuple[Tensor, ...]:
        rpn = require("torchvision.models.detection.rpn")
        features = self.backbone(images)
        features = {"0": features} if isinstance(features, Tensor) else features
        objectness, deltas = self.rpn.head(list(features.values()))
        count = images.shape[0]
        objectness, deltas = rpn.concat_box_prediction_layers(objectness, deltas)
        size = (images.shape[-2], images.shape[-1])
        pooled = self.roi_heads.box_roi_pool(features, list(proposals), [size] * count)
        classes, boxes = self.roi_heads.box_predictor(self.roi_heads.box_head(pooled))
        return (
            objectness.reshape(count, -1),
            deltas.reshape(count, -1, 4),
            *(values.reshape(count, proposals.shape[1], -1) for values in (classes, boxes)),
        )


_KINDS: dict[tuple[str, str], Callable[[Any, str], _Network]] = {
    ("torchvision", "RetinaNet"): _Dense,
    ("torchvision", "FCOS"): _FCOS,
    ("torchvision", "SSD"): _SSD,
    ("torchvision", "FasterRCNN"): _FasterRCNN,
    ("hqod_ops", "ATSS"): _ATSS,
}


def detection_network(model: nn.Module, outputs: str = "raw") -> nn.Module:
    """The network of a detector, images to predictions, for :func:`export_onnx`.

    Resizing and normalising come before it, selection and non-maximum suppression behind it. It
    shares the layers of the detector, under the same names.

    ============== ==================================== =====================================
    model          ``"raw"``                            ``"boxes"``
    ============== ==================================== =====================================
    RetinaNet      class logits, box deltas             boxes, scores (sigmoid)
    FCOS           class logits, distances, centerness  boxes, scores (sqrt of the product)
    SSD, SSDLite   class logits, box deltas             boxes, scores (softmax, background 0)
    ATSS           class logits, deltas, centerness     boxes, scores (class times centerness)
    Faster R-CNN   objectness, deltas, class logits,    not available
                   box deltas of the proposals
    ============== ==================================== =====================================

    Logits and scores are Tensor[B, A, classes], deltas and boxes Tensor[B, A, 4], centerness
    Tensor[B, A] (of FCOS [B, A, 1]); boxes are (x1, y1, x2, y2) in pixels of the given images,
    clipped to them; a class's index is the label that the detector gives it. Faster R-CNN takes the
    proposals, Tensor[B, P, 4] in pixels, as a second argument, since their selection depends on the
    data.

    Args:
        model (nn.Module): torchvision's RetinaNet, FCOS, SSD, SSDLite or Faster R-CNN, or
            :class:`hqod_ops.detection.ATSS`; quantized or not.
        outputs (str): ``"raw"`` predictions, or decoded ``"boxes"``. Default: ``"raw"``

    Returns:
        nn.Module: called with images Tensor[B, 3, H, W] as the detector's backbone sees them: of a
        torchvision detector, ``model.transform(images)[0].tensors``.

    Raises:
        TypeError: another kind of model.
        ValueError: unknown outputs, or ``"boxes"`` of a Faster R-CNN.

    Example:
        >>> import torch
        >>> from hqod_ops.detection.models.atss import ATSS
        >>> from hqod_ops.training.settings import ModelConfig
        >>> from hqod_ops.quant.export import detection_network
        >>> network = detection_network(ATSS(ModelConfig(), num_classes=10).eval(), "boxes")
        >>> [tuple(output.shape) for output in network(torch.rand(1, 3, 32, 32))]
        [(1, 20, 4), (1, 20, 10)]
    """
    if outputs not in OUTPUTS:
        raise ValueError(f"outputs: expected one of {', '.join(OUTPUTS)}, got {outputs!r}")
    for kind in type(model).__mro__:
        build = _KINDS.get((kind.__module__.partition(".")[0], kind.__name__))
        if build is _FasterRCNN and outputs != "raw":
            raise ValueError(
                "outputs: of a Faster R-CNN only 'raw' can be exported: which proposals the second "
                "stage sees depends on the data"
            )
        if build is not None:
            return build(model, outputs)
    raise TypeError(
        "model: expected torchvision's RetinaNet, FCOS, SSD or FasterRCNN, or ATSS, got "
        f"{type(model).__name__}"
    )


def _features(backbone: nn.Module, images: Tensor) -> list[Tensor]:
    features = backbone(images)
    return [features] if isinstance(features, Tensor) else list(features.values())


def _clip(boxes: Tensor, images: Tensor) -> Tensor:
    height, width = images.shape[-2], images.shape[-1]
    return torch.stack(
        [
            side.clamp(0, size)
            for side, size in zip(boxes.unbind(-1), (width, height) * 2, strict=True)
        ],
        dim=-1,
    )
