"""harmonize on Ultralytics' YOLO models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hqod_ops.integrations import harmonize, unharmonize
from hqod_ops.quant import detection_network, summary
from python_tests.integrations import harmonize_contract as contract
from python_tests.integrations.harmonize_contract import (
    MIXED,
    NONE,
    OBJECTS,
    Case,
    Loss,
    Positives,
    spied,
)

pytestmark = pytest.mark.require("ultralytics")


def made(name: str) -> nn.Module:
    from ultralytics.cfg import get_cfg
    from ultralytics.nn import tasks

    kind = {"seg": tasks.SegmentationModel, "pose": tasks.PoseModel}.get(
        name.partition("-")[2], tasks.DetectionModel
    )
    torch.manual_seed(0)
    model = kind(f"{name}.yaml", nc=3, verbose=False)
    model.args = get_cfg()
    return model.train()


def batch(content: str) -> dict[str, Tensor]:
    boxes = torch.tensor([[0.4, 0.4, 0.5, 0.5], [0.6, 0.6, 0.3, 0.4], [0.5, 0.5, 0.6, 0.8]])
    kept = {MIXED: slice(0, 2), NONE: slice(0, 0)}.get(content, slice(0, 3))
    return {
        "img": torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)),
        "batch_idx": torch.tensor([0.0, 0.0, 1.0])[kept],
        "cls": torch.tensor([[0.0], [1.0], [2.0]])[kept],
        "bboxes": boxes[kept],
        "keypoints": boxes[:, None, :3].expand(-1, 17, -1).contiguous()[kept],
        "masks": torch.ones(2, 16, 16),
        "sem_masks": torch.zeros(2, 16, 16),
    }


def double(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "img": batch["img"].double()}


def loss(model: nn.Module, batch: Any) -> Tensor:
    # In float64 from here on, so that a difference is exact.
    # It may also scale a batch's key points in place.
    total: Tensor = model({k: v.clone() for k, v in batch.items()})[0].double().sum()
    return total


def term(model: nn.Module, batch: Any) -> Loss:
    """The library shows the terms of one head only: by the difference to weights of 0."""
    total = loss(model, batch)
    parts = [model, *parts_of(model)]
    terms = [vars(part)["_hqod_terms"] for part in parts]
    harmonize(model, hiou_weight=0.0, tcorr_weight=0.0)
    without = loss(model, batch)
    for part, kept in zip(parts, terms, strict=True):
        vars(part)["_hqod_terms"] = kept
    return Loss(total, total - without)


def parts_of(model: Any) -> list[Any]:
    ends = [getattr(model.criterion, name, None) for name in ("one2many", "one2one")]
    parts = [model.criterion] if None in ends else ends
    return [*parts, *(part.assigner for part in parts)]


def positives(model: Any, batch: Any) -> list[Positives]:
    from ultralytics.utils.loss import v8DetectionLoss
    from ultralytics.utils.tal import TaskAlignedAssigner

    patch, assigned = spied(TaskAlignedAssigner, "forward")
    losses, predicted = spied(v8DetectionLoss, "get_assigned_targets_and_loss")
    with patch, losses:
        model(batch)
    gains = (model.criterion.o2m, model.criterion.o2o) if len(assigned) == 2 else (1.0,)
    return [
        of_head(model, preds, args, result, gain * len(batch["img"]))
        for ((preds, _), _), (args, result), gain in zip(predicted, assigned, gains, strict=True)
    ]


def of_head(model: Any, preds: Any, args: Any, result: Any, factor: float) -> Positives:
    points, (labels, boxes, target_scores, positive, _) = args[2].double(), result
    cells = [feature.shape[2] * feature.shape[3] for feature in preds["feats"]]
    strides = torch.cat(
        [torch.full((n,), float(s)) for n, s in zip(cells, model.stride, strict=True)]
    )
    pred, target, scores = [], [], []
    for image in range(len(positive)):
        for anchor in positive[image].nonzero().flatten().tolist():
            raw = preds["boxes"][image, :, anchor].double()
            bins = len(raw) // 4
            sides = raw if bins == 1 else raw.view(4, bins).softmax(1) @ torch.arange(bins).double()
            sides = sides * strides[anchor]
            pred.append(torch.cat([points[anchor] - sides[:2], points[anchor] + sides[2:]]))
            target.append(boxes[image, anchor].double())
            label = int(labels[image, anchor])
            scores.append(preds["scores"][image, label, anchor].double().sigmoid())
    divisor = max(target_scores.double().sum().item(), 1.0)
    return Positives(torch.stack(pred), torch.stack(target), torch.stack(scores), divisor, factor)


def case(name: str) -> Case:
    return Case(
        partial(made, name),
        batch,
        loss,
        term,
        positives,
        double,
        "hqod_w4a4",
    )


CASES = {name: case(name) for name in ("yolov8n", "yolo11n", "yolo26n", "yolov10n")}


@pytest.mark.parametrize(("name", "check"), contract.pairs(CASES, ["yolov8n"]))
def test_contract(name: str, check: Callable[[Case], None]) -> None:
    check(CASES[name])


@pytest.mark.parametrize("name", ["yolo11n-seg", "yolo11n-pose", "yolo26n-pose"])
def test_other_tasks(name: str) -> None:
    """Their losses take the box loss from where the terms are added."""
    contract.check_values(case(name))


def test_masks_are_assigned_in_float32() -> None:
    contract.check_copies(case("yolo26n-seg"))


def test_compiled() -> None:
    """The library compiles the model, and calls the loss outside."""
    batch_ = batch(OBJECTS)
    model: Any = harmonize(made("yolo11n"))
    wanted = loss(model, batch_)
    compiled = torch.compile(model, backend="eager")
    total, _ = model.loss(batch_, compiled(batch_["img"]))
    torch.testing.assert_close(total.double().sum(), wanted)


def rank(rank: int) -> Tensor:
    return contract.of_rank(CASES["yolo11n"], rank)


def test_two_processes(tmp_path: Path) -> None:
    contract.check_ranks(rank, CASES["yolo11n"], tmp_path)


def test_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils.loss import v8DetectionLoss

    contract.check_gone(
        monkeypatch, CASES["yolo11n"], DetectionModel, "init_criterion", "ultralytics"
    )
    # The loss is made when it is first needed; what it is is known before.
    place = v8DetectionLoss, "get_assigned_targets_and_loss"
    contract.check_gone(monkeypatch, CASES["yolo11n"], *place, "ultralytics")
    model = harmonize(made("yolo11n"))
    monkeypatch.setattr(*place, lambda self, preds, batch: ((None,) * 5, torch.zeros(3), {}))
    with pytest.raises(RuntimeError, match="calls its assigner not once"):
        model(batch(OBJECTS))


def test_items_and_an_existing_criterion() -> None:
    model, data = made("yolo11n"), batch(OBJECTS)
    before, items = model(data)
    harmonize(model)  # its loss exists
    after, more = model(data)
    assert torch.equal(after[1:], before[1:])
    assert {k: more[k] for k in items} == items
    torch.testing.assert_close(after[0] - before[0], more["hqod_loss"] * 2, rtol=1e-4, atol=1e-4)
    unharmonize(model)
    again, items_again = model(data)
    assert torch.equal(again, before) and items_again == items


def test_refused() -> None:
    from ultralytics import YOLO
    from ultralytics.nn.tasks import OBBModel

    for model in (OBBModel("yolo11n-obb.yaml", verbose=False), YOLO("yolo11n.yaml")):
        with pytest.raises(TypeError, match="ultralytics' DetectionModel"):
            harmonize(model)


@pytest.mark.parametrize("name", CASES)
def test_edges_and_network(name: str) -> None:
    """8 bits for the image and for what predicts; boxes and scores are the library's own."""
    model: Any = contract.prepared(CASES[name], made(name)).eval()
    eight = [row.name for row in summary(model) if row.weight_bits == 8]
    heads = 2 if hasattr(model.model[-1], "one2one_cv2") else 1
    assert eight[0] == "model.0.conv" and len(eight) == 1 + 6 * heads
    images = batch(OBJECTS)["img"]
    with torch.no_grad():
        boxes, scores = detection_network(model, "boxes")(images)
        logits, _ = detection_network(model)(images)
        model.model[-1].end2end = False
        found = (
            model(images)[0]
            if heads == 1
            else model.model[-1]._inference(model(images)[1]["one2one"])
        )
    centre, half = found[:, :2].mT, found[:, 2:4].mT / 2
    corners = torch.cat([centre - half, centre + half], -1).clamp(0, 64)
    torch.testing.assert_close(boxes, corners, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(scores, found[:, 4:].mT)
    torch.testing.assert_close(logits.sigmoid(), scores)


@pytest.mark.require("onnx", "onnxruntime", "onnxscript")
def test_export(tmp_path: Path) -> None:
    from hqod_ops.quant import export_onnx

    model = contract.prepared(CASES["yolo11n"], made("yolo11n")).eval()
    network = detection_network(model, "boxes").eval()
    export_onnx(network, batch(OBJECTS)["img"], tmp_path / "model.onnx")  # checks the file
