"""A training by Ultralytics' own trainer, to the end."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hqod_ops.integrations import harmonize, unharmonize
from hqod_ops.quant import QATConfig, calibrate, prepare_qat, summary, to_toml

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
def test_train_validate_predict_resume(name: str, tmp_path: Path) -> None:
    from ultralytics import YOLO

    from hqod_ops.integrations.ultralytics_trainer import HQODTrainer
    from hqod_ops.quant.parameters import quantizer_parameters

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
        "calibration_batches": 1,
        "hqod": {"tcorr_weight": 0.5},
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
    assert first.model._hqod_terms.tcorr_weight == 0.5
    assert first.start_epoch == 2 and first.epoch == 2
    assert summary(first.model)


@pytest.mark.require("msgspec", "rich")
def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``hqod yolo``: a training with settings of its own, and validation and prediction of it."""
    from ultralytics import YOLO

    from hqod_ops.cli import main

    recipe = tmp_path / "w2.toml"
    recipe.write_text(to_toml(QATConfig(2, 8)))
    data = dataset(tmp_path / "data")
    own = [f"qat={recipe}", "hqod=None", "calibration_batches=1", "optimizer=MuSGD", "epochs=1"]
    shared = [f"data={data}", "imgsz=64", "device=cpu", f"project={tmp_path}", "plots=False"]
    assert main(["yolo", "train", "model=yolo11n.yaml", "name=run", *shared, *own]) == 0
    best = tmp_path / "run" / "weights" / "best.pt"
    model: Any = YOLO(best)
    assert {(row.weight_bits, row.act_bits) for row in summary(model.model)} == {(2, 8), (8, 8)}
    assert not hasattr(model.model, "_hqod_terms")
    assert main(["yolo", "val", f"model={best}", *shared]) == 0
    images = tmp_path / "data" / "images"
    predict = [f"model={best}", f"source={images}", "imgsz=64", f"project={tmp_path}"]
    assert main(["yolo", "predict", *predict]) == 0
    capsys.readouterr()
    assert main(["yolo", "train", "epochs=1"]) == 2
    assert "hqod yolo train: model: expected model=FILE.pt" in capsys.readouterr().err
    assert main(["yolo", "train", "model=yolo11n.yaml", "qat=w5", f"data={data}"]) == 2
    assert "config: expected one of the presets" in capsys.readouterr().err


@pytest.mark.parametrize("harmonized", [False, True])
def test_a_prepared_model_is_not_fused(harmonized: bool) -> None:
    """As validation and prediction of a YOLO do; without its trainer too."""
    from ultralytics import YOLO

    model: Any = YOLO("yolo11n.yaml")
    images = torch.rand(1, 3, 64, 64)
    calibrate(prepare_qat(model.model, "w8a8"), [images], progress=False)
    if harmonized:
        unharmonize(harmonize(model.model))
    twin = pickle.loads(pickle.dumps(model.model))
    before = str(summary(model.model))
    assert len(model.predict(images, verbose=False)) == 1
    assert str(summary(model.model)) == before and not model.model.is_fused()
    assert type(twin.fuse()) is type(model.model)
    copy.deepcopy(model.model).fuse()
    float_model: Any = YOLO("yolo11n.yaml").model
    assert float_model.fuse().is_fused()
