"""Where Ultralytics' YOLO models compute their losses.

Ultralytics is under AGPL-3.0, or a licence of its own: see what that means for what you ship. This
package contains none of it and needs it only where a user gives one of its models.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from hqod_ops.integrations.harmonize import (
    Hook,
    Places,
    Recorder,
    Terms,
    add_hook,
    check_hook,
    full_precision,
    gone,
    recorded,
    wide,
)
from hqod_ops.quant import QATLayer
from hqod_ops.quant.config.plan import float_layers

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
    tested = TESTED

    def fuse(self, verbose: Any = True, imgsz: Any = 640) -> Any:
        """Validation and prediction fold batch norms into weights, whose quantizers they would take
        for another library's: a quantized model stays as it was trained."""
        library: Any = super()
        return self if is_quantized(self) else library.fuse(verbose, imgsz)


class _Model(_Unfused):
    def init_criterion(self) -> Any:
        library: Any = super()
        criterion = library.init_criterion()
        for owner, hook in _parts(criterion):
            add_hook(owner, hook, self._hqod_terms)
        return criterion


def is_quantized(model: Any) -> bool:
    """Whether a model was given to :func:`hqod_ops.quant.prepare_qat`."""
    return isinstance(model, nn.Module) and any(isinstance(m, QATLayer) for m in model.modules())


def keep_unfused(model: nn.Module) -> None:
    """Let Ultralytics validate and predict with a quantized model that is not harmonized."""
    if not isinstance(model, _Unfused):
        add_hook(model, _Unfused, Terms())


def has_distribution(model: Any) -> bool:
    """Whether the head predicts a side of a box as a distribution."""
    reg_max: int = model.model[-1].reg_max
    return reg_max > 1


def edge_layers(model: Any) -> tuple[list[str], list[str]]:
    """Names of the layers that see the image, and of those that predict.

    The latter are the bare convolutions of the head, those outside of a block with a batch norm;
    not the one that sums up a distribution, whose weights are constants.
    """
    layers = list(float_layers(model))
    head = f"model.{len(model.model) - 1}."
    bare = [n for n in layers if n.startswith(head) and not n.endswith(".conv")]
    return layers[:1], bare


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
