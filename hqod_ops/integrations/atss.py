"""What is known of the project's own ATSS.

Raw are class logits Tensor[B, A, classes], deltas Tensor[B, A, 4] and centerness Tensor[B, A];
scores are the class score times the centerness. The edge layers are declared by its network.

Example:
    >>> import torch
    >>> from hqod_ops.detection.models.atss import ATSS
    >>> from hqod_ops.training.settings import ModelConfig
    >>> from hqod_ops.quant.export import detection_network
    >>> network = detection_network(ATSS(ModelConfig(), num_classes=10).eval(), "boxes")
    >>> [tuple(output.shape) for output in network(torch.rand(1, 3, 32, 32))]
    [(1, 20, 4), (1, 20, 10)]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hqod_ops.quant.adapters import Adapter, DetectorNetwork


class Network(DetectorNetwork):
    """Predictions at every anchor."""

    parts = ("network",)
    network: nn.Module

    def __init__(self, model: Any, outputs: str = "raw") -> None:
        super().__init__(model, outputs)
        self._detector = [model]  # in a list: its layers are not to be registered a second time

    def predict(self, images: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        logits, deltas, centerness = self.network(images)
        return (logits, deltas, centerness), None

    def decode(
        self, images: Tensor, features: Any, raw: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        logits, deltas, centerness = raw
        detector = self._detector[0]
        anchors = torch.cat(detector.anchors(images))
        boxes = torch.stack([detector.decode(d, anchors) for d in deltas])
        return boxes, logits.sigmoid() * centerness.sigmoid()[..., None]


class ATSSAdapter(Adapter):
    """The network that exports."""

    network = Network


ADAPTERS = {"ATSS": ATSSAdapter()}
"""By class name."""
