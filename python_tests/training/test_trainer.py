"""Training: resumed runs give the same bits, interrupts leave a checkpoint, schedules are right."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("pycocotools")

from hqod_ops.detection.data import DigitScenes, write_coco
from hqod_ops.detection.models.atss import ATSS
from hqod_ops.quant import quantizer_parameters
from hqod_ops.quant.config import FLOAT_BITS, QATConfig
from hqod_ops.training import ConfigError
from hqod_ops.training.batch import batch_images, training_targets
from hqod_ops.training.build import build_model, load_detector, quantize
from hqod_ops.training.data import open_data
from hqod_ops.training.evaluate import predict
from hqod_ops.training.files import CHECKPOINT, HARMONY, LOG, RESULT, read_checkpoint
from hqod_ops.training.optim import learning_rate, make_optimizer
from hqod_ops.training.reading import from_dict
from hqod_ops.training.run import Run
from hqod_ops.training.settings import (
    DataConfig,
    ScheduleConfig,
)
from hqod_ops.training.trainer import Interrupted, Trainer
from python_tests.training.tiny import TINY, StopAt, same, tiny_config, without_times


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("bits", [FLOAT_BITS, 4], ids=["float", "w4"])
@pytest.mark.parametrize("stop", [1, 5, 9], ids=["first epoch", "second epoch", "last step"])
def test_resumed_training_is_thesame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, stop: int
) -> None:
    whole = tiny_config("whole", quant=QATConfig(bits, bits))
    result = Run(whole, tmp_path).train(progress=False)

    parts = replace(whole, name="parts")
    with monkeypatch.context() as patch:
        StopAt(patch, stop)
        with pytest.raises(Interrupted, match=f"in epoch {(stop - 1) // 3 + 1}"):
            Run(parts, tmp_path).train(progress=False)
    assert not (tmp_path / "parts" / RESULT).exists()
    torch.rand(7)  # the random state of the process that resumes is another one
    resumed = Run(parts, tmp_path, resume=True).train(progress=False)

    a, b = read_checkpoint(tmp_path / "whole"), read_checkpoint(tmp_path / "parts")
    assert a["epoch"] == b["epoch"] == 3
    for key in ("model", "optimizer", "scheduler", "rng", "cuda_rng"):
        assert same(a[key], b[key]), key
    assert without_times(a["history"]) == without_times(b["history"])
    assert {**result, "seconds": 0} == pytest.approx({**resumed, "seconds": 0}, abs=0, nan_ok=True)


def test_seeds_differ_and_repeat(tmp_path: Path) -> None:
    states = [
        (Run(tiny_config(name, seed=seed), tmp_path).train(progress=False), name)[1]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    a, b, c = (read_checkpoint(tmp_path / name)["model"] for name in states)
    assert same(a, b) and not same(a, c)


def test_what_a_run_leaves(tmp_path: Path) -> None:
    config = tiny_config("demo/run")
    result = Run(config, tmp_path).train(progress=False)
    directory = tmp_path / "demo" / "run"
    names = {"config.json", LOG, CHECKPOINT, HARMONY, RESULT}
    assert {path.name for path in directory.iterdir()} == names
    lines = [json.loads(line) for line in (directory / LOG).read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert all(math.isclose(line["loss"], sum(line["terms"].values())) for line in lines)
    assert from_dict(json.loads((directory / "config.json").read_text())) == config
    stored = json.loads((directory / RESULT).read_text())
    assert stored["epochs"] == 3 and stored["AP"] == result["AP"]


def test_loaded_detector_is_the_trained_one(tmp_path: Path) -> None:
    quant = QATConfig(2, 2, weight_init="lsq")
    Run(tiny_config("w2", quant=quant), tmp_path).train(progress=False)
    model, config, categories = load_detector(tmp_path / "w2")
    assert config.quant == quant and categories == [str(i) for i in range(10)]
    outputs, targets = predict(model, open_data(config.data), progress=False)
    assert len(outputs) == len(targets) == 4
    assert len(quantizer_parameters(model)) > 0


def test_quantized_run_starts_from_the_float_one(tmp_path: Path) -> None:
    Run(tiny_config("float"), tmp_path).train(progress=False)
    init = str(tmp_path / "float" / CHECKPOINT)
    still = replace(ScheduleConfig(epochs=1, batch_size=4), lr=0.0)
    config = tiny_config("w8", init=init, quant=QATConfig(8, 8), schedule=still)
    Run(config, tmp_path).train(progress=False)
    start, end = (read_checkpoint(tmp_path / name)["model"] for name in ("float", "w8"))
    weights = [k for k in start if k.endswith("weight")]
    assert weights and all(torch.equal(start[k], end[k]) for k in weights)
    with pytest.raises(ConfigError, match="init: expected the checkpoint of a float model"):
        init = str(tmp_path / "w8")
        Run(tiny_config("again", init=init), tmp_path).train(progress=False)


def test_calibration_sees_a_sample_one_batch_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[int] = []
    ahead: list[int] = []
    original = DigitScenes.load

    def load(dataset: DigitScenes, index: int) -> Any:
        loaded.append(index)
        return original(dataset, index)

    def look(network: object, batches: Iterable[torch.Tensor], **options: object) -> None:
        for number, batch in enumerate(batches, start=1):
            ahead.append(len(loaded) - 4 * number)
            assert batch.shape == (4, 3, 64, 64)
        raise KeyboardInterrupt

    monkeypatch.setattr(DigitScenes, "load", load)
    monkeypatch.setattr("hqod_ops.training.build.calibrate", look)
    seen = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        loaded.clear()
        data = DataConfig(size=64, train_images=12, test_images=4, calibration_images=8)
        config = tiny_config(name, seed=seed, data=data, quant=QATConfig(4, 4))
        with pytest.raises(KeyboardInterrupt):
            Run(config, tmp_path).train(progress=False)
        seen.append(list(loaded))
    assert ahead == [0] * 6
    assert all(len(set(order)) == 8 and order != sorted(order) for order in seen)
    assert seen[0] == seen[1] != seen[2]


def _digit_files(root: Path, change: Callable[[dict[str, Any]], None], *changed: str) -> DataConfig:
    """Digits in COCO's layout, with a change of the annotations of some splits."""
    for split in ("train", "val"):
        write_coco(DigitScenes(split, num_images=4, size=64), root, split)
    for split in changed:
        file = root / "annotations" / f"instances_{split}.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
    return DataConfig(source=str(root), size=64)


