"""What is known of torchvision's detectors.

============== ==================================== =====================================
model          ``"raw"``                            ``"boxes"``
============== ==================================== =====================================
RetinaNet      class logits, box deltas             boxes, scores (sigmoid)
FCOS           class logits, distances, centerness  boxes, scores (sqrt of the product)
SSD, SSDLite   class logits, box deltas             boxes, scores (softmax, background 0)
Faster R-CNN   objectness, deltas, class logits,    not available
               box deltas of the proposals
============== ==================================== =====================================

Logits are Tensor[B, A, classes], deltas Tensor[B, A, 4], centerness Tensor[B, A, 1]. Mask and
Keypoint R-CNN are exported as a Faster R-CNN, which takes the proposals, Tensor[B, P, 4] in pixels,
as a second argument, since their selection depends on the data. The images that the networks of
:func:`hqod_ops.quant.detection_network` take are ``model.transform(images)[0].tensors``.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers

from hqod_ops.quant.adapters import Adapter, DetectorNetwork


class Dense(DetectorNetwork):
    """The one-stage detectors: predictions at every anchor."""

    parts = ("backbone", "head")
    keys: tuple[str, ...] = ("cls_logits", "bbox_regression")
    backbone: nn.Module
    head: nn.Module

    def __init__(self, model: Any, outputs: str = "raw") -> None:
        super().__init__(model, outputs)
        self._anchors, self._coder = model.anchor_generator, model.box_coder

    def predict(self, images: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        features = list(_levels(self.backbone(images)).values())
        predictions = self.head(features)
        return tuple(predictions[key] for key in self.keys), features

    def decode(
        self, images: Tensor, features: Any, raw: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        sizes = [(images.shape[-2], images.shape[-1])]
        anchors = self._anchors(ImageList(images[:1], sizes), features)[0]
        return self.boxes(raw[1], anchors), self.scores(*raw)

    def boxes(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """Tensor[B, A, 4] from Tensor[B, A, 4] and Tensor[A, 4]."""
        return torch.stack([self._coder.decode_single(d, anchors) for d in deltas])

    def scores(self, logits: Tensor, *others: Tensor) -> Tensor:
        """Tensor[B, A, classes] from the raw predictions."""
        return logits.sigmoid()


class FCOS(Dense):
    """Distances to the sides, and a centerness that weighs the scores."""

    keys = ("cls_logits", "bbox_regression", "bbox_ctrness")

    def boxes(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        boxes: Tensor = self._coder.decode(deltas, anchors)
        return boxes

    def scores(self, logits: Tensor, *others: Tensor) -> Tensor:
        return (logits.sigmoid() * others[1].sigmoid()).sqrt()


class SSD(Dense):
    """Class 0 is the background."""

    def scores(self, logits: Tensor, *others: Tensor) -> Tensor:
        return nn.functional.pad(logits.softmax(dim=-1)[..., 1:], (1, 0))


class FasterRCNN(DetectorNetwork):
    """Both stages, on proposals that are given."""

    parts = ("backbone", "rpn", "roi_heads")
    no_boxes = "which proposals the second stage sees depends on the data"
    backbone: nn.Module
    rpn: Any
    roi_heads: Any

    def forward(  # type: ignore[override]  # the file's inputs have these names
        self, images: Tensor, proposals: Tensor
    ) -> tuple[Tensor, ...]:
        features = _levels(self.backbone(images))
        objectness, deltas = concat_box_prediction_layers(*self.rpn.head(list(features.values())))
        count = images.shape[0]
        size = (images.shape[-2], images.shape[-1])
        pooled = self.roi_heads.box_roi_pool(features, list(proposals), [size] * count)
        classes, boxes = self.roi_heads.box_predictor(self.roi_heads.box_head(pooled))
        return (
            objectness.reshape(count, -1),
            deltas.reshape(count, -1, 4),
            *(values.reshape(count, proposals.shape[1], -1) for values in (classes, boxes)),
        )


def _levels(features: Any) -> dict[str, Tensor]:
    return {"0": features} if isinstance(features, Tensor) else features


class Torchvision(Adapter):
    """A detector whose first layer is the first one registered.

    Args:
        network (type of DetectorNetwork): what exports.
        *prediction (str): names of the prediction layers.
    """

    def __init__(self, network: type[DetectorNetwork], *prediction: str) -> None:
        self.network, self._prediction = network, prediction

    def arguments(self, model: Any, batch: Any) -> tuple[Any, ...] | None:
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            return None
        images, targets = batch
        of_dicts = isinstance(targets, (tuple, list)) and all(isinstance(t, dict) for t in targets)
        if not of_dicts or not isinstance(images, (tuple, list, Tensor)):
            return None
        return (list(images), list(targets)) if model.training else (list(images),)

    def first(self, model: nn.Module, layers: Sequence[str]) -> Sequence[str]:
        return layers[:1]

    def prediction(self, model: nn.Module, layers: Sequence[str]) -> Sequence[str]:
        return self._prediction


class TorchvisionSSD(Torchvision):
    """SSD predicts with one convolution a feature map, SSDLite with the second of two."""

    def prediction(self, model: nn.Module, layers: Sequence[str]) -> Sequence[str]:
        lite = any(fnmatchcase(name, f"{self._prediction[0]}.1") for name in layers)
        return [f"{pattern}.1" if lite else pattern for pattern in self._prediction]


_CLS, _BOX = "head.classification_head", "head.regression_head"
_RETINANET = (f"{_CLS}.cls_logits", f"{_BOX}.bbox_reg")
_RPN = ("rpn.head.cls_logits", "rpn.head.bbox_pred")
_RCNN = (*_RPN, "roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred")

ADAPTERS = {
    "RetinaNet": Torchvision(Dense, *_RETINANET),
    "FCOS": Torchvision(FCOS, *_RETINANET, f"{_BOX}.bbox_ctrness"),
    "SSD": TorchvisionSSD(SSD, f"{_CLS}.module_list.[0-9]", f"{_BOX}.module_list.[0-9]"),
    "FasterRCNN": Torchvision(FasterRCNN, *_RCNN),
    "MaskRCNN": Torchvision(FasterRCNN, *_RCNN, "roi_heads.mask_predictor.mask_fcn_logits"),
    "KeypointRCNN": Torchvision(
        FasterRCNN, *_RCNN, "roi_heads.keypoint_predictor.kps_score_lowres"
    ),
}
"""By class name."""
