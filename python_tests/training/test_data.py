"""What a run's settings say of its images reaches the data set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")
pytest.importorskip("msgspec")

from hqod_ops.cli import BAD_INPUT, main
from hqod_ops.detection.data import DataError, DigitScenes, write_coco
from hqod_ops.training import ConfigError
from hqod_ops.training.data import open_data
from hqod_ops.training.run import Run
from hqod_ops.training.settings import DataConfig, RunConfig
from python_tests.reports import layouts


def test_classes_by_name(tmp_path: Path) -> None:
    """Cats alone are data of all twenty classes of VOC, unless the setting says otherwise."""
    source = str(layouts.voc(tmp_path, "a"))
    assert len(open_data(DataConfig(source)).categories) == 20
    assert open_data(DataConfig(source, categories=("cat",))).categories == ["cat"]
    with pytest.raises(ConfigError, match=r"^data\.categories: "):
        open_data(DataConfig(source, categories=("cat", "cat")))


def test_nothing_to_learn_from(tmp_path: Path) -> None:
    """Crowds are no objects to train on; to test on such images is no error."""
    source = str(layouts.coco(tmp_path, layouts.edited(annotations__iscrowd=1)))
    config = DataConfig(source, train_split="val")
    assert len(open_data(config)) == 1
    with pytest.raises(DataError, match="no box to learn from"):
        open_data(config, train=True)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Nine images to train on and four to test on, of which three and one are cut off."""
    for split, count, bad in (("train", 9, (0, 4, 8)), ("val", 4, (2,))):
        write_coco(DigitScenes(split, num_images=count), tmp_path, split)
        for number in bad:
            path = tmp_path / split / f"{number:06d}.png"
            path.write_bytes(path.read_bytes()[:300])
    return tmp_path


@pytest.mark.require("sklearn")
def test_unreadable_images_are_named_before_the_training(damaged: Path, tmp_path: Path) -> None:
    config = RunConfig("x", device="cpu", data=DataConfig(str(damaged)))
    with pytest.raises(DataError, match="000000.png: cannot be read") as caught:
        Run(config, tmp_path / "runs").train(progress=False)
    assert "; also 000004.png, 000008.png; --skip-unreadable " in str(caught.value)
    # Those of the test images too, though they are looked at after all epochs.
    config = replace(config, data=replace(config.data, train_split="val"))
    with pytest.raises(DataError, match="000002.png: cannot be read.*; --skip-unreadable "):
        Run(config, tmp_path / "runs").train(progress=False)
    assert not (tmp_path / "runs" / "x" / "last.pt").exists()


@pytest.mark.require("sklearn")
def test_unreadable_images_are_left_out(damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The others are what they were: pixels, boxes, ids and ground truth."""
    whole = open_data(DataConfig(str(damaged)), train=True)
    with caplog.at_level("WARNING"):
        data = open_data(DataConfig(str(damaged), unreadable="skip"), train=True)
    assert "3 of 9 images left out" in caplog.text and len(data) == 6
    kept = [1, 2, 3, 5, 6, 7]
    for place, index in enumerate(kept):
        (image, target), (wanted, truth) = data.load(place), whole.load(index)
        assert torch.equal(image, wanted)
        assert target.keys() == truth.keys()
        for name, value in target.items():
            assert value == truth[name] if isinstance(value, int) else value.equal(truth[name])
    images, notes = (data.coco_ground_truth[key] for key in ("images", "annotations"))
    assert [image["id"] for image in images] == [
        whole.coco_ground_truth["images"][index]["id"] for index in kept
    ]
    assert len(notes) == sum(len(whole.load(index)[1]["boxes"]) for index in kept)
    for path in (damaged / "train").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="no image is left"):
        open_data(DataConfig(str(damaged), unreadable="skip"), train=True)
    assert len(open_data(DataConfig(str(damaged), unreadable="unchecked"), train=True)) == 9


@pytest.mark.require("sklearn")
def test_a_run_without_them(damaged: Path, tmp_path: Path) -> None:
    command = ["train", "--data", str(damaged), "--name", "x", "--epochs", "1", "--quiet"]
    command += ["--runs", str(tmp_path / "runs"), "--batch-size", "2", "--device", "cpu"]
    command += ["--set", "data.size=32", "--set", "model.channels=8"]
    assert main(command) == BAD_INPUT
    assert main([*command, "--skip-unreadable"]) == 0
    assert main(["eval", str(tmp_path / "runs" / "x"), "--quiet"]) == 0
