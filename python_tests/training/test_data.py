"""What a run's settings say of its images reaches the data set."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")
pytest.importorskip("msgspec")

from hqod_ops.detection.data import DataError
from hqod_ops.training import ConfigError
from hqod_ops.training.data import open_data
from hqod_ops.training.settings import DataConfig
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
