"""The whole path on torchvision's detectors: shared heads, and control flow that defies tracing."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hqod_ops.quant import calibrate, parameter_groups, prepare_qat, summary

pytestmark = pytest.mark.require("torchvision")


SIZES = {"min_size": 64, "max_size": 64}


def backbone() -> nn.Module:
    """A narrow residual network with a feature pyramid of five levels."""
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.resnet import BasicBlock

    body = nn.Sequential()
    body.add_module("conv1", nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False))
    body.add_module("relu", nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()))
    for index, width in enumerate((8, 16, 32, 64), start=1):
        narrow = max(width // 2, 8)
        shortcut = nn.Sequential(nn.Conv2d(narrow, width, 1, stride=2), nn.BatchNorm2d(width))
        body.add_module(f"layer{index}", BasicBlock(narrow, width, 2, shortcut))
    layers = {f"layer{index}": str(index - 1) for index in (1, 2, 3, 4)}
    return BackboneWithFPN(body, layers, [8, 16, 32, 64], out_channels=32)


def anchors() -> Any:
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    return AnchorGenerator(((8,), (16,), (32,), (64,), (64,)), ((1.0,),) * 5)


def retinanet() -> nn.Module:
    from torchvision.models.detection import RetinaNet

    return RetinaNet(backbone(), num_classes=3, anchor_generator=anchors(), **SIZES)


def fcos() -> nn.Module:
    from torchvision.models.detection import FCOS

    return FCOS(backbone(), num_classes=3, anchor_generator=anchors(), **SIZES)


def faster_rcnn() -> nn.Module:
    from torchvision.models.detection import FasterRCNN

    return FasterRCNN(backbone(), num_classes=3, rpn_anchor_generator=anchors(), **SIZES)


def batch(seed: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, 64, 64, generator=generator) for _ in range(2)]
    boxes = torch.tensor([[8.0, 8.0, 40.0, 40.0], [20.0, 16.0, 60.0, 52.0]])
    return images, [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in images]


def train(model: nn.Module, steps: int) -> list[float]:
    optimizer = torch.optim.SGD(parameter_groups(model, weight_decay=1e-4), lr=1e-3, momentum=0.9)
    model.train()
    losses = []
    for index in range(steps):
        torch.manual_seed(index)
        loss: Any = sum(model(*batch(0)).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("build", "predictions"),
    [
        (retinanet, ["head.classification_head.cls_logits", "head.regression_head.bbox_reg"]),
        (
            fcos,
            [
                "head.classification_head.cls_logits",
                "head.regression_head.bbox_reg",
                "head.regression_head.bbox_ctrness",
            ],
        ),
    ],
    ids=["RetinaNet", "FCOS"],
)
def test_one_stage_detector_from_float_to_trained(build: Any, predictions: list[str]) -> None:
    model = prepare_qat(build(), "hqod_w4a4")
    calibrate(model, [batch(1), batch(2)], progress=False)
    rows = {row.name: row for row in summary(model)}
    eight = [name for name, row in rows.items() if (row.weight_bits, row.act_bits) == (8, 8)]
    assert sorted(eight) == sorted(["backbone.body.conv1", *predictions])
    assert all(
        (row.weight_bits, row.act_bits) == (4, 4) for n, row in rows.items() if n not in eight
    )
    for name, row in rows.items():
        assert len(row.act_scales) == (5 if name.startswith("head.") else 1), name
    # The image is normalised, so signed; a ReLU is in front of each residual block.
    assert rows["backbone.body.conv1"].act_signed == (True,)
    assert rows["backbone.body.layer2.conv1"].act_signed == (False,)

    other = prepare_qat(build(), "hqod_w4a4")
    other.load_state_dict(model.state_dict())
    twin = copy.deepcopy(model)
    losses = train(model, steps=4)
    assert all(math.isfinite(loss) for loss in losses) and losses[-1] < losses[0]
    assert train(other, steps=1) == losses[:1]
    assert train(twin, steps=1) == losses[:1]
    model.eval()
    with torch.no_grad():
        detections = model(batch(0)[0])
    assert len(detections) == 2 and all(torch.isfinite(d["boxes"]).all() for d in detections)


def test_faster_rcnn_is_known() -> None:
    model = prepare_qat(faster_rcnn(), "hqod_w2a2")
    calibrate(model, [batch(1)], progress=False)
    eight = {row.name for row in summary(model) if row.act_bits == 8}
    assert eight == {
        "backbone.body.conv1",
        "rpn.head.cls_logits",
        "rpn.head.bbox_pred",
        "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred",
    }
    assert all(math.isfinite(loss) for loss in train(model, steps=1))
