"""Export of detectors: torchvision's and ATSS, small, with random weights."""

from __future__ import annotations

import copy
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hqod_ops.quant import LevelBatchNorm2d, calibrate, prepare_qat
from hqod_ops.quant.dataflow.producers import place_on_producers
from hqod_ops.quant.export import NMS, detection_network, export_onnx
from hqod_ops.quant.export.evaluate import usable_opset
from python_tests.onnx_run import run

pytestmark = pytest.mark.require("onnx", "onnxruntime", "onnxscript", "torchvision")

SIZES: dict[str, Any] = {"min_size": 32, "max_size": 32, "num_classes": 3}


class Backbone(nn.Module):
    """Two levels, of strides 4 and 8."""

    out_channels = 32

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU())
        self.fine = nn.Conv2d(8, 32, 1)
        self.coarse = nn.Sequential(nn.Conv2d(8, 32, 3, stride=2, padding=1), nn.ReLU6())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        return OrderedDict([("0", self.fine(x)), ("1", self.coarse(x))])


def anchors() -> Any:
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    return AnchorGenerator(((8,), (16,)), ((1.0,),) * 2)


def retinanet(**changes: Any) -> nn.Module:
    from torchvision.models.detection import RetinaNet

    return RetinaNet(Backbone(), anchor_generator=anchors(), **SIZES, **changes)


def aqd_retinanet() -> nn.Module:
    """A head with a batch norm for each level, whose statistics differ."""
    from torchvision.models.detection.retinanet import RetinaNetHead

    norm = partial(LevelBatchNorm2d, levels=2)
    model = retinanet(head=RetinaNetHead(32, 1, 3, norm_layer=norm))
    for module in model.modules():
        if isinstance(module, LevelBatchNorm2d):
            for level, bn in enumerate(module.norms):
                nn.init.constant_(bn.running_mean, -level)
    return model


def fcos() -> nn.Module:
    from torchvision.models.detection import FCOS

    return FCOS(Backbone(), anchor_generator=anchors(), **SIZES)


def ssdlite() -> nn.Module:
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
    from torchvision.models.detection.ssd import SSD
    from torchvision.models.detection.ssdlite import SSDLiteHead

    boxes = DefaultBoxGenerator([[2], [2]], min_ratio=0.2, max_ratio=0.9)
    head = SSDLiteHead([32, 32], boxes.num_anchors_per_location(), 3, nn.BatchNorm2d)
    return SSD(Backbone(), boxes, (32, 32), num_classes=3, head=head)


def ssdlite320() -> nn.Module:
    """torchvision's own, on MobileNetV3."""
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    return ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)


def faster_rcnn() -> nn.Module:
    from torchvision.models.detection import FasterRCNN

    return FasterRCNN(Backbone(), rpn_anchor_generator=anchors(), **SIZES)


def atss() -> nn.Module:
    from hqod_ops.detection.models.atss import ATSS
    from hqod_ops.training.settings import ModelConfig

    config = ModelConfig(widths=(8, 16), depths=(1, 1), channels=16, head_depth=1)
    return ATSS(config, num_classes=3)


def calibrated(build: Any, config: str = "hqod_w4a4", producers: bool = False) -> nn.Module:
    """A calibrated detector."""
    torch.manual_seed(0)
    model = build().eval()
    prepared = model.network if build is atss else model
    edges = {"first": "backbone.stem.0", "prediction": ()} if build is ssdlite else {}
    prepare_qat(prepared, config, **edges)
    if producers:
        assert place_on_producers(prepared).placed
    images = torch.randn(2, 3, 32, 32) if build is atss else list(torch.rand(2, 3, 32, 32))
    calibrate(prepared, [images], progress=False)
    return model


