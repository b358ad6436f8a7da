"""From images and targets of a data set to what a detector takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hqod_ops.detection.models.detector import Objects

_MEAN, _STD = 0.5, 0.25


def batch_images(images: Sequence[Tensor], device: torch.device, divisor: int) -> Tensor:
    """One normalised batch from images of any size, padded with grey at the right and the bottom.

    Args:
        images (sequence of Tensor[3, H_b, W_b]): values in [0, 1].
        device (torch.device): where the batch goes.
        divisor (int): height and width of the batch are multiples of it.

    Returns:
        Tensor[B, 3, H, W]: ``(x - 0.5) / 0.25``.

    Example:
        >>> import torch
        >>> from hqod_ops.training.batch import batch_images
        >>> images = [torch.zeros(3, 30, 20), torch.ones(3, 16, 16)]
        >>> batch_images(images, torch.device("cpu"), 16).shape
        torch.Size([2, 3, 32, 32])
    """
    return normalised(padded(images, divisor), device)


def padded(images: Sequence[Tensor], divisor: int) -> Tensor:
    """The first half of :func:`batch_images`, which can be done where images are loaded.

    Args:
        images (sequence of Tensor[3, H_b, W_b]), divisor (int): as there.

    Returns:
        Tensor[B, 3, H, W]: values in [0, 1], padded with grey.
    """
    height, width = (
        math.ceil(max(image.shape[side] for image in images) / divisor) * divisor for side in (1, 2)
    )
    batch = images[0].new_full((len(images), 3, height, width), _MEAN)
    for place, image in zip(batch, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return batch


class Padding:
    """``collate_fn`` of a loader: one padded batch of images, and the list of their targets.

    Args:
        divisor (int): see :func:`padded`.
    """

    def __init__(self, divisor: int) -> None:
        self.divisor = divisor

    def __call__(
        self, batch: Sequence[tuple[Tensor, dict[str, Any]]]
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        return padded([image for image, _ in batch], self.divisor), [target for _, target in batch]


def normalised(batch: Tensor, device: torch.device) -> Tensor:
    """The second half of :func:`batch_images`; changes the batch where it stays on its device.

    Args:
        batch (Tensor[B, 3, H, W]): values in [0, 1].
        device (torch.device): where it goes.
    """
    return batch.to(device, non_blocking=True).sub_(_MEAN).div_(_STD)


def training_targets(targets: Sequence[dict[str, Any]], device: torch.device) -> list[Objects]:
    """Boxes and labels to learn, without crowds and difficult objects.

    Args:
        targets (sequence of dict): targets of a :class:`hqod_ops.detection.data.DetectionDataset`.
        device (torch.device): where they go.
    """
    clean: list[Objects] = []
    for target in targets:
        keep = target["iscrowd"] == 0
        clean.append(
            {name: target[name][keep].to(device, non_blocking=True) for name in ("boxes", "labels")}
        )
    return clean
