"""Quantized models of Transformers: saved, loaded, and trained by its Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hqod_ops.integrations import harmonize
from hqod_ops.quant import parameter_groups, summary
from python_tests.integrations import harmonize_contract as contract
from python_tests.integrations.harmonize_contract import MIXED, OBJECTS
from python_tests.integrations.test_harmonize_transformers import CASES, batch

pytestmark = pytest.mark.require("transformers", "scipy", "accelerate")


def declared(name: str) -> Any:
    from hqod_ops.integrations.transformers_quantizer import declare_quantizers

    case = CASES[name]
    return declare_quantizers(contract.prepared(case, harmonize(case.make())), case.config)


@pytest.mark.parametrize("name", CASES)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    """Scales, their number in layers that are called several times, signs, outputs."""
    from transformers import AutoModelForObjectDetection

    model = declared(name)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path)
    assert str(summary(loaded)) == str(summary(model))
    state = loaded.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    images = batch(OBJECTS)["pixel_values"]
    with torch.no_grad():
        assert torch.equal(model.eval()(images).logits, loaded.eval()(images).logits)
    # It trains on.
    harmonize(loaded).train()
    assert torch.isfinite(contract.gradients(loaded(**batch(OBJECTS)).loss, loaded)).all()


def examples() -> list[dict[str, Any]]:
    found = []
    for content in (OBJECTS, MIXED):
        data = batch(content)
        pairs = zip(data["pixel_values"], data["labels"], strict=True)
        found += [{"pixel_values": image, "labels": label} for image, label in pairs]
    return found


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    images = torch.stack([row["pixel_values"] for row in rows])
    return {"pixel_values": images, "labels": [row["labels"] for row in rows]}


def test_trainer(tmp_path: Path) -> None:
    """It trains, accumulates, evaluates, saves, resumes, and opens what it saved."""
    from transformers import AutoModelForObjectDetection, Trainer, TrainingArguments

    arguments: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "prediction_loss_only": True,
    }

    def trainer(model: nn.Module, steps: int) -> Any:
        groups = parameter_groups(model, weight_decay=1e-4)
        return Trainer(
            model=model,
            args=TrainingArguments(**arguments, max_steps=steps),
            train_dataset=examples(),
            eval_dataset=examples(),
            data_collator=collate,
            optimizers=(torch.optim.AdamW(groups, lr=1e-3), None),
        )

    model = declared("RT-DETR")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first = trainer(model, 2)
    first.train()
    scales = [key for key in before if key.endswith("quantizer.scale")]
    state = model.state_dict()
    assert any(not torch.equal(before[key], state[key]) for key in scales)
    assert torch.isfinite(torch.tensor(first.evaluate()["eval_loss"]))

    checkpoint = tmp_path / "checkpoint-2"
    loaded = AutoModelForObjectDetection.from_pretrained(checkpoint)
    assert str(summary(loaded)) == str(summary(model))
    then = trainer(declared("RT-DETR"), 3)
    then.train(resume_from_checkpoint=str(checkpoint))
    assert then.state.global_step == 3
    losses = [entry["loss"] for entry in then.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(loss == loss for loss in losses)
