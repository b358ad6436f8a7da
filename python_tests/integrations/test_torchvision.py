"""The whole path on detectors: shared heads, and control flow that defies tracing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hqod_ops.quant import (
    QATLayer,
    calibrate,
    float_state_dict,
    load_float_state_dict,
    parameter_groups,
    prepare_qat,
    summary,
)
from hqod_ops.quant.config.plan import plan_qat
from hqod_ops.quant.nn.level_norm import LevelBatchNorm2d

pytestmark = pytest.mark.require("torchvision")


SIZES = {"min_size": 64, "max_size": 64}
CLASSIFICATION, REGRESSION = "head.classification_head.", "head.regression_head."


def body() -> nn.Sequential:
    """A narrow residual network."""
    from torchvision.models.resnet import BasicBlock

    body = nn.Sequential()
    body.add_module("conv1", nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False))
    body.add_module("relu", nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()))
    for index, width in enumerate((8, 16, 32, 64), start=1):
        narrow = max(width // 2, 8)
        shortcut = nn.Sequential(nn.Conv2d(narrow, width, 1, stride=2), nn.BatchNorm2d(width))
        body.add_module(f"layer{index}", BasicBlock(narrow, width, 2, shortcut))
    return body


def backbone() -> nn.Module:
    """With a feature pyramid of five levels."""
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    layers = {f"layer{index}": str(index - 1) for index in (1, 2, 3, 4)}
    return BackboneWithFPN(body(), layers, [8, 16, 32, 64], out_channels=32)


def anchors() -> Any:
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    return AnchorGenerator(((8,), (16,), (32,), (64,), (64,)), ((1.0,),) * 5)


def retinanet(**changes: Any) -> nn.Module:
    from torchvision.models.detection import RetinaNet

    return RetinaNet(backbone(), num_classes=3, anchor_generator=anchors(), **SIZES, **changes)


def aqd_retinanet() -> nn.Module:
    """A head with a batch norm for each level."""
    from torchvision.models.detection.retinanet import RetinaNetHead

    norm = partial(LevelBatchNorm2d, levels=5)
    return retinanet(head=RetinaNetHead(32, 1, 3, norm_layer=norm))


def fcos() -> nn.Module:
    from torchvision.models.detection import FCOS

    return FCOS(backbone(), num_classes=3, anchor_generator=anchors(), **SIZES)


def faster_rcnn() -> nn.Module:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

    return FasterRCNN(
        backbone(),
        rpn_anchor_generator=anchors(),
        box_head=TwoMLPHead(32 * 7 * 7, 16),
        box_predictor=FastRCNNPredictor(16, 3),
        **SIZES,
    )


def ssdlite() -> nn.Module:
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
    from torchvision.models.detection.ssd import SSD
    from torchvision.models.detection.ssdlite import SSDLiteHead

    features = IntermediateLayerGetter(body(), {"layer3": "0", "layer4": "1"})
    boxes = DefaultBoxGenerator([[2], [2]], min_ratio=20, max_ratio=90)
    head = SSDLiteHead([32, 64], boxes.num_anchors_per_location(), 3, nn.BatchNorm2d)
    return SSD(features, boxes, (64, 64), num_classes=3, head=head)


class Trained(nn.Module):
    """The project's ATSS, called as torchvision's detectors are."""

    def __init__(self) -> None:
        from hqod_ops.detection.models.atss import ATSS
        from hqod_ops.training.settings import ModelConfig

        super().__init__()
        config = ModelConfig(stem=8, widths=(8, 8, 16), channels=8, head_depth=1, groups=2)
        self.detector = ATSS(config, num_classes=3)

    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        from hqod_ops.training.settings import LossConfig

        stack = (torch.stack(images) - 0.5) / 0.25
        if targets is None:
            return self.detector.detect(stack)
        return self.detector.losses(stack, targets, LossConfig(hqod=True))


RCNN = ("rpn.head.cls_logits", "rpn.head.bbox_pred")
BOX = ("roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred")
RETINA = (CLASSIFICATION + "cls_logits", REGRESSION + "bbox_reg")
SSD = tuple(f"{head}module_list.{i}.1" for head in (CLASSIFICATION, REGRESSION) for i in (0, 1))

# name: detector, first layer, prediction layers, levels of the layers whose names start with "head"
DETECTORS: dict[str, tuple[Callable[[], nn.Module], str, tuple[str, ...], int]] = {
    "RetinaNet": (retinanet, "backbone.body.conv1", RETINA, 5),
    "RetinaNet with AQD": (aqd_retinanet, "backbone.body.conv1", RETINA, 5),
    "FCOS": (fcos, "backbone.body.conv1", (*RETINA, REGRESSION + "bbox_ctrness"), 5),
    "Faster R-CNN": (faster_rcnn, "backbone.body.conv1", (*RCNN, *BOX), 5),
    "SSDLite": (ssdlite, "backbone.conv1", SSD, 1),
    "ATSS": (
        Trained,
        "detector.network.backbone.stem.0",
        tuple(f"detector.network.head.{n}_pred" for n in ("cls", "box", "centerness")),
        2,
    ),
}


def batch(seed: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, 64, 64, generator=generator) for _ in range(2)]
    boxes = torch.tensor([[8.0, 8.0, 40.0, 40.0], [20.0, 16.0, 60.0, 52.0]])
    return images, [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in images]


def train(model: nn.Module, steps: int, amp: bool = False) -> list[float]:
    optimizer = torch.optim.SGD(parameter_groups(model, weight_decay=1e-4), lr=1e-3, momentum=0.9)
    model.train()
    losses = []
    for index in range(steps):
        torch.manual_seed(index)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss: Any = sum(model(*batch(0)).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def made(name: str, preset: str = "hqod_w4a4", **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    model = prepare_qat(DETECTORS[name][0](), preset, **changes)
    return calibrate(model, [batch(1), batch(2)], progress=False)


@pytest.mark.parametrize("name", DETECTORS)
def test_from_float_to_trained(name: str, tmp_path: Path) -> None:
    build, first, predictions, levels = DETECTORS[name]
    model = made(name)
    rows = {row.name: row for row in summary(model)}
    eight = [name for name, row in rows.items() if (row.weight_bits, row.act_bits) == (8, 8)]
    assert sorted(eight) == sorted([first, *predictions])
    assert all(
        (row.weight_bits, row.act_bits) == (4, 4) for n, row in rows.items() if n not in eight
    )
    for key, row in rows.items():
        shared = ".head." in f".{key}"
        assert len(row.act_scales) == (levels if shared else 1), key
    # The image is normalised, so signed.
    assert rows[first].act_signed == (True,)

    other = prepare_qat(build(), "hqod_w4a4")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other.load_state_dict(torch.load(tmp_path / "model.pt"))
    twin, together = copy.deepcopy(model), made(name, foreach=True)
    losses = train(model, steps=4)
    assert all(math.isfinite(loss) for loss in losses) and losses[-1] < losses[0]
    for copied in (other, twin, together):
        assert train(copied, steps=1) == losses[:1]
    assert all(math.isfinite(loss) for loss in train(twin, steps=1, amp=True))
    model.eval()
    with torch.no_grad():
        detections = model(batch(0)[0])
    assert len(detections) == 2 and all(torch.isfinite(d["boxes"]).all() for d in detections)


@pytest.mark.parametrize("name", ["RetinaNet", "SSDLite"])
def test_float_weights_come_and_go(name: str) -> None:
    build = DETECTORS[name][0]
    source, model = build(), made(name)
    load_float_state_dict(model, source.state_dict())
    state = float_state_dict(model)
    assert all(torch.equal(value, state[key]) for key, value in source.state_dict().items())
    build().load_state_dict(state)


def test_edges_of_torchvisions_own_builders() -> None:
    from torchvision.models import detection

    expected = {
        "retinanet_resnet50_fpn_v2": ("backbone.body.conv1", set(RETINA)),
        "fcos_resnet50_fpn": (
            "backbone.body.conv1",
            {*RETINA, REGRESSION + "bbox_ctrness"},
        ),
        "fasterrcnn_mobilenet_v3_large_fpn": ("backbone.body.0.0", {*RCNN, *BOX}),
        "maskrcnn_resnet50_fpn": (
            "backbone.body.conv1",
            {*RCNN, *BOX, "roi_heads.mask_predictor.mask_fcn_logits"},
        ),
        "keypointrcnn_resnet50_fpn": (
            "backbone.body.conv1",
            {*RCNN, *BOX, "roi_heads.keypoint_predictor.kps_score_lowres"},
        ),
        "ssd300_vgg16": (
            "backbone.features.0",
            {f"{h}module_list.{i}" for h in (CLASSIFICATION, REGRESSION) for i in range(6)},
        ),
        "ssdlite320_mobilenet_v3_large": (
            "backbone.features.0.0.0",
            {f"{h}module_list.{i}.1" for h in (CLASSIFICATION, REGRESSION) for i in range(6)},
        ),
    }
    for name, (first, predictions) in expected.items():
        with torch.device("meta"):
            model = getattr(detection, name)(weights=None, weights_backbone=None)
        wrapped = nn.ModuleDict({"model": model})
        for prefix, module in (("", model), ("model.", wrapped)):
            plan = plan_qat(module)
            eight = {name for name, layer in plan.items() if layer.weight_bits == 8}
            assert eight == {prefix + layer for layer in (first, *predictions)}, name
        assert not any(isinstance(m, QATLayer) for m in model.modules())
