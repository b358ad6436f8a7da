"""harmonize on Transformers' DETR models."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
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

pytestmark = pytest.mark.require("transformers", "scipy")

WIDTHS = [8, 16, 24, 32]
SMALL = {
    "d_model": 32,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "decoder_layers": 2,
    "num_queries": 10,
    "num_labels": 3,
}
HYBRID = {"encoder_hidden_dim": 32, "decoder_in_channels": [32] * 3, "num_denoising": 6}
RESNET = {
    "embedding_size": 8,
    "hidden_sizes": WIDTHS,
    "depths": [1] * 4,
    "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}


def config(name: str) -> Any:
    import transformers as hf

    if name == "D-FINE":
        backbone = hf.HGNetV2Config(
            stem_channels=[3, 8, 8],
            stage_in_channels=WIDTHS,
            stage_mid_channels=[8] * 4,
            stage_out_channels=[16, 24, 32, 32],
            hidden_sizes=[16, 24, 32, 32],
            depths=[1] * 4,
            stage_num_blocks=[1] * 4,
            stage_numb_of_layers=[1] * 4,
            out_features=["stage2", "stage3", "stage4"],
        )
        bins = {"max_num_bins": 8, "encoder_in_channels": [24, 32, 32]}
        return hf.DFineConfig(backbone_config=backbone, **SMALL, **HYBRID, **bins)
    if name.startswith("RT-DETR"):
        kind = hf.RTDetrV2Config if name.endswith("v2") else hf.RTDetrConfig
        backbone = hf.RTDetrResNetConfig(**RESNET)
        return kind(backbone_config=backbone, **SMALL, **HYBRID, encoder_in_channels=WIDTHS[1:])
    if name == "LW-DETR":
        vit = hf.LwDetrViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=64,
            pretrain_image_size=64,
            num_windows=4,
            window_block_indices=[0],
            out_indices=[1, 2],
        )
        return hf.LwDetrConfig(
            backbone_config=vit,
            projector_scale_factors=[1.0],
            decoder_self_attention_heads=2,
            decoder_cross_attention_heads=2,
            num_feature_levels=1,
            group_detr=3,
            **{key: SMALL[key] for key in ("d_model", "num_queries", "num_labels")},
            decoder_ffn_dim=32,
            decoder_layers=2,
        )
    kind, more = hf.DetrConfig, {"encoder_layers": 1}
    if name == "Deformable DETR":
        kind, more = hf.DeformableDetrConfig, {"encoder_layers": 1, "num_feature_levels": 3}
    backbone = hf.ResNetConfig(**RESNET)
    return kind(
        backbone_config=backbone, use_timm_backbone=False, auxiliary_loss=True, **SMALL, **more
    )


def made(name: str) -> nn.Module:
    from transformers import AutoModelForObjectDetection

    torch.manual_seed(0)
    model: nn.Module = AutoModelForObjectDetection.from_config(config(name))
    with torch.no_grad():  # many layers start at 0, which no grid of codes fits
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.train()


def batch(content: str) -> dict[str, Any]:
    boxes = torch.tensor([[0.4, 0.4, 0.5, 0.5], [0.6, 0.6, 0.3, 0.4], [0.5, 0.5, 0.6, 0.8]])
    labels = torch.tensor([0, 1, 2])
    kept = {MIXED: ([0, 1], []), NONE: ([], [])}.get(content, ([0, 1], [2]))
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    return {
        "pixel_values": images,
        "labels": [{"boxes": boxes[k], "class_labels": labels[k]} for k in kept],
    }


def double(batch: dict[str, Any]) -> dict[str, Any]:
    labels = [{**label, "boxes": label["boxes"].double()} for label in batch["labels"]]
    return {"pixel_values": batch["pixel_values"].double(), "labels": labels}


def loss(model: nn.Module, batch: Any) -> Tensor:
    total: Tensor = model(**batch).loss
    return total


def term(model: nn.Module, batch: Any) -> Loss:
    output = model(**batch)
    return Loss(output.loss, output.loss_dict["loss_hqod"])


def positives(model: Any, batch: Any) -> list[Positives]:
    from transformers.loss.loss_for_object_detection import ImageLoss
    from transformers.loss.loss_lw_detr import LwDetrImageLoss
    from transformers.loss.loss_rt_detr import RTDetrLoss

    calls = []
    with ExitStack() as stack:
        for kind in (ImageLoss, RTDetrLoss, LwDetrImageLoss):
            patch, seen = spied(kind, "loss_boxes")
            stack.enter_context(patch)
            calls.append(seen)
        model(**batch)
    # The last layer comes first.
    ((outputs, targets, indices, num_boxes), _) = next(seen for seen in calls if seen)[0]
    softmax = type(model).__name__ == "DetrForObjectDetection"
    height, width = batch["pixel_values"].shape[2:]
    scale = torch.tensor([width, height, width, height]).double()
    pred, target, scores = [], [], []
    for image, (queries, objects) in enumerate(indices):
        for query, number in zip(queries.tolist(), objects.tolist(), strict=True):
            pred.append(corners(outputs["pred_boxes"][image, query].double()) * scale)
            target.append(corners(targets[image]["boxes"][number].double()) * scale)
            logits = outputs["logits"][image, query].double()
            p = logits.softmax(0) if softmax else logits.sigmoid()
            scores.append(p[targets[image]["class_labels"][number]])
    return [Positives(torch.stack(pred), torch.stack(target), torch.stack(scores), num_boxes)]


def corners(box: Tensor) -> Tensor:
    x, y, w, h = box.unbind()
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2])


def case(name: str) -> Case:
    return Case(partial(made, name), batch, loss, term, positives, double)


CASES = {n: case(n) for n in ("RT-DETR", "RT-DETRv2", "D-FINE", "DETR", "Deformable DETR")}


@pytest.mark.parametrize(("name", "check"), contract.pairs(CASES, ["RT-DETRv2"]))
def test_contract(
    name: str, check: Callable[[Case], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.loss import loss_d_fine

    # A part of D-FINE's loss that knows float32 only.
    original = loss_d_fine.translate_gt
    monkeypatch.setattr(
        loss_d_fine,
        "translate_gt",
        lambda x, *args: tuple(
            y.to(x.dtype) for y in original(x.float(), *args[:-1], args[-1].float())
        ),
    )
    check(CASES[name])


@pytest.mark.parametrize("check", [contract.check_values, contract.check_undone])
def test_groups_of_queries(check: Callable[[Case], None]) -> None:
    """The library cannot pickle this one, so it is not asked for the whole contract."""
    check(case("LW-DETR"))


def test_compiled() -> None:
    contract.check_compiled(CASES["DETR"])


def rank(rank: int) -> Tensor:
    return contract.of_rank(CASES["RT-DETR"], rank)


def test_two_processes(tmp_path: Path) -> None:
    contract.check_ranks(rank, CASES["RT-DETR"], tmp_path)


def test_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.loss.loss_rt_detr import RTDetrLoss

    with monkeypatch.context() as patch:
        patch.setattr(RTDetrLoss, "loss_boxes", lambda self, outputs: {})
        with pytest.raises(RuntimeError, match=r"transformers 5.*DFineLoss\.loss_boxes takes"):
            harmonize(made("D-FINE"))
    model = harmonize(made("RT-DETR"))
    monkeypatch.setattr(RTDetrLoss, "get_loss", lambda *args: {})
    with pytest.raises(RuntimeError, match=r"transformers 5.*no boxes of the last layer"):
        model(**batch(OBJECTS))


def test_the_model_is_as_it_was_for_others(tmp_path: Path) -> None:
    """Its class's name is written to its configuration, Trainer reads its forward's signature."""
    model: Any = made("DETR")
    signature = inspect.signature(model.forward)
    harmonize(model)
    assert inspect.signature(model.forward) == signature
    model.save_pretrained(tmp_path)
    loaded = type(made("DETR")).from_pretrained(tmp_path)
    assert loaded.config.architectures == ["DetrForObjectDetection"]
    data = batch(OBJECTS)
    model.eval(), loaded.eval()
    with torch.no_grad():
        assert torch.equal(model(data["pixel_values"]).logits, loaded(data["pixel_values"]).logits)
    torch.testing.assert_close(
        model(**data).loss - loaded(**data).loss, model(**data).loss_dict["loss_hqod"]
    )


def test_a_loss_of_the_users() -> None:
    """One that makes the library's criterion itself; and one that cannot be hooked."""
    model: Any = made("DETR")
    own = model.loss_function

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    model.loss_function = nothing
    with pytest.raises(TypeError, match="expected one of transformers whose loss is of ImageLoss"):
        harmonize(model)
    model.loss_function = own
    harmonize(model)
    model.loss_function = own
    assert "loss_hqod" in model(**batch(OBJECTS)).loss_dict
    with pytest.raises(RuntimeError, match="call the model"):
        model.forward(**batch(OBJECTS))
    assert unharmonize(model).loss_function is own


