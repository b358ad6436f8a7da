"""Adapters: the registry of libraries, and a user's own detector."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hqod_ops.quant import (
    adapters,
    detection_network,
    plan_qat,
    prepare_qat,
    register_adapter,
)
from hqod_ops.quant.adapters import Adapter, DetectorNetwork


class Detector(nn.Module):
    """A class of nobody's: its edge layers and its network are not known."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.body = nn.Conv2d(8, 8, 3)
        self.heads = nn.ModuleList([nn.Conv2d(8, 2, 1), nn.Conv2d(8, 4, 1)])


class Heavy(Detector):
    """A subclass that says for itself what its first layer is."""

    qat_first = "body"


class Network(DetectorNetwork):
    parts = ("stem", "body", "heads")

    def predict(self, images: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        features = self.body(self.stem(images))
        return tuple(head(features).flatten(2).mT for head in self.heads), features

    def decode(
        self, images: Tensor, features: Any, raw: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        return raw[1] * 100, raw[0].sigmoid()


class Known(Adapter):
    network = Network

    def first(self, model: nn.Module, layers: Sequence[str]) -> str:
        return layers[0]

    def prediction(self, model: nn.Module, layers: Sequence[str]) -> tuple[str, ...]:
        return ("heads.*",)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_REGISTERED", {})
    register_adapter(Detector, Known())


def eight(model: nn.Module) -> list[str]:
    """Names of the edge layers."""
    return [name for name, layer in plan_qat(model, "hqod_w4a4").items() if layer.act_bits == 8]


def test_a_class_of_nobodys() -> None:
    message = (
        r"first: the layers with 8 bits are not known for a Detector.*\(candidates: 'stem'\); "
        r"prediction: .*\(candidates: 'heads.0', 'heads.1'\)"
    )
    with pytest.raises(ValueError, match=message):
        prepare_qat(Detector(), "hqod_w4a4")
    with pytest.warns(UserWarning, match="planned without"):
        assert eight(Detector()) == []  # by which one would look for them
    with pytest.raises(TypeError, match="torchvision's RetinaNet, .*hqod_ops's ATSS; .* Detector"):
        detection_network(Detector())


@pytest.mark.usefixtures("known")
def test_edges_of_a_registered_class_its_subclasses_and_where_it_is_a_part() -> None:
    assert eight(Detector()) == ["stem", "heads.0", "heads.1"]
    assert eight(Heavy()) == ["body", "heads.0", "heads.1"]
    both = nn.ModuleDict({"teacher": Detector(), "student": Heavy()})
    names = ["teacher.stem", "teacher.heads.0", "teacher.heads.1"]
    assert eight(both) == [*names, "student.body", "student.heads.0", "student.heads.1"]


@pytest.mark.usefixtures("known")
def test_network_of_a_registered_class() -> None:
    model, images = Heavy().eval(), torch.rand(2, 3, 10, 12)
    network = detection_network(model)
    assert list(network.state_dict()) == list(model.state_dict()) and not network.training
    logits, boxes = network(images)
    assert logits.shape == (2, 48, 2) and boxes.shape == (2, 48, 4)
    clipped, scores = detection_network(model, "boxes")(images)
    limits = torch.tensor([12.0, 10.0, 12.0, 10.0])
    assert torch.equal(clipped, (boxes * 100).clamp(min=0).minimum(limits))
    assert torch.equal(scores, logits.sigmoid())


@pytest.mark.usefixtures("known")
def test_an_adapter_may_know_little() -> None:
    class RawOnly(Network):
        decode = DetectorNetwork.decode

    class Raw(Adapter):
        network = RawOnly

    register_adapter(Heavy, Raw())
    assert len(detection_network(Heavy())(torch.rand(1, 3, 8, 8))) == 2
    with pytest.raises(ValueError, match="of a Heavy only 'raw' can be exported: its adapter does"):
        detection_network(Heavy(), "boxes")
    with pytest.raises(ValueError, match="prediction: the layers with 8 bits are not known"):
        prepare_qat(Heavy(), "hqod_w4a4")
    register_adapter(Heavy, Adapter())
    with pytest.raises(TypeError, match="ATSS; Detector; .* got Heavy"):
        detection_network(Heavy())


def test_what_can_be_registered() -> None:
    with pytest.raises(TypeError, match="kind: expected a class of modules, got Detector"):
        register_adapter(Detector(), Known())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="adapter: expected an Adapter, got <class"):
        register_adapter(Detector, Known)  # type: ignore[arg-type]


@pytest.mark.require("torchvision")
def test_the_registry_names_the_classes_that_its_modules_know() -> None:
    for module, names in adapters._LIBRARIES.values():
        assert set(importlib.import_module(module).ADAPTERS) == set(names)


@pytest.mark.require("torchvision")
def test_a_network_is_no_detector() -> None:
    from hqod_ops.detection.models.atss import ATSS
    from hqod_ops.training.settings import ModelConfig

    with pytest.raises(TypeError, match="got Network"):
        detection_network(detection_network(ATSS(ModelConfig(), num_classes=3)))


@pytest.mark.require("torchvision")
def test_a_registered_class_of_a_library_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models.detection import RetinaNet, retinanet_resnet50_fpn

    with torch.device("meta"):
        model = retinanet_resnet50_fpn(weights=None, weights_backbone=None)
    monkeypatch.setattr(adapters, "_REGISTERED", {})
    assert len(eight(model)) == 3
    register_adapter(RetinaNet, Adapter())
    with pytest.warns(UserWarning, match="first: .* not known for a RetinaNet"):
        plan_qat(model, "hqod_w4a4")


def test_no_library_is_imported_before_its_model_is_met() -> None:
    script = (
        "import sys, torch, hqod_ops.quant as q\n"
        "model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3))\n"
        "q.prepare_qat(model, 'hqod_w4a4', first='0', prediction=())\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('torchvision', 'onnx', 'onnx_ir')\n"
        "       or m.startswith(('hqod_ops.integrations', 'hqod_ops.detection'))])\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stderr
