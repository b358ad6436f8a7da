"""What is known of Transformers' DETR models: their losses, their edge layers, what exports.

Raw are class logits Tensor[B, A, classes] and boxes Tensor[B, A, 4] as fractions of the images'
size, centre and size. The score of "no object", the last class of a DETR, is left out.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hqod_ops.integrations.harmonize import (
    KEY,
    Hook,
    Places,
    Terms,
    add_hook,
    check_hook,
    full_precision,
    gone,
    wide,
)
from hqod_ops.quant.adapters import Adapter, DetectorNetwork

TESTED = "5.24"

_SOFTMAX = {
    "ImageLoss": True,
    "DeformableDetrImageLoss": False,
    "RTDetrLoss": False,
    "DFineLoss": False,
    "LwDetrImageLoss": False,
}
"""By the class of the library that computes a loss: whether classes compete."""


def places(model: Any) -> Places:
    """The objects that get hooks."""
    criterion = _criterion(model.loss_function)
    if criterion is None or criterion.__name__ not in _SOFTMAX:
        raise TypeError(
            f"model: expected one of transformers whose loss is of {', '.join(_SOFTMAX)}, got "
            f"{type(model).__name__}"
        )
    check_hook(_Criterion, criterion)
    yield model, _Model


def _criterion(function: Any) -> type | None:
    """The class that a loss function of the library makes: it sees the matched boxes."""
    if isinstance(function, _Loss):
        function = function.function
    if not isinstance(function, types.FunctionType):
        return None
    named = (function.__globals__.get(name) for name in function.__code__.co_names)
    found = [kind for kind in named if isinstance(kind, type) and hasattr(kind, "loss_boxes")]
    return found[0] if len(found) == 1 else None


@dataclass
class _Call:
    """A forward pass."""

    size: tuple[int, int] | None
    """Height and width of the images."""
    added: bool = False
    """Whether the loss got its terms."""


class _Model(Hook):
    tested = TESTED

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        library: Any = super()
        images = kwargs.get("pixel_values", args[0] if args else None)
        # A loss is told no image size, and boxes come as fractions of it.
        call = _Call(None if images is None else tuple(images.shape[-2:]))
        self.__dict__["_hqod_call"] = call
        try:
            output = library.__call__(*args, **kwargs)
        finally:
            del self.__dict__["_hqod_call"]
        if kwargs.get("labels") is not None and not call.added:
            raise gone(_Model, self._hqod_base, "the model does not call its loss_function")
        return output

    @property
    def loss_function(self) -> Any:
        library: Any = super()
        return _Loss(library.loss_function, self._hqod_terms, self.__dict__.get("_hqod_call"))

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        library: Any = inspect.getattr_static(self._hqod_base, "loss_function")
        library.__set__(self, value)


class _Loss:
    """A loss function of the library whose criterion gets the hook.

    The library's code runs with one of its global names bound to something else: the class of the
    criterion, to a function that makes one and hooks it.

    Args:
        function (function): the library's.
        terms (Terms): what is added.
        call (_Call, optional): the forward pass that it is for. Default: None, outside of one
    """

    def __init__(self, function: Any, terms: Terms, call: _Call | None) -> None:
        self.function, self.terms, self.call = function, terms, call

    # Dynamo cannot trace a function whose globals are not those of its module. It would not get
    # through the matching on the host either.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor], Any]:
        call = self.call
        if call is None or call.size is None:
            raise RuntimeError(
                "the loss of a harmonized model needs the size of its images: call the model (not "
                "its forward) with pixel_values"
            )
        kind: Any = _criterion(self.function)
        made: list[Any] = []

        def criterion(*args: Any, **kwargs: Any) -> Any:
            made.append(kind(*args, **kwargs))
            add_hook(made[0], _Criterion, self.terms)
            made[0].__dict__.update(_hqod_size=call.size, _hqod_last=None, _hqod_term=None)
            return made[0]

        function = types.FunctionType(
            self.function.__code__,
            {**self.function.__globals__, kind.__name__: criterion},
            self.function.__name__,
            self.function.__defaults__,
            self.function.__closure__,
        )
        function.__kwdefaults__ = self.function.__kwdefaults__
        loss, losses, others = function(*args, **kwargs)
        term = made[0].__dict__["_hqod_term"] if made else None
        if term is None:
            place = f"{self.function.__name__} has no boxes of the last layer from {kind.__name__}"
            raise gone(_Criterion, kind, place)
        call.added = True
        return loss + term, {**losses, KEY: term}, others


class _Criterion(Hook):
    tested = TESTED

    def forward(self, outputs: Any, targets: Any) -> Any:
        library: Any = super()
        # Auxiliary and denoising outputs, which have logits of their own, get no terms.
        self.__dict__["_hqod_last"] = outputs["logits"]
        return library.forward(outputs, targets)

    def loss_boxes(self, outputs: Any, targets: Any, indices: Any, num_boxes: Any) -> Any:
        library: Any = super()
        state = self.__dict__
        if outputs["logits"] is state["_hqod_last"]:
            with full_precision(outputs["logits"]):
                state["_hqod_term"] = self._terms(outputs, targets, indices, num_boxes)
        return library.loss_boxes(outputs, targets, indices, num_boxes)

    def _terms(self, outputs: Any, targets: Any, indices: Any, num_boxes: Any) -> Tensor:
        logits, predicted = outputs["logits"], outputs["pred_boxes"]
        image = torch.cat([torch.full_like(query, i) for i, (query, _) in enumerate(indices)])
        query = torch.cat([query for query, _ in indices])
        boxes, labels = (
            torch.cat([t[key][match] for t, (_, match) in zip(targets, indices, strict=True)])
            for key in ("boxes", "class_labels")
        )
        logits = wide(logits[image, query])
        softmax = _SOFTMAX[self._hqod_base.__name__]
        scores = logits.softmax(1) if softmax else logits
        return self._hqod_terms(
            _corners(wide(predicted[image, query]), *self.__dict__["_hqod_size"]),
            _corners(wide(boxes), *self.__dict__["_hqod_size"]),
            scores.gather(1, labels[:, None])[:, 0],
            num_boxes,
            logits=not softmax,
        )


class Network(DetectorNetwork):
    """The whole detector; there is nothing to select behind it."""

    def __init__(self, model: Any, outputs: str = "raw") -> None:
        # Its layers go by the names that they have there.
        self.parts = tuple(name for name, _ in model.named_children())  # type: ignore[misc]
        super().__init__(model, outputs)
        self._detector = [model]  # in a list: its layers are not to be registered a second time
        self._softmax = type(model).__name__ == "DetrForObjectDetection"

    def predict(self, images: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        found = self._detector[0](images)
        return (found.logits, found.pred_boxes), None

    def decode(
        self, images: Tensor, features: Any, raw: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        logits, boxes = raw
        scores = logits.softmax(-1)[..., :-1] if self._softmax else logits.sigmoid()
        return _corners(boxes, images.shape[-2], images.shape[-1]), scores


def _corners(boxes: Tensor, height: int, width: int) -> Tensor:
    """In pixels, from centres and sizes as fractions."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    scale = boxes.new_tensor([width, height, width, height])
    return torch.cat([centre - half, centre + half], -1) * scale