@pytest.mark.parametrize(
    ("build", "config", "producers"),
    [
        (retinanet, "hqod_w2a2", False),
        (fcos, "hqod_w4a4", True),
        (ssdlite, "hqod_w4a4", False),
        (atss, "hqod_w2a2", True),
    ],
    ids=["RetinaNet", "FCOS", "SSDLite", "ATSS"],
)
def test_network_of_a_one_stage_detector(
    build: Any, config: str, producers: bool, tmp_path: Path
) -> None:
    model = calibrated(build, config, producers)
    network = detection_network(model)
    x = torch.randn(2, 3, 32, 32)
    report = export_onnx(network, x, tmp_path / "m.onnx", target="smallest")
    assert report.evaluator.startswith("onnxruntime") and "without" not in report.evaluator
    assert report.steps <= 1 and report.opset == (usable_opset() if config == "hqod_w2a2" else 21)
    assert report.storage["INT8"] >= 1  # the first convolution's
    with torch.no_grad():
        expected = network(x)
    for ours, theirs in zip(run(report.path, x), expected, strict=True):
        assert np.linalg.norm(ours - theirs.numpy()) <= 0.05 * np.linalg.norm(theirs.numpy())


@pytest.mark.parametrize("build", [retinanet, aqd_retinanet])
def test_a_network_starts_every_call_and_every_export_anew(build: Any) -> None:
    model, images = calibrated(build), list(torch.rand(2, 3, 32, 32))
    network, x = detection_network(model), model.transform(images)[0].tensors
    with torch.no_grad():
        first = network(x)
        model(images)
        again = [network(x), copy.deepcopy(network)(x)]
        again += [torch.export.export(network, (x,), strict=s).module()(x) for s in (False, True)]
    for outputs in again:
        assert all(torch.equal(a, b) for a, b in zip(first, outputs, strict=True))


def test_network_of_faster_rcnn(tmp_path: Path) -> None:
    network = detection_network(calibrated(faster_rcnn))
    corners = torch.rand(1, 6, 2) * 16
    proposals = torch.cat([corners, corners + 4 + torch.rand(1, 6, 2) * 12], dim=-1)
    example = (torch.randn(1, 3, 32, 32), proposals)
    report = export_onnx(network, example, tmp_path / "m.onnx")
    assert report.evaluator.startswith("onnxruntime") and report.steps <= 1
    shapes = [output.shape for output in run(report.path, *example)]
    assert shapes == [(1, 80), (1, 80, 4), (1, 6, 3), (1, 6, 12)]
    with pytest.raises(
        ValueError, match="of a FasterRCNN only 'raw' can be exported: which proposals"
    ):
        detection_network(faster_rcnn(), "boxes")