def _one_less(content: dict[str, Any]) -> None:
    content["annotations"] = []
    del content["categories"][-1]


def _renamed(content: dict[str, Any]) -> None:
    content["categories"][3]["name"] = "drei"


def _other_ids(content: dict[str, Any]) -> None:
    content["categories"][3]["id"] = 99
    content["annotations"] = []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_one_less, "expected the 10 classes of data.train_split, got 9 classes"),
        (_renamed, "got 'drei' for '3' as class 4 of 10"),
        (_other_ids, "got '4' for '3' as class 4 of 10"),
    ],
)
def test_train_and_test_classes_are_thesame(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    data = _digit_files(tmp_path / "data", change, "val")
    with pytest.raises(ConfigError, match=f"^data.test_split: .*{message}"):
        Run(tiny_config("run", data=data), tmp_path).train(progress=False)
    assert not (tmp_path / "run" / CHECKPOINT).exists()


def test_classes_to_start_from_are_those_of_the_data(tmp_path: Path) -> None:
    Run(tiny_config("float"), tmp_path).train(progress=False)
    data = _digit_files(tmp_path / "data", _renamed, "train", "val")
    config = tiny_config("w4", data=data, init=str(tmp_path / "float"))
    with pytest.raises(ConfigError, match="^init: .*got '3' for 'drei' as class 4 of 10"):
        Run(config, tmp_path).train(progress=False)


def test_existing_runs_are_safe(tmp_path: Path) -> None:
    config = tiny_config("run")
    Run(config, tmp_path).train(progress=False)
    with pytest.raises(ConfigError, match="holds a run already"):
        Run(config, tmp_path)
    with pytest.raises(ConfigError, match=r"cannot resume: seed was 0 and is now 1"):
        Run(replace(config, seed=1), tmp_path, resume=True)
    with pytest.raises(ConfigError, match=r"^seed: expected int >= 0, got -1"):
        Run(replace(config, seed=-1), tmp_path)


def test_schedules() -> None:
    rate = learning_rate(ScheduleConfig(epochs=10, warmup=0.2), 50)
    values = [rate(step) for step in range(501)]
    assert values[0] == 0.04 and values[100] == 1.0 and values[500] == pytest.approx(0.001)
    assert values.index(max(values)) == 100 and sorted(values[100:], reverse=True) == values[100:]
    published = ScheduleConfig(epochs=16, policy="step", steps=(8, 14), warmup=1e-3)
    rate = learning_rate(published, 10)
    assert [rate(s) for s in (0, 10, 79, 80, 139, 140)] == pytest.approx(
        [1e-3, 1, 1, 0.1, 0.1, 0.01]
    )


def test_optimizer_groups_hold_every_parameter_once() -> None:
    config = tiny_config("w4", quant=QATConfig(4, 4))
    model = build_model(config, 10)
    quantize(model, config)
    schedule = ScheduleConfig(weight_decay=0.1, lr=1.0, scale_lr=0.25, scale_decay=0.01)
    matrices, rest, scales = make_optimizer(model, schedule).param_groups
    grouped = [id(p) for group in (matrices, rest, scales) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert {id(p) for p in scales["params"]} == {id(p) for p in quantizer_parameters(model)}
    assert (matrices["weight_decay"], rest["weight_decay"], scales["weight_decay"]) == (
        0.1,
        0,
        0.01,
    )
    assert scales["initial_lr" if "initial_lr" in scales else "lr"] == 0.25


def test_diverged_loss_stops(tmp_path: Path) -> None:
    config = tiny_config("run")
    model = ATSS(TINY, 10)
    trainer = Trainer(model, open_data(config.data, train=True), config, tmp_path)
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(FloatingPointError, match="the loss is not finite in epoch 1: cls = nan"):
        trainer.fit(progress=False)


def test_batches_are_padded_with_grey() -> None:
    images = [torch.ones(3, 20, 30), torch.zeros(3, 16, 16)]
    batch = batch_images(images, torch.device("cpu"), 16)
    assert batch.shape == (2, 3, 32, 32)
    assert (batch[0, :, :20, :30] == 2).all() and (batch[1, :, :16, :16] == -2).all()
    assert (batch[0, :, 20:] == 0).all() and (batch[1, :, :, 16:] == 0).all()


def test_crowds_are_not_learned() -> None:
    target = {
        "boxes": torch.rand(3, 4),
        "labels": torch.tensor([1, 2, 3]),
        "iscrowd": torch.tensor([0, 1, 0]),
    }
    (clean,) = training_targets([target], torch.device("cpu"))
    assert clean["labels"].tolist() == [1, 3] and clean["boxes"].shape == (2, 4)


def test_too_few_images(tmp_path: Path) -> None:
    schedule = ScheduleConfig(epochs=1, batch_size=13)
    with pytest.raises(ConfigError, match="schedule.batch_size: expected at most the 12"):
        Run(tiny_config("run", schedule=schedule), tmp_path).train(progress=False)
