"""FastestDet, a detector of 0.24 M parameters, as a module that loads its published weights.

ShuffleNetV2 0.5x, one output grid of stride 16, anchor-free.

Source: FastestDet, https://github.com/dog-qiuqiu/FastestDet (BSD-3).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms

SIZE = 352
"""Side of the input in pixels; images are stretched to the square."""
CLASSES = 80


def _unit(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    return nn.Conv2d(
        inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False
    )


class _Block(nn.Module):
    """A block of ShuffleNetV2."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        middle = outputs // 2
        self.stride = stride
        self.branch_main = nn.Sequential(
            _unit(inputs, middle),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            _unit(middle, middle, 3, stride, groups=middle),
            nn.BatchNorm2d(middle),
            _unit(middle, outputs - inputs),
            nn.BatchNorm2d(outputs - inputs),
            nn.ReLU(),
        )
        if stride == 2:
            self.branch_proj = nn.Sequential(
                _unit(inputs, inputs, 3, stride, groups=inputs),
                nn.BatchNorm2d(inputs),
                _unit(inputs, inputs),
                nn.BatchNorm2d(inputs),
                nn.ReLU(),
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            return torch.cat([self.branch_proj(x), self.branch_main(x)], dim=1)
        return torch.cat([x[:, 0::2], self.branch_main(x[:, 1::2])], dim=1)


class _Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(_unit(3, 24, 3, 2), nn.BatchNorm2d(24), nn.ReLU())
        inputs = 24
        for name, outputs, count in (("stage2", 48, 4), ("stage3", 96, 8), ("stage4", 192, 4)):
            blocks = [_Block(inputs, outputs, 2)]
            blocks += [_Block(outputs // 2, outputs, 1) for _ in range(count - 1)]
            self.add_module(name, nn.Sequential(*blocks))
            inputs = outputs

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.max_pool2d(self.first_conv(x), 3, 2, 1)
        low = self.stage2(x)
        middle = self.stage3(low)
        return low, middle, self.stage4(middle)


class _Conv1x1(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1x1 = nn.Sequential(_unit(inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1x1(x)


def _tower(channels: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [_unit(channels, channels, 5, groups=channels), nn.BatchNorm2d(channels)]
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


class _SPP(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.Conv1x1 = _Conv1x1(inputs, outputs)
        self.S1, self.S2, self.S3 = (_tower(outputs, depth) for depth in (1, 2, 3))
        self.output = nn.Sequential(_unit(3 * outputs, outputs), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv1x1(x)
        y = torch.cat([self.S1(x), self.S2(x), self.S3(x)], dim=1)
        return torch.relu(x + self.output(y))


class _Head(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv5x5 = nn.Sequential(
            _unit(inputs, inputs, 5, groups=inputs),
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            _unit(inputs, outputs),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv5x5(x)


class _Heads(nn.Module):
    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1x1 = _Conv1x1(channels, channels)
        self.obj_layers = _Head(channels, 1)
        self.reg_layers = _Head(channels, 4)
        self.cls_layers = _Head(channels, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.conv1x1(x)
        return self.obj_layers(x), self.reg_layers(x), self.cls_layers(x)


class FastestDet(nn.Module):
    """FastestDet: BGR images in [0, 1] to raw maps.

    Returns:
        tuple: objectness logits Tensor[B, 1, H, W], box offsets Tensor[B, 4, H, W] and class
        logits Tensor[B, 80, H, W], with H and W those of the images over 16.
    """

    qat_first = "backbone.first_conv.0"
    qat_prediction = tuple(f"detect_head.{name}_layers.conv5x5.3" for name in ("obj", "reg", "cls"))

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.backbone = _Backbone()
        self.SPP = _SPP(336, 96)
        self.detect_head = _Heads(96, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, middle, high = self.backbone(images)
        low = F.avg_pool2d(low, 3, 2, 1)
        high = F.interpolate(high, scale_factor=2)
        maps: tuple[Tensor, Tensor, Tensor] = self.detect_head(
            self.SPP(torch.cat([low, middle, high], dim=1))
        )
        return maps


def load_fastestdet(weights: Path) -> FastestDet:
    """The detector with its published weights, in eval mode."""
    model = FastestDet()
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval()


@torch.no_grad()
def decode(
    maps: tuple[Tensor, Tensor, Tensor],
    *,
    threshold: float = 0.001,
    iou: float = 0.45,
    limit: int = 100,
) -> list[dict[str, Tensor]]:
    """Detections of raw maps, one dict an image, boxes in pixels of the square input.

    Every cell gives one box with its best class: ``score = obj^0.6 cls^0.4``, then NMS per class.
    """
    objectness, offsets, logits = maps
    height, width = objectness.shape[-2:]
    classes = logits.softmax(dim=1).amax(dim=1), logits.argmax(dim=1)
    scores = objectness.sigmoid()[:, 0].pow(0.6) * classes[0].pow(0.4)
    gy, gx = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x = (offsets[:, 0].tanh() + gx) / width
    y = (offsets[:, 1].tanh() + gy) / height
    w, h = offsets[:, 2].sigmoid(), offsets[:, 3].sigmoid()
    boxes = SIZE * torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=-1)
    found = []
    for b, s, c in zip(boxes.flatten(1, 2), scores.flatten(1), classes[1].flatten(1), strict=True):
        keep = s > threshold
        b, s, c = b[keep].clamp(0, SIZE), s[keep], c[keep]
        kept = batched_nms(b, s, c, iou)[:limit]
        found.append({"boxes": b[kept], "scores": s[kept], "labels": c[kept]})
    return found
