"""What is known of Ultralytics' YOLO models: their losses, their edge layers, what exports.

Raw are class logits Tensor[B, A, classes] and, for the four sides, distances or the logits of their
distribution, Tensor[B, A, 4 or 64]. Segmentation and pose models are exported as detectors.

Ultralytics is under AGPL-3.0, or a licence of its own: see what that means for what you ship. This
package contains none of it and needs it only where a user gives one of its models.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hqod_ops.integrations.harmonize import (
    Hook,
    Places,
    Recorder,
    add_hook,
    check_hook,
    full_precision,
    gone,
    recorded,
    wide,
)
from hqod_ops.quant.adapters import Adapter, DetectorNetwork
from hqod_ops.quant.nn.layers import QATLayer

TESTED = "8.4.190"


_MODELS = ("DetectionModel", "SegmentationModel", "PoseModel")


def places(model: Any) -> Places:
    """The objects that get hooks."""
    # The nearest class decides: some that derive from a DetectionModel have losses of other kinds.
    kinds = (k.__name__ for k in type(model).__mro__ if k.__module__.startswith("ultralytics."))
    if next(kinds) not in _MODELS:
        raise TypeError(
            f"model: expected one of ultralytics' {', '.join(_MODELS)} (the model of a YOLO), got "
            f"{type(model).__name__}"
        )
    losses = importlib.import_module("ultralytics.utils.loss")
    check_hook(_DetectionLoss, getattr(losses, "v8DetectionLoss", type(model)))
    yield model, _Model
    # It is made at the first loss, or by a trainer; until then there is nothing to hook.
    if getattr(model, "criterion", None) is not None:
        yield from _parts(model.criterion)


def _parts(criterion: Any) -> Places:
    """Of a loss; one of an end-to-end model has two, for its two heads."""
    parts: list[Any] = [getattr(criterion, name, None) for name in ("one2many", "one2one")]
    for part in [criterion] if None in parts else parts:
        yield part, _DetectionLoss
        yield part.assigner, Recorder


class _Unfused(Hook):
    """Validation and prediction fold batch norms into weights, whose quantizers they would take for
    another library's: a quantized model stays as it was trained."""

    tested = TESTED

    def fuse(self, verbose: Any = True, imgsz: Any = 640) -> Any:
        library: Any = super()
        return self if is_quantized(self) else library.fuse(verbose, imgsz)


class _Model(Hook):
    tested = TESTED

    def init_criterion(self) -> Any:
        library: Any = super()
        criterion = library.init_criterion()
        for owner, hook in _parts(criterion):
            add_hook(owner, hook, self._hqod_terms)
        return criterion


def is_quantized(model: Any) -> bool:
    """Whether a model was given to :func:`hqod_ops.quant.prepare_qat`."""
    return isinstance(model, nn.Module) and any(isinstance(m, QATLayer) for m in model.modules())


class Network(DetectorNetwork):
    """The detector up to the decoded boxes, of the head that it uses in evaluation."""

    parts = ("model",)
    model: Any

    def __init__(self, model: Any, outputs: str = "raw") -> None:
        super().__init__(model, outputs)
        self._detector = [model]  # in a list: its layers are not to be registered a second time

    def predict(self, images: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        # In evaluation it is a pair, of which the first is what is decoded and selected.
        found = self._detector[0].predict(images)
        found = found[1] if isinstance(found, tuple) else found
        if "one2one" in found:
            found = found["one2one" if self.model[-1].end2end else "one2many"]
        return (found["scores"].mT, found["boxes"].mT), found

    def decode(
        self, images: Tensor, features: Any, raw: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        head = self.model[-1]
        boxes = head._get_decode_boxes(features).mT
        if not (head.end2end or head.xyxy):
            centre, half = boxes[..., :2], boxes[..., 2:] / 2
            boxes = torch.cat([centre - half, centre + half], -1)
        return boxes, raw[0].sigmoid()


class YOLOAdapter(Adapter):
    """The first convolution, and the bare ones of the head, outside of blocks with a batch norm."""

    network = Network

    def arguments(self, model: Any, batch: Any) -> tuple[Any, ...] | None:
        if not (isinstance(batch, Mapping) and "img" in batch):
            return None
        images = batch["img"]
        # A loader gives bytes, which the library's trainer divides.
        return (images if images.is_floating_point() else images.float() / 255,)

    def prepared(self, model: nn.Module) -> None:
        add_hook(model, _Unfused)

    def first(self, model: nn.Module, layers: Sequence[str]) -> Sequence[str]:
        return layers[:1]

    def prediction(self, model: Any, layers: Sequence[str]) -> Sequence[str]:
        head = f"model.{len(model.model) - 1}."
        return [name for name in layers if name.startswith(head) and not name.endswith(".conv")]


ADAPTERS = dict.fromkeys(_MODELS, YOLOAdapter())
"""By class name."""


class _DetectionLoss(Hook):
    """The library predicts in units of its grids and forgets the labels that it assigned: these are
    taken from the assigner."""

    tested = TESTED

    def get_assigned_targets_and_loss(self, preds: Any, batch: Any, **kwargs: Any) -> Any:
        library: Any = super()
        part: Any = self
        with recorded(part.assigner) as seen:
            assigned, loss, items = library.get_assigned_targets_and_loss(preds, batch, **kwargs)
        if len(seen) != 1:
            place = "v8DetectionLoss.get_assigned_targets_and_loss calls its assigner not once"
            raise gone(_DetectionLoss, self._hqod_base, place)
        with full_precision(loss):
            term = self._terms(preds, seen[0], *assigned[-2:])
        # The entry of the box loss; a segmentation's or a pose's loss takes it from there.
        return (
            assigned,
            loss + functional.pad(term[None], (0, len(loss) - 1)),
            {
                **items,
                "hqod_loss": term.detach(),
            },
        )

    def _terms(self, preds: Any, found: Any, points: Tensor, strides: Tensor) -> Tensor:
        part: Any = self
        labels, boxes, scores, positive, _ = found
        image, place = positive.nonzero().unbind(1)
        label = labels[image, place].long()
        distances = wide(preds["boxes"][image, :, place])
        decoded = part.bbox_decode(wide(points[place]), distances[None])[0] * wide(strides[place])
        return self._hqod_terms(
            decoded,
            boxes[image, place],
            preds["scores"][image, label, place],
            scores.sum().clamp(min=1),
            logits=True,
        )