@pytest.mark.parametrize("build", [retinanet, fcos, ssdlite, atss])
def test_decoded_boxes_are_those_of_the_detector(build: Any) -> None:
    torch.manual_seed(0)
    model = build().eval()
    for name, parameter in model.named_parameters():
        if "cls" in name or "classification_head" in name:
            nn.init.normal_(parameter, std=0.2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    images = torch.rand(2, 3, 32, 32)
    settings: dict[str, Any] = {"score_thresh": 0.4, "nms_thresh": 0.5, "topk_candidates": 10_000}
    with torch.no_grad():
        if build is atss:
            from hqod_ops.training.settings import TestConfig

            config = TestConfig(score_threshold=0.0, nms_iou=0.5, max_detections=10_000)
            found, inputs = model.detect(images, config), images
        else:
            for name, value in {**settings, "detections_per_img": 10_000}.items():
                setattr(model, name, value)
            found, inputs = model(list(images)), model.transform(list(images))[0].tensors
        boxes, scores = detection_network(model, "boxes")(inputs)
    assert all(len(detections["boxes"]) > 3 for detections in found)
    for detections, box, score in zip(found, boxes, scores, strict=True):
        for b, s, label in zip(
            *(detections[k] for k in ("boxes", "scores", "labels")), strict=True
        ):
            near = (box - b).abs().amax(dim=1) < 1e-3
            assert bool(((score[:, label] - s).abs()[near] < 1e-4).any())


def test_non_maximum_suppression_in_the_file(tmp_path: Path) -> None:
    from torchvision.ops import batched_nms

    model = calibrated(atss)
    nn.init.normal_(model.get_parameter("network.head.cls_pred.bias"))
    network, x = detection_network(model, "boxes"), torch.randn(2, 3, 32, 32)
    settings = NMS(score=0.2, iou=0.4, per_class=50)
    report = export_onnx(network, x, tmp_path / "m.onnx", nms=settings)
    found_boxes, found_scores, found_labels, found_images = run(report.path, x)
    with torch.no_grad():
        boxes, scores = network(x)
    for image in range(2):
        place, labels = (scores[image] > settings.score).nonzero().unbind(1)
        kept = batched_nms(boxes[image, place], scores[image, place, labels], labels, settings.iou)
        assert len(kept) > 3
        mine = found_images == image
        order = np.argsort(-found_scores[mine], kind="stable")
        expected = scores[image, place, labels][kept].numpy()
        assert np.allclose(found_scores[mine][order], expected, atol=1e-5)
        assert sorted(found_labels[mine]) == sorted(labels[kept].tolist())
        assert np.allclose(
            found_boxes[mine][order].sum(), boxes[image, place][kept].sum(), rtol=1e-4
        )


def prepared(model: nn.Module, build: Any) -> nn.Module:
    """A detector whose part that is quantized is prepared."""
    edges = {"first": "backbone.stem.0", "prediction": ()} if build is ssdlite else {}
    prepare_qat(model.network if build is atss else model, "hqod_w4a4", **edges)
    return model


def losses_of(model: nn.Module, images: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
    if hasattr(model, "losses"):
        from hqod_ops.detection.models.losses import total
        from hqod_ops.training.settings import LossConfig

        return total(model.losses(images, targets, LossConfig(hqod=True)))
    return sum(model(list(images), targets).values())


@torch.no_grad()
def detections_of(model: nn.Module, images: Tensor) -> list[dict[str, Tensor]]:
    return model.detect(images) if hasattr(model, "detect") else model(list(images))


@pytest.mark.parametrize("build", [retinanet, fcos, ssdlite, ssdlite320, faster_rcnn, atss])
def test_from_float_to_a_file(build: Any, tmp_path: Path) -> None:
    """Prepared, calibrated, trained, saved, loaded, evaluated, exported."""
    torch.manual_seed(0)
    side = 320 if build is ssdlite320 else 32
    model, images = build(), torch.rand(2, 3, side, side)
    corners = torch.tensor([[4.0, 4.0, 20.0, 20.0], [10.0, 8.0, 30.0, 28.0]]) * side / 32
    targets = [{"boxes": corners, "labels": torch.tensor([1, 2])} for _ in range(2)]
    for module in model.modules():  # statistics as after a training, or activations vanish
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    losses_of(model.train(), images, targets)
    prepared(model, build)
    for name, parameter in model.named_parameters():  # scores of all sizes, so that there are boxes
        if name.endswith("weight") and ("cls" in name or "classification_head" in name):
            nn.init.normal_(parameter, std=0.2)
        if name.endswith("bias") and ("cls_logits" in name or "cls_pred" in name):
            nn.init.zeros_(parameter)
    part = model.network if build is atss else model
    calibrate(part.eval(), [images if build is atss else list(images)], progress=False)

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        losses_of(model, images, targets).backward()
        optimizer.step()
    assert any(not torch.equal(before[name], v) for name, v in model.state_dict().items())
    torch.save(model.state_dict(), tmp_path / "model.pt")

    loaded = prepared(build(), build)
    loaded.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    pairs = [detections_of(m.eval(), images) for m in (loaded, model)]
    for found, expected in zip(*pairs, strict=True):
        assert len(expected["boxes"]) > 0
        assert all(torch.equal(found[key], expected[key]) for key in expected)

    example: Any = torch.randn(1, 3, side, side)
    if build is faster_rcnn:
        example = (example, torch.tensor([[[2.0, 2.0, 20.0, 24.0], [5.0, 5.0, 30.0, 30.0]]]))
    report = export_onnx(detection_network(loaded), example, tmp_path / "model.onnx")
    assert report.steps <= 1
