"""The dense head of ATSS, shared by all pyramid levels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

PRIOR = 0.01
"""Score of every class at the start of training, which keeps the focal loss of background small."""


class Scale(nn.Module):
    """A learned factor, one a pyramid level: the shared box branch predicts in units of its level.

    Example:
        >>> import torch
        >>> from hqod_ops.detection.models import Scale
        >>> Scale()(torch.tensor([2.0])).tolist()
        [2.0]
    """

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def _tower(channels: int, depth: int, groups: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        layers += [conv, nn.GroupNorm(groups, channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _predictor(channels: int, outputs: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, outputs, kernel_size=3, padding=1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


class ATSSHead(nn.Module):
    """Classification, box and centerness branches over every level, with one set of weights.

    Group normalisation, as in ATSS: levels differ in their statistics, so one batch normalisation
    for all of them would fit none.

    Args:
        channels (int): channels of the pyramid.
        num_classes (int): number of classes, background not counted.
        levels (int): number of pyramid levels.
        depth (int): 3x3 convolutions in each of the two towers.
        groups (int): groups of the normalisation; must divide channels.

    Source: ATSS (arXiv:1912.02424).

    Example:
        >>> import torch
        >>> from hqod_ops.detection.models import ATSSHead
        >>> head = ATSSHead(16, num_classes=10, levels=2, depth=1, groups=4)
        >>> [tuple(o.shape) for o in head([torch.zeros(2, 16, 4, 4), torch.zeros(2, 16, 2, 2)])]
        [(2, 20, 10), (2, 20, 4), (2, 20)]
    """

    def __init__(
        self, channels: int, num_classes: int, levels: int, depth: int, groups: int
    ) -> None:
        super().__init__()
        if channels % groups:
            raise ValueError(f"groups: expected a divisor of {channels} channels, got {groups}")
        self.cls_tower = _tower(channels, depth, groups)
        self.box_tower = _tower(channels, depth, groups)
        self.cls_pred = _predictor(channels, num_classes)
        self.box_pred = _predictor(channels, 4)
        self.centerness_pred = _predictor(channels, 1)
        nn.init.constant_(self.cls_pred.bias, -math.log(1 / PRIOR - 1))  # type: ignore[arg-type]
        self.scales = nn.ModuleList(Scale() for _ in range(levels))

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Predictions at every place of every level, levels one after the other.

        Args:
            features (sequence of Tensor[B, channels, H_i, W_i]): pyramid levels, finest first.

        Returns:
            tuple: class logits Tensor[B, A, num_classes], box deltas Tensor[B, A, 4], centerness
            logits Tensor[B, A], with A the sum of H_i * W_i.
        """
        logits, deltas, centerness = [], [], []
        for x, scale in zip(features, self.scales, strict=True):
            cls, box = self.cls_tower(x), self.box_tower(x)
            logits.append(self.cls_pred(cls).flatten(2))
            deltas.append(scale(self.box_pred(box)).flatten(2))
            centerness.append(self.centerness_pred(box).flatten(1))
        return (
            torch.cat(logits, dim=2).transpose(1, 2),
            torch.cat(deltas, dim=2).transpose(1, 2),
            torch.cat(centerness, dim=1),
        )
