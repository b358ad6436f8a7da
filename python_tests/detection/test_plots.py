"""Pictures: every plot draws something, refuses nonsense, and names the extra that it needs."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hqod_ops.detection import evaluation, plots
from hqod_ops.detection.data import DigitScenes, coco
from hqod_ops.detection.data import digits as digits_module
from hqod_ops.detection.harmony import HarmonyReport

pytestmark = pytest.mark.require("matplotlib", "PIL", "sklearn")


def look(path: Path) -> np.ndarray[Any, Any]:
    """The pixels of a picture, which must not be empty."""
    from PIL import Image

    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.std() > 5
    return pixels


def report(seed: int = 0, count: int = 500) -> HarmonyReport:
    rng = np.random.default_rng(seed)
    ious = rng.uniform(size=count)
    return HarmonyReport((ious + rng.normal(0, 0.1, count)).clip(0, 1), ious)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_harmony(tmp_path: Path, count: int) -> None:
    path = tmp_path / "new" / "harmony.png"
    plots.plot_harmony({f"model {i}": report(i) for i in range(count)}, path)
    height, width, _ = look(path).shape
    assert (width > 3 * height) == (count == 3 and width > 3 * height)
    assert width > 400 and height > 400


def test_harmony_without_matches(tmp_path: Path) -> None:
    empty = HarmonyReport(np.zeros(0), np.zeros(0))
    assert math.isnan(empty.pearson)
    plots.plot_harmony({"empty": empty}, tmp_path / "empty.png")
    look(tmp_path / "empty.png")
    with pytest.raises(ValueError, match="reports: expected at least one, got none"):
        plots.plot_harmony({}, tmp_path / "none.png")


def scene(count: int) -> tuple[Any, Any, Any]:
    data = DigitScenes("val", num_images=count)
    images, targets = zip(*(data[i] for i in range(count)), strict=True)
    outputs = [
        {"boxes": t["boxes"] + 1, "labels": t["labels"], "scores": torch.ones(len(t["labels"]))}
        for t in targets
    ]
    return images, outputs, targets


def has_color(pixels: np.ndarray[Any, Any], color: str) -> bool:
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((np.abs(pixels.astype(int) - wanted).max(axis=-1) < 3).any())


def test_detections(tmp_path: Path) -> None:
    images, outputs, targets = scene(5)
    plots.draw_detections(images, outputs, targets, tmp_path / "a.png", columns=3)
    found = look(tmp_path / "a.png")
    crop = slice(0, int(found.shape[0] * 0.85))  # without the legend
    assert has_color(found[crop], plots.GREEN) and not has_color(found[crop], plots.RED)
    wrong = [{**output, "labels": (output["labels"] + 1) % 10} for output in outputs]
    names = [f"digit {i}" for i in range(10)]
    plots.draw_detections(images, wrong, targets, tmp_path / "b.png", categories=names)
    missed = look(tmp_path / "b.png")
    assert has_color(missed, plots.RED)


def test_detections_none_found(tmp_path: Path) -> None:
    images, outputs, targets = scene(1)
    empty = {key: value[:0] for key, value in outputs[0].items()}
    plots.draw_detections(images, [empty], targets, tmp_path / "none.png")
    look(tmp_path / "none.png")
    with pytest.raises(ValueError, match="got 1, 0 and 1"):
        plots.draw_detections(images, [], targets, tmp_path / "none.png")


@pytest.mark.parametrize("many", [False, True])
def test_curves(tmp_path: Path, many: bool) -> None:
    run: list[dict[str, float]] = [
        {"epoch": 1, "loss": 2.0},
        {"epoch": 2, "loss": 1.0, "AP": 0.3},
    ]
    plots.plot_curves({"a": run, "b": run} if many else run, tmp_path / "curves.png")
    look(tmp_path / "curves.png")


def test_curves_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="history: expected at least one epoch"):
        plots.plot_curves([], tmp_path / "curves.png")


def test_global_style_is_left_alone(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.plot_curves([{"epoch": 1, "loss": 2.0}], tmp_path / "curves.svg")
    assert dict(matplotlib.rcParams) == before
    assert (
        "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    )


MISSING: dict[str, Callable[[Path], object]] = {
    "matplotlib": lambda path: plots.plot_curves([{"epoch": 1, "loss": 2.0}], path / "x.png"),
    "pycocotools": lambda path: evaluation.evaluate_coco({"images": [], "categories": []}, []),
    "scikit-learn": lambda path: digits_module._handwriting.__wrapped__(),
    "Pillow": lambda path: coco.write_coco(DigitScenes("val", num_images=1), path, "val"),
}
MODULES = {
    "matplotlib": "matplotlib",
    "pycocotools": "pycocotools.coco",
    "scikit-learn": "sklearn.datasets",
    "Pillow": "PIL.Image",
}


@pytest.mark.parametrize("name", MISSING)
def test_missing_package(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MODULES[name], None)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)  # which can do without pycocotools
    with pytest.raises(ImportError, match=rf'{name} .*pip install "hqod_ops\[detection\]"'):
        MISSING[name](tmp_path)
