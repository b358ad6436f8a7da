"""harmonize on torchvision's detectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hqod_ops.integrations import harmonize
from python_tests.integrations import harmonize_contract as contract
from python_tests.integrations.harmonize_contract import MIXED, NONE, Case, Loss, Positives, spied
from python_tests.integrations.test_torchvision import (
    anchors,
    backbone,
    faster_rcnn,
    retinanet,
    ssdlite,
)
from python_tests.integrations.test_torchvision import fcos as flat_fcos

pytestmark = pytest.mark.require("torchvision")

SIZES = {"min_size": 64, "max_size": 64}


def fcos() -> nn.Module:
    """Its distances are rectified: with the bias at 0 many boxes would have no area, where the
    published gradient is without bound and ours is not."""
    model: Any = flat_fcos()
    nn.init.constant_(model.head.regression_head.bbox_reg.bias, 1.0)
    return model


def mask_rcnn() -> nn.Module:
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

    return MaskRCNN(
        backbone(),
        rpn_anchor_generator=anchors(),
        box_head=TwoMLPHead(32 * 7 * 7, 16),
        box_predictor=FastRCNNPredictor(16, 3),
        mask_head=MaskRCNNHeads(32, (16,), 1),
        mask_predictor=MaskRCNNPredictor(16, 16, 3),
        **SIZES,
    )


def keypoint_rcnn() -> nn.Module:
    from torchvision.models.detection import KeypointRCNN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor

    return KeypointRCNN(
        backbone(),
        rpn_anchor_generator=anchors(),
        box_head=TwoMLPHead(32 * 7 * 7, 16),
        box_predictor=FastRCNNPredictor(16, 3),
        keypoint_head=KeypointRCNNHeads(32, (16,)),
        keypoint_predictor=KeypointRCNNPredictor(16, 2),
        **SIZES,
    )


def made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().train()


def batch(content: str) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, 64, 64, generator=generator) for _ in range(2)]
    boxes = torch.tensor([[8.0, 8.0, 40.0, 40.0], [20.0, 16.0, 60.0, 52.0], [2.0, 40, 12, 50]])
    full = {
        "boxes": boxes,
        "labels": torch.tensor([1, 2, 1]),
        "masks": torch.zeros(3, 64, 64, dtype=torch.uint8),
        # torchvision takes key points in this dtype only.
        "keypoints": torch.tensor([[[20, 20, 1], [30, 30, 1]]] * 3, dtype=torch.float32),
    }
    empty = {name: value[:0] for name, value in full.items()}
    targets = {MIXED: [full, empty], NONE: [empty, empty]}.get(content, [full, full])
    return images, [dict(target) for target in targets]


def double(batch: Any) -> Any:
    images, targets = batch
    return [i.double() for i in images], [{**t, "boxes": t["boxes"].double()} for t in targets]


def loss(model: nn.Module, batch: Any) -> Tensor:
    losses: dict[str, Tensor] = model(*batch)
    return sum(losses.values(), start=torch.zeros(()))


def term(model: nn.Module, batch: Any) -> Loss:
    losses: dict[str, Tensor] = model(*batch)
    return Loss(sum(losses.values(), start=torch.zeros(())), losses["loss_hqod"])


def from_deltas(deltas: Tensor, anchors: Tensor, weights: tuple[float, ...]) -> Tensor:
    """The decoding of R-CNN."""
    deltas, anchors = deltas.double() / torch.tensor(weights).double(), anchors.double()
    size = anchors[:, 2:] - anchors[:, :2]
    centre = anchors[:, :2] + size / 2 + deltas[:, :2] * size
    half = size * deltas[:, 2:].exp() / 2
    return torch.cat([centre - half, centre + half], 1)


def from_distances(deltas: Tensor, anchors: Tensor) -> Tensor:
    """The decoding of FCOS, by the size of the anchor."""
    anchors = anchors.double()
    size = anchors[:, 2:] - anchors[:, :2]
    centre, deltas = anchors[:, :2] + size / 2, deltas.double() * size.repeat(1, 2)
    return torch.cat([centre - deltas[:, :2], centre + deltas[:, 2:]], 1)


def one_stage(owner: str, decode: Any, softmax: bool, own: bool, model: Any, batch: Any) -> Any:
    """From the arguments with which the library computes its loss, image by image."""
    import torchvision.models.detection as detection

    kind = {
        "RetinaNet": detection.retinanet.RetinaNetHead,
        "FCOS": detection.fcos.FCOSHead,
        "SSD": detection.ssd.SSD,
    }[owner]
    patch, calls = spied(kind, "compute_loss")
    with patch:
        model(*batch)
    ((targets, outputs, anchor_lists, matched),) = (arguments for arguments, _ in calls)
    pred, target, scores, divisor = [], [], [], 0
    for i, match in enumerate(matched):
        positive = match >= 0
        labels = targets[i]["labels"][match[positive]]
        logits = outputs["cls_logits"][i][positive].double()
        p = logits.softmax(1) if softmax else logits.sigmoid()
        scores.append(p[torch.arange(len(p)), labels])
        pred.append(decode(outputs["bbox_regression"][i][positive], anchor_lists[i][positive]))
        target.append(targets[i]["boxes"][match[positive]].double())
        divisor += max(int(positive.sum()), 1) if own else int(positive.sum())
    return [Positives(torch.cat(pred), torch.cat(target), torch.cat(scores), max(divisor, 1))]


def two_stage(model: Any, batch: Any) -> list[Positives]:
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
    from torchvision.models.detection.roi_heads import RoIHeads

    samples, sampled = spied(RoIHeads, "select_training_samples")
    predictor, predicted = spied(FastRCNNPredictor, "forward")
    with samples, predictor:
        model(*batch)
    proposals, matched, labels, _ = sampled[0][1]
    logits, deltas = (x.double() for x in predicted[0][1])
    label, proposal = torch.cat(labels), torch.cat(proposals)
    rows = [i for i, k in enumerate(label.tolist()) if k > 0]
    columns = label[rows]
    # The targets of the sampled proposals, as the library looked them up.
    targets = [
        sampled[0][0][1][image]["boxes"][index].double()
        for image in range(len(labels))
        for index, k in zip(matched[image].tolist(), labels[image].tolist(), strict=True)
        if k > 0
    ]
    deltas = deltas.view(len(label), -1, 4)[rows, columns]
    return [
        Positives(
            from_deltas(deltas, proposal[rows], (10.0, 10.0, 5.0, 5.0)),
            torch.stack(targets),
            logits.softmax(1)[rows, columns],
            len(label),
        )
    ]


def case(build: Callable[[], nn.Module], found: Any) -> Case:
    return Case(partial(made, build), batch, loss, term, found, double)


unit = partial(from_deltas, weights=(1.0, 1.0, 1.0, 1.0))
ssd = partial(from_deltas, weights=(10.0, 10.0, 5.0, 5.0))
CASES = {
    "RetinaNet": case(retinanet, partial(one_stage, "RetinaNet", unit, False, True)),
    "FCOS": case(fcos, partial(one_stage, "FCOS", from_distances, False, False)),
    "SSDLite": case(ssdlite, partial(one_stage, "SSD", ssd, True, True)),
    "Faster R-CNN": case(faster_rcnn, two_stage),
    "Mask R-CNN": case(mask_rcnn, two_stage),
    "Keypoint R-CNN": case(keypoint_rcnn, two_stage),
}


@pytest.mark.parametrize(("name", "check"), contract.pairs(CASES, ["Mask R-CNN", "Keypoint R-CNN"]))
def test_contract(name: str, check: Callable[[Case], None]) -> None:
    check(CASES[name])


@pytest.mark.parametrize("name", ["RetinaNet", "SSDLite", "Faster R-CNN"])
def test_compiled(name: str) -> None:
    contract.check_compiled(CASES[name])


def rank(rank: int) -> Tensor:
    return contract.of_rank(CASES["RetinaNet"], rank)


def test_two_processes(tmp_path: Path) -> None:
    contract.check_ranks(rank, CASES["RetinaNet"], tmp_path)


def places() -> Iterator[tuple[str, type, str]]:
    import torchvision.models.detection as detection

    yield "RetinaNet", detection.retinanet.RetinaNetHead, "compute_loss"
    yield "FCOS", detection.fcos.FCOSHead, "compute_loss"
    yield "SSDLite", detection.ssd.SSD, "compute_loss"
    yield "Faster R-CNN", detection.roi_heads.RoIHeads, "select_training_samples"


@pytest.mark.parametrize("index", range(4))
def test_gone(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    name, owner, method = list(places())[index]
    contract.check_gone(monkeypatch, CASES[name], owner, method, "torchvision")


def test_replaced_parts() -> None:
    """A head that came later has no hook: no loss without its terms."""
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

    model: Any = harmonize(CASES["RetinaNet"].make())
    model.head = retinanet().head
    with pytest.raises(RuntimeError, match="replaced after harmonize"):
        model(*batch(MIXED))
    assert "loss_hqod" in harmonize(model)(*batch(MIXED))
    model = harmonize(CASES["Faster R-CNN"].make())
    model.roi_heads.box_predictor = FastRCNNPredictor(16, 3)
    with pytest.raises(RuntimeError, match="replaced after harmonize"):
        model(*batch(MIXED))
    model.eval()(batch(MIXED)[0])


def test_evaluation_is_untouched() -> None:
    for name in ("SSDLite", "Faster R-CNN"):
        model = CASES[name].make().eval()
        with torch.no_grad():
            before = model(batch(MIXED)[0])
            after = harmonize(model)(batch(MIXED)[0])
        for one, other in zip(before, after, strict=True):
            assert all(torch.equal(one[key], other[key]) for key in one)


def test_bad_arguments() -> None:
    model = ssdlite()
    for options, error in (
        ({"variant": "other"}, ValueError),
        ({"normaliser": "mean"}, ValueError),
        ({"terms": "hardet"}, ValueError),
        ({"hiou_weight": "1"}, TypeError),
    ):
        with pytest.raises(error, match=next(iter(options))):
            harmonize(model, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a detector of torchvision"):
        harmonize(nn.Linear(1, 1))
    with pytest.raises(TypeError, match="torchvision's RetinaNet, FCOS, SSD, FasterRCNN, got"):
        from torchvision.models import resnet18

        harmonize(resnet18())
