"""Whole detectors whose activations are quantized where they are made."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hqod_ops.quant import QATConfig, calibrate, placement, prepare_qat
from hqod_ops.quant.dataflow.producers import place_on_producers
from python_tests.integrations import test_torchvision as detectors

pytestmark = pytest.mark.require("torchvision")


def small_ssdlite() -> nn.Module:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    transform = model.transform
    transform.min_size, transform.max_size, transform.fixed_size = (64,), 64, (64, 64)
    return model  # type: ignore[no-any-return]


class ATSSLosses(nn.Module):
    """The project's ATSS behind the interface of torchvision's detectors."""

    def __init__(self) -> None:
        from hqod_ops.detection.models.atss import ATSS
        from hqod_ops.training.settings import LossConfig, ModelConfig

        super().__init__()
        self.loss = LossConfig(hqod=True)
        self.detector = ATSS(ModelConfig(), num_classes=3)
        self.qat_first, self.qat_prediction = "detector.network.*stem.0", "detector.*_pred"

    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        batch = torch.stack(list(images))
        if targets is None:
            return self.detector(batch)
        return self.detector.losses(batch, targets, self.loss)


@pytest.mark.parametrize(
    ("build", "absorbed", "left"),
    [
        (detectors.retinanet, 17, {"backbone.body.conv1"}),
        (detectors.fcos, 17, {"backbone.body.conv1"}),
        (
            detectors.faster_rcnn,
            11,
            {
                "backbone.body.conv1",
                "rpn.head.conv.0.0",
                "roi_heads.box_predictor.cls_score",
                "roi_heads.box_predictor.bbox_pred",
            },
        ),
        (small_ssdlite, 40, {"backbone.features.0.0.0"}),
        (ATSSLosses, 11, {"detector.network.backbone.stem.0"}),
    ],
    ids=["RetinaNet", "FCOS", "Faster R-CNN", "SSDLite", "ATSS"],
)
def test_absorbed_and_pair_are_equal(build: Any, absorbed: int, left: set[str]) -> None:
    """Losses and the gradients of all parameters, to the bit."""
    torch.manual_seed(0)
    plain = build()
    results = []
    for absorb in (True, False):
        model = prepare_qat(copy.deepcopy(plain), "hqod_w4a4")
        report = place_on_producers(model, absorb_relu=absorb)
        assert sum(entry.absorbed is not None for entry in report.placed) == absorbed * absorb
        assert set(report.not_placed) == left
        calibrate(model, [detectors.batch(1)], progress=False)
        torch.manual_seed(0)
        losses = model.train()(*detectors.batch(0))
        sum(losses.values()).backward()
        results.append([*losses.values(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert a is b is None or torch.equal(a, b)


def test_the_pyramid_is_quantized_once_for_both_towers() -> None:
    model = prepare_qat(detectors.retinanet(), "hqod_w4a4")
    report = place_on_producers(model)
    calibrate(model, [detectors.batch(1)], progress=False)
    head = ("head.classification_head.conv.0.0", "head.regression_head.conv.0.0")
    (entry,) = [entry for entry in report.placed if entry.readers == head]
    assert len(entry.producers) == 5
    quantizer = model.head.classification_head.conv[0][0].input_quantizer
    assert quantizer.levels == 5
    # Levels are numbered as they are made, top down.
    images = model.transform([*detectors.batch(0)[0]])[0].tensors
    model.eval()
    quantizer.reset_level()
    features = list(model.backbone(images).values())
    for level, feature in enumerate([*reversed(features[:4]), features[4]]):
        codes = feature / quantizer.effective_scale(level)
        torch.testing.assert_close(codes, codes.round())


class Branching(nn.Module):
    """What ``torch.fx`` cannot follow, one activation for all, and a layer in training alone."""

    def __init__(self) -> None:
        super().__init__()
        act = nn.SiLU()
        self.parts = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 1), act) for _ in range(3)])
        self.extra = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            y = part(x)
            x = x + y if bool(y.sum() == y.sum()) else y
        return self.extra(x) if self.training else x


def test_by_running_where_a_trace_ends() -> None:
    images = torch.randn(2, 4, 5, 5)
    traced = place_on_producers(prepare_qat(Branching(), "w8a8"))
    assert len(traced.not_placed) > 1
    model = prepare_qat(Branching().train(), "w8a8")
    report = place_on_producers(model, example=images)
    assert model.training and len(report.not_placed) == 1
    assert "argument of Branching" in report.not_placed["parts.0.0"]  # the image
    acts = [part[1] for part in model.parts]
    assert len(set(acts)) == 3  # one for each
    assert set(report.placed[0].readers) | set(report.sole_readers) <= {
        "parts.1.0",
        "parts.2.0",
        "extra",
    }
    calibrate(model, [images], progress=False)
    model(images).sum().backward()


@pytest.mark.require("ultralytics")
def test_most_layers_of_a_yolo() -> None:
    from python_tests.integrations.test_harmonize_ultralytics import batch, loss, made

    model, data = made("yolo11n"), batch("objects")
    config = QATConfig(placement="producers")
    prepare_qat(model, config, example=data)
    report = placement(model)
    assert len(report.not_placed) == 13, str(report)
    calibrate(model, [data], progress=False)
    assert torch.isfinite(loss(model, data))