def test_refused() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    small = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    with pytest.raises(TypeError, match="got BertForSequenceClassification"):
        harmonize(BertForSequenceClassification(small))


@pytest.mark.parametrize("name", CASES)
def test_edges_and_network(name: str) -> None:
    model: Any = contract.prepared(CASES[name], made(name)).eval()
    eight = [row.name for row in summary(model) if row.weight_bits == 8]
    assert "embedder" in eight[0]
    # Classes and boxes of a DETR; of two decoder layers; and of the encoder; and what is D-FINE's.
    counts = {"DETR": 2, "Deformable DETR": 4, "RT-DETR": 6, "RT-DETRv2": 6, "D-FINE": 9}
    assert len(eight) == 1 + counts[name]
    images = batch(OBJECTS)["pixel_values"]
    with torch.no_grad():
        found = model(images)
        boxes, scores = detection_network(model, "boxes")(images)
    size = torch.tensor([96.0, 64.0, 96.0, 64.0])
    wanted = [corners(b).mul(size) for b in found.pred_boxes.flatten(0, 1)]
    limits = torch.stack(wanted).clamp(min=0).minimum(size)
    torch.testing.assert_close(boxes.flatten(0, 1), limits, rtol=1e-5, atol=1e-4)
    softmax = found.logits.softmax(-1)[..., :-1]
    torch.testing.assert_close(scores, softmax if name == "DETR" else found.logits.sigmoid())


@pytest.mark.require("onnx", "onnxruntime", "onnxscript")
def test_export(tmp_path: Path) -> None:
    from hqod_ops.quant import export_onnx

    model = contract.prepared(CASES["DETR"], made("DETR")).eval()
    network = detection_network(model, "boxes").eval()
    export_onnx(network, batch(OBJECTS)["pixel_values"], tmp_path / "model.onnx")
