"""Backbone, pyramid and head in one traceable module."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from hqod_ops.detection.models.backbone import ResNetFPN
from hqod_ops.detection.models.head import ATSSHead
from hqod_ops.detection.models.options import ModelConfig


class RawOutputs(NamedTuple):
    """What the network predicts at every anchor, before decoding."""

    logits: Tensor
    """Tensor[B, A, num_classes]: class logits."""
    deltas: Tensor
    """Tensor[B, A, 4]: boxes, encoded against their anchors."""
    centerness: Tensor
    """Tensor[B, A]: centerness logits."""


class ATSSNetwork(nn.Module):
    """ResNet, FPN and ATSS head: a function of tensors alone, the part that is quantized.

    It names the layers that keep more bits, for :func:`hqod_ops.quant.prepare_qat`.

    Args:
        config (ModelConfig): widths and depths.
        num_classes (int): number of classes, background not counted.

    Example:
        >>> import torch
        >>> from hqod_ops.detection.models.options import ModelConfig
        >>> from hqod_ops.detection.models import ATSSNetwork
        >>> net = ATSSNetwork(ModelConfig(), num_classes=10)
        >>> net(torch.zeros(1, 3, 32, 32))[0].shape[-1]
        10
    """

    qat_first: ClassVar[str] = "backbone.stem.0"
    qat_prediction: ClassVar[str] = "head.*_pred"

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        self.backbone = ResNetFPN(
            config.stem, config.widths, config.depths, config.levels, config.channels
        )
        self.head = ATSSHead(
            config.channels, num_classes, config.levels, config.head_depth, config.groups
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Class logits, box deltas and centerness logits: see :class:`RawOutputs`.

        Args:
            images (Tensor[B, 3, H, W]): normalised images.
        """
        outputs: tuple[Tensor, Tensor, Tensor] = self.head(self.backbone(images))
        return outputs