_CLASSES = ("class_labels_classifier", "class_embed", "enc_score_head")
_BOXES = ("bbox_predictor", "bbox_embed", "enc_bbox_head", "pre_bbox_head", "reg_conf")


class DETRAdapter(Adapter):
    """The first convolution, and the last layers of what predicts classes, boxes and quality."""

    network = Network

    def arguments(self, model: Any, batch: Any) -> dict[str, Any] | None:
        if not (isinstance(batch, Mapping) and "pixel_values" in batch):
            return None
        return {key: batch[key] for key in batch if model.training or key != "labels"}

    def first(self, model: nn.Module, layers: Sequence[str]) -> Sequence[str]:
        return layers[:1]

    def prediction(self, model: nn.Module, layers: Sequence[str]) -> Sequence[str]:
        last = {name.rpartition(".")[0]: name for name in layers if ".layers." in name}
        boxes = [name for stem, name in last.items() if set(_BOXES) & set(stem.split("."))]
        classes = [name for name in layers if set(_CLASSES) & set(name.split("."))]
        return classes + boxes


_MODELS = ("Detr", "DeformableDetr", "RTDetr", "RTDetrV2", "DFine")
ADAPTERS = dict.fromkeys((f"{name}ForObjectDetection" for name in _MODELS), DETRAdapter())
"""By class name."""
