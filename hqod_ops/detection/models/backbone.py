"""A ResNet of free width with a feature pyramid, from torchvision's blocks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FeaturePyramidNetwork


def _stage(in_channels: int, channels: int, depth: int) -> nn.Sequential:
    """``depth`` basic blocks, the first of which halves the resolution."""
    shortcut = nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel_size=1, stride=2, bias=False),
        nn.BatchNorm2d(channels),
    )
    blocks = [BasicBlock(in_channels, channels, stride=2, downsample=shortcut)]
    blocks += [BasicBlock(channels, channels) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)


class ResNetFPN(nn.Module):
    """A residual network for small images and the feature pyramid over its last stages.

    The stem is one 3x3 convolution of stride 2 (no pooling), so stage i has stride ``4 * 2**i``.

    Args:
        stem (int): channels of the stem.
        widths (sequence of int): channels of every stage.
        depths (sequence of int): basic blocks in every stage.
        levels (int): pyramid levels, one for each of the last stages.
        out_channels (int): channels of the pyramid.

    Attributes:
        strides (tuple of int): stride of every pyramid level, finest first.

    Source: ResNet (arXiv:1512.03385), FPN (arXiv:1612.03144).

    Example:
        >>> import torch
        >>> from hqod_ops.detection.models import ResNetFPN
        >>> net = ResNetFPN(8, (8, 16, 32), (1, 1, 1), levels=2, out_channels=16)
        >>> [tuple(f.shape) for f in net(torch.zeros(1, 3, 64, 64))], net.strides
        ([(1, 16, 8, 8), (1, 16, 4, 4)], (8, 16))
    """

    def __init__(
        self,
        stem: int,
        widths: Sequence[int],
        depths: Sequence[int],
        levels: int,
        out_channels: int,
    ) -> None:
        super().__init__()
        if len(widths) != len(depths):
            raise ValueError(
                f"depths: expected {len(widths)} values as in widths, got {len(depths)}"
            )
        if not 1 <= levels <= len(widths):
            raise ValueError(f"levels: expected a value in [1, {len(widths)}], got {levels}")
        self.stem = nn.Sequential(
            nn.Conv2d(3, stem, kernel_size=3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(stem),
            nn.ReLU(inplace=True),
        )
        inputs = [stem, *widths[:-1]]
        self.stages = nn.ModuleList(
            _stage(i, o, d) for i, o, d in zip(inputs, widths, depths, strict=True)
        )
        self.skipped = len(widths) - levels
        self.strides = tuple(4 * 2**i for i in range(self.skipped, len(widths)))
        self.fpn = FeaturePyramidNetwork(list(widths[self.skipped :]), out_channels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features of every level, finest first.

        Args:
            images (Tensor[B, 3, H, W]): normalised images.

        Returns:
            list of Tensor[B, out_channels, ceil(H / stride), ceil(W / stride)].
        """
        x = self.stem(images)
        features: OrderedDict[str, Tensor] = OrderedDict()
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index >= self.skipped:
                features[str(index)] = x
        return list(self.fpn(features).values())
