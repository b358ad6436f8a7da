"""What training and evaluation need of a detector, whatever its kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from torch import Tensor, nn

Objects: TypeAlias = Mapping[str, Tensor]
"""The objects of an image: ``boxes`` Tensor[G, 4] in pixels, ``labels`` Tensor[G] int64."""

Detections: TypeAlias = dict[str, Tensor]
"""Detections of an image, best first: ``boxes`` Tensor[N, 4] in pixels, ``scores``, ``labels``."""


class Detector(nn.Module, ABC):
    """A detector that can be trained, quantized and evaluated.

    Attributes:
        network (nn.Module): the part that is quantized, images to raw predictions.
        stride (int): height and width of a batch are multiples of it.
    """

    network: nn.Module
    stride: int

    @abstractmethod
    def losses(self, images: Tensor, targets: Sequence[Objects]) -> dict[str, Tensor]:
        """The training loss, term by term.

        Args:
            images (Tensor[B, 3, H, W]): normalised images.
            targets (sequence of mapping): the objects of each image.

        Returns:
            dict of Tensor[]: the terms; the loss is their sum.
        """

    @abstractmethod
    def detect(self, images: Tensor) -> list[Detections]:
        """Detections of a batch of images.

        Args:
            images (Tensor[B, 3, H, W]): normalised images.

        Returns:
            list of dict: ``boxes`` Tensor[N, 4] in pixels, ``scores``, ``labels`` Tensor[N], best
            first.
        """
