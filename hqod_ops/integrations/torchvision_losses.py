"""Where torchvision's detectors compute their losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hqod_ops.integrations.harmonize import (
    KEY,
    Hook,
    Places,
    Recorder,
    full_precision,
    gone,
    lookup,
    recorded,
    wide,
)

TESTED = "0.26"


def places(model: Any) -> Places:
    """The objects that get hooks."""
    of_kind: Callable[[Any], Places] = lookup(
        model,
        "torchvision",
        {"RetinaNet": _retinanet, "FCOS": _fcos, "SSD": _ssd, "FasterRCNN": _rcnn},
    )
    return of_kind(model)


def _retinanet(model: Any) -> Places:
    yield model, _Detector
    yield model.head, _RetinaNetHead


def _fcos(model: Any) -> Places:
    yield model, _Detector
    yield model.head, _FCOSHead


def _ssd(model: Any) -> Places:
    yield model, _SSD


def _rcnn(model: Any) -> Places:
    yield model, _Detector
    yield model.roi_heads, _RoIHeads
    yield model.roi_heads.box_predictor, Recorder


class _Detector(Hook):
    """Sees to it that no loss comes without the terms."""

    tested = TESTED

    def forward(self, images: Any, targets: Any = None) -> Any:
        library: Any = super()
        result = library.forward(images, targets)
        if isinstance(result, dict) and KEY not in result:
            raise RuntimeError(
                f"{type(self).__name__}: the loss lacks {KEY}: a part of the model was replaced "
                "after harmonize(model); call that again"
            )
        return result


class _Positives(NamedTuple):
    """The P positives of a batch of B images, in one list."""

    deltas: Tensor  # [P, 4]
    logits: Tensor  # [P, K]
    anchors: Tensor  # [P, 4]
    boxes: Tensor  # [P, 4]
    labels: Tensor  # [P]
    counts: Tensor  # [B]


def _positives(
    targets: Sequence[dict[str, Tensor]],
    outputs: dict[str, Tensor],
    anchors: Sequence[Tensor],
    matched: Sequence[Tensor],
) -> _Positives:
    """What a one-stage head predicts where it matched an object (an index, negative without)."""
    matches = torch.stack(list(matched))
    positive = matches >= 0
    image, place = positive.nonzero().unbind(1)
    sizes = torch.tensor([len(t["boxes"]) for t in targets], device=matches.device)
    index = matches[image, place] + (sizes.cumsum(0) - sizes)[image]
    return _Positives(
        deltas=wide(outputs["bbox_regression"][image, place]),
        logits=wide(outputs["cls_logits"][image, place]),
        anchors=torch.stack(list(anchors))[image, place],
        boxes=torch.cat([t["boxes"] for t in targets])[index],
        labels=torch.cat([t["labels"] for t in targets])[index],
        counts=positive.sum(1),
    )


def _of_class(values: Tensor, labels: Tensor) -> Tensor:
    """Tensor[P] of Tensor[P, K]."""
    return values.gather(1, labels[:, None])[:, 0]


class _RetinaNetHead(Hook):
    tested = TESTED

    def compute_loss(
        self, targets: Any, head_outputs: Any, anchors: Any, matched_idxs: Any
    ) -> dict[str, Tensor]:
        library: Any = super()
        losses: dict[str, Tensor] = library.compute_loss(
            targets, head_outputs, anchors, matched_idxs
        )
        with full_precision(head_outputs["cls_logits"]):
            found = _positives(targets, head_outputs, anchors, matched_idxs)
            losses[KEY] = self._hqod_terms(
                self._decode(found.deltas, found.anchors),
                found.boxes,
                _of_class(found.logits, found.labels),
                self._divisor(found.counts),
                logits=True,
            )
        return losses

    def _decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        head: Any = self
        boxes: Tensor = head.regression_head.box_coder.decode_single(deltas, anchors)
        return boxes

    def _divisor(self, counts: Tensor) -> Tensor:
        return _per_image(counts)


def _per_image(counts: Tensor) -> Tensor:
    """As MMDetection 2 averages over images, in which the method was published."""
    return counts.clamp(min=1).sum()


class _FCOSHead(_RetinaNetHead):
    def _decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        head: Any = self
        boxes: Tensor = head.box_coder.decode(deltas, anchors)
        return boxes

    def _divisor(self, counts: Tensor) -> Tensor:
        return counts.sum().clamp(min=1)


class _SSD(_Detector):
    def compute_loss(
        self, targets: Any, head_outputs: Any, anchors: Any, matched_idxs: Any
    ) -> dict[str, Tensor]:
        library: Any = super()
        losses: dict[str, Tensor] = library.compute_loss(
            targets, head_outputs, anchors, matched_idxs
        )
        model: Any = self
        with full_precision(head_outputs["cls_logits"]):
            found = _positives(targets, head_outputs, anchors, matched_idxs)
            losses[KEY] = self._hqod_terms(
                model.box_coder.decode_single(found.deltas, found.anchors),
                found.boxes,
                _of_class(found.logits.softmax(1), found.labels),
                _per_image(found.counts),
                logits=False,
            )
        return losses


class _RoIHeads(Hook):
    """torchvision computes the loss of the second stage in a function that sees no proposals: they
    are taken where they are sampled, the predictions where they are made."""

    tested = TESTED

    def select_training_samples(self, proposals: Any, targets: Any) -> Any:
        library: Any = super()
        self.__dict__["_hqod_samples"] = samples = library.select_training_samples(
            proposals, targets
        )
        return samples

    def forward(
        self, features: Any, proposals: Any, image_shapes: Any, targets: Any = None
    ) -> tuple[Any, dict[str, Tensor]]:
        library: Any = super()
        head: Any = self
        if not head.training:
            result: tuple[Any, dict[str, Tensor]] = library.forward(
                features, proposals, image_shapes, targets
            )
            return result
        if not isinstance(head.box_predictor, Recorder):
            raise RuntimeError(
                "roi_heads.box_predictor was replaced after harmonize(model); call that again"
            )
        try:
            with recorded(head.box_predictor) as seen:
                result = library.forward(features, proposals, image_shapes, targets)
            samples = self.__dict__.get("_hqod_samples")
            if samples is None or len(seen) != 1:
                raise gone(
                    _RoIHeads,
                    self._hqod_base,
                    "RoIHeads.forward calls select_training_samples and box_predictor not once",
                )
            result[1][KEY] = self._terms(seen[0], samples, targets)
        finally:
            self.__dict__.pop("_hqod_samples", None)
        return result

    def _terms(
        self, predictions: Any, samples: Any, targets: Sequence[dict[str, Tensor]]
    ) -> Tensor:
        head: Any = self
        (logits, deltas), (proposals, matched, labels, _) = predictions, samples
        with full_precision(logits):
            label = torch.cat(list(labels))
            positive = (label > 0).nonzero()[:, 0]
            label_of = label[positive]
            boxes = [t["boxes"][m[k > 0]] for t, m, k in zip(targets, matched, labels, strict=True)]
            deltas = wide(deltas.reshape(len(label), -1, 4)[positive, label_of])
            return self._hqod_terms(
                head.box_coder.decode_single(deltas, torch.cat(list(proposals))[positive]),
                torch.cat(boxes),
                _of_class(wide(logits[positive]).softmax(1), label_of),
                max(len(label), 1),
                logits=False,
            )
