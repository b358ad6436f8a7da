"""A training by Ultralytics' own trainer, to the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.require("ultralytics")


def dataset(folder: Path) -> str:
    """Eight pictures of bright rectangles."""
    import cv2

    generator = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for index in range(8):
        image = generator.integers(0, 60, (64, 64, 3), dtype=np.uint8)
        x, y = generator.integers(0, 32, 2)
        image[y : y + 32, x : x + 32] = 255
        cv2.imwrite(str(folder / "images" / f"{index}.png"), image)
        label = f"0 {(x + 16) / 64} {(y + 16) / 64} 0.5 0.5\n"
        (folder / "labels" / f"{index}.txt").write_text(label)
    data = folder / "data.yaml"
    data.write_text(f"path: {folder}\ntrain: images\nval: images\nnames: {{0: box}}\n")
    return str(data)


@pytest.mark.parametrize("name", ["yolo11n", "yolo26n"])
def test_train_validate_predict_resume(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ultralytics import YOLO

    from hqod_ops.integrations.ultralytics_trainer import HQODTrainer
    from hqod_ops.quant import summary
    from hqod_ops.quant.parameters import quantizer_parameters

    monkeypatch.setattr(HQODTrainer, "calibration_batches", 1)
    settings: dict[str, Any] = {
        "data": dataset(tmp_path / "data"),
        "imgsz": 64,
        "batch": 4,
        "workers": 0,
        "device": "cpu",
        "project": str(tmp_path),
        "name": "run",
        "plots": False,
        "optimizer": "AdamW",
        "epochs": 3,
    }
    stopped: dict[str, Any] = {}

    def stop(trainer: Any) -> None:
        """As a user who interrupts it after two epochs, with the checkpoint as it is then."""
        if trainer.epoch == 1:
            (tmp_path / "copy.pt").write_bytes(trainer.last.read_bytes())
            groups = {g["param_group"]: g for g in trainer.optimizer.param_groups}
            scales = {id(p) for p in quantizer_parameters(trainer.model)}
            assert scales <= {id(p) for p in groups["bn"]["params"]}
            assert groups["bn"]["weight_decay"] == 0
            stopped["losses"] = tuple(trainer.loss_names)

    model: Any = YOLO(f"{name}.yaml")
    model.add_callback("on_model_save", stop)
    model.train(trainer=HQODTrainer, **settings)
    assert "hqod_loss" in stopped["losses"]
    best = tmp_path / "run" / "weights" / "best.pt"

    loaded: Any = YOLO(best)
    rows = summary(loaded.model.float())
    assert {row.weight_bits for row in rows} == {4, 8}
    assert loaded.val(data=settings["data"], imgsz=64, workers=0, plots=False).box.map >= 0
    image = torch.rand(1, 3, 64, 64)
    assert len(loaded.predict(image, verbose=False)) == 1

    resumed: Any = YOLO(tmp_path / "copy.pt")
    resumed.train(trainer=HQODTrainer, resume=True, workers=0, device="cpu")
    first = resumed.trainer
    assert first.start_epoch == 2 and first.epoch == 2
    assert summary(first.model)
