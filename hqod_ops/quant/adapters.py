"""What a detector tells about itself: its edge layers, the network that exports, how that decodes.

A user's class may declare the edge layers in attributes, ``qat_first`` and ``qat_prediction``. An
:class:`Adapter` speaks for a class that does not, such as a library's, and knows the network too.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hqod_ops import checks
from hqod_ops.quant.patterns import Patterns
from hqod_ops.quant.quantizers.calls import start_levels

__all__ = ["Adapter", "DetectorNetwork", "detection_network", "register_adapter"]

OUTPUTS = ("raw", "boxes")

_LIBRARIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "torchvision": (
        "hqod_ops.integrations.torchvision",
        ("RetinaNet", "FCOS", "SSD", "FasterRCNN", "MaskRCNN", "KeypointRCNN"),
    ),
    "ultralytics": (
        "hqod_ops.integrations.ultralytics",
        ("DetectionModel", "SegmentationModel", "PoseModel"),
    ),
    "transformers": (
        "hqod_ops.integrations.transformers",
        tuple(
            f"{n}ForObjectDetection"
            for n in ("Detr", "DeformableDetr", "RTDetr", "RTDetrV2", "DFine")
        ),
    ),
    "hqod_ops": ("hqod_ops.integrations.atss", ("ATSS",)),
}
"""By top-level package: the module whose ``ADAPTERS`` has the adapters by class name, imported when
such a model is met, and these names."""

_REGISTERED: dict[type[nn.Module], Adapter] = {}


class DetectorNetwork(nn.Module):
    """The part of a detector that is a function of tensors alone, and so can be exported.

    Subclasses say in :meth:`predict` and :meth:`decode` what the detector does with its parts.

    Args:
        model (nn.Module): the detector, whose layers are shared, under the names they have there.
        outputs (str): ``"raw"`` or ``"boxes"``. Default: ``"raw"``

    Attributes:
        parts (tuple of str): names of the modules of the detector that the network consists of.
        no_boxes (str): why the subclass has no :meth:`decode`, for the error.

    Raises:
        ValueError: ``"boxes"`` of a subclass without :meth:`decode`.
    """

    parts: ClassVar[tuple[str, ...]] = ()
    no_boxes: ClassVar[str] = "its adapter does not decode"

    def __init__(self, model: Any, outputs: str = "raw") -> None:
        super().__init__()
        if outputs != "raw" and type(self).decode is DetectorNetwork.decode:
            raise ValueError(
                f"outputs: of a {type(model).__name__} only 'raw' can be exported: {self.no_boxes}"
            )
        for name in self.parts:
            setattr(self, name, getattr(model, name))
        self.outputs = outputs
        self.train(model.training)
        self.register_forward_pre_hook(start_levels)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Raw predictions, or boxes clipped to the images and scores."""
        raw, features = self.predict(images)
        if self.outputs == "raw":
            return raw
        boxes, scores = self.decode(images, features, raw)
        limits = (images.shape[-1], images.shape[-2]) * 2
        sides = zip(boxes.unbind(-1), limits, strict=True)
        return torch.stack([side.clamp(0, limit) for side, limit in sides], dim=-1), scores

    def predict(self, images: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        """Raw predictions at every anchor, and what else :meth:`decode` needs."""
        raise NotImplementedError(f"{type(self).__name__}: predict is not defined")

    def decode(
        self, images: Tensor, features: Any, raw: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """Boxes Tensor[B, A, 4] in pixels and scores Tensor[B, A, classes] of what was predicted.

        The index of a class is the label that the detector gives it.
        """
        raise NotImplementedError(f"{type(self).__name__}: decode is not defined")


class Adapter:
    """What is known of a class of detectors; a subclass overrides what it knows.

    Attributes:
        network (type of DetectorNetwork, optional): the network of such a model. Default: None
    """

    network: type[DetectorNetwork] | None = None

    def first(self, model: nn.Module, layers: Sequence[str]) -> Patterns | None:
        """The layers whose input is the image.

        Args:
            model (nn.Module): the detector.
            layers (sequence of str): names in it of all layers that can be quantized, in order.

        Returns:
            str or sequence of str, optional: names or globs; None if they are not known.
        """
        return None

    def prediction(self, model: nn.Module, layers: Sequence[str]) -> Patterns | None:
        """The layers whose outputs are the predictions, as :meth:`first`."""
        return None

    def arguments(self, model: Any, batch: Any) -> tuple[Any, ...] | dict[str, Any] | None:
        """What a model is called with for a batch as its library's loaders make them.

        Args:
            model (nn.Module): the detector; in training mode it may want more than images.
            batch: such a batch, or something else.

        Returns:
            tuple or dict, optional: arguments or keyword arguments; None for a batch of a kind that
            the adapter does not know.
        """
        return None

    def prepared(self, model: nn.Module) -> None:
        """Called at the end of :func:`hqod_ops.quant.prepare_qat`: what the library must be told of
        a model with quantizers."""


def register_adapter(kind: type[nn.Module], adapter: Adapter) -> None:
    """Let an adapter speak for the models of a class, and of its subclasses without one.

    Args:
        kind (type): the class of the models.
        adapter (Adapter): replaces one that the class has.

    Raises:
        TypeError: kind is no class of modules, adapter is no Adapter.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from hqod_ops.quant import Adapter, DetectorNetwork, detection_network, register_adapter
        >>> class Detector(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body, self.cls, self.box = (nn.Conv2d(3, n, 1) for n in (3, 5, 4))
        >>> class Network(DetectorNetwork):
        ...     parts = ("body", "cls", "box")
        ...     def predict(self, images):
        ...         x = self.body(images)
        ...         return tuple(head(x).flatten(2).mT for head in (self.cls, self.box)), None
        ...     def decode(self, images, features, raw):
        ...         return raw[1].exp(), raw[0].sigmoid()
        >>> class DetectorAdapter(Adapter):
        ...     network = Network
        ...     def first(self, model, layers):
        ...         return "body"
        ...     def prediction(self, model, layers):
        ...         return "cls", "box"
        >>> register_adapter(Detector, DetectorAdapter())
        >>> network = detection_network(Detector(), "boxes")
        >>> [tuple(output.shape) for output in network(torch.rand(1, 3, 4, 4))]
        [(1, 16, 4), (1, 16, 5)]
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"kind: expected a class of modules, got {kind!r}")
    if not isinstance(adapter, Adapter):
        raise TypeError(f"adapter: expected an Adapter, got {adapter!r}")
    _REGISTERED[kind] = adapter


def find_adapter(model: nn.Module) -> Adapter | None:
    """The adapter of a model's class, or of the nearest of its bases that has one."""
    for kind in type(model).__mro__:
        if kind in _REGISTERED:
            return _REGISTERED[kind]
        module, names = _LIBRARIES.get(kind.__module__.partition(".")[0], ("", ()))
        if kind.__name__ in names:
            adapter: Adapter = importlib.import_module(module).ADAPTERS[kind.__name__]
            return adapter
    return None


def detection_network(model: nn.Module, outputs: str = "raw") -> nn.Module:
    """The network of a detector, images to predictions, for :func:`export_onnx`.

    Resizing and normalising come before it, selection and non-maximum suppression behind it. It
    shares the layers of the detector, under the same names.

    What is raw, and what of it there is to decode, stands in the modules of
    ``hqod_ops.integrations``, one a library. Boxes are (x1, y1, x2, y2) in pixels of the given
    images, clipped to them, Tensor[B, A, 4]; scores are Tensor[B, A, classes], and the index of a
    class is the label that the detector gives it.

    Args:
        model (nn.Module): a detector of a library there, or one whose class was given to
            :func:`register_adapter`; quantized or not.
        outputs (str): ``"raw"`` predictions, or decoded ``"boxes"``. Default: ``"raw"``

    Returns:
        nn.Module: called with images Tensor[B, 3, H, W] as the detector's backbone sees them.

    Raises:
        TypeError: another kind of model; the message lists those that are known.
        ValueError: unknown outputs, or ``"boxes"`` of a model that has only raw ones.
    """
    checks.module("model", model)
    if outputs not in OUTPUTS:
        raise ValueError(f"outputs: expected one of {', '.join(OUTPUTS)}, got {outputs!r}")
    adapter = find_adapter(model)
    if adapter is None or adapter.network is None:
        known = [f"{name}'s {', '.join(kinds)}" for name, (_, kinds) in _LIBRARIES.items()]
        known += [kind.__name__ for kind, own in _REGISTERED.items() if own.network is not None]
        raise TypeError(
            f"model: expected {'; '.join(known)}; or one of a class whose network was given to "
            f"register_adapter, got {type(model).__name__}"
        )
    return adapter.network(model, outputs)
