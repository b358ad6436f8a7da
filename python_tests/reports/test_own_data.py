"""Photos of one's own through the ``hqod`` command, without a setting but the folder.

They used to be stretched to the demonstration's 96 x 96 without a word, and the ONNX export asked
for a data set that had moved since.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")
pytest.importorskip("msgspec")

from hqod_ops.cli import BAD_INPUT, main
from hqod_ops.training.build import load_detector
from hqod_ops.training.data import image_shape, open_data, settled
from hqod_ops.training.files import saved_shape
from hqod_ops.training.reading import from_dict
from hqod_ops.training.settings import DataConfig
from python_tests.reports import layouts

SMALL = [
    *("--set", "model.stem=8", "--set", "model.widths=[8, 8, 16]", "--set", "model.channels=8"),
    *("--set", "model.head_depth=1", "--epochs", "1", "--batch-size", "1", "--quiet"),
    *("--device", "cpu", "--threads", "1"),
]


def photos(root: Path, *sizes: tuple[int, int], box: Any = (40, 30, 30, 24)) -> Path:
    """The same pictures to train and to test on, each with a box."""
    content: dict[str, Any] = {**layouts.CONTENT, "images": [], "annotations": []}
    for number, (width, height) in enumerate(sizes):
        for split in ("train", "val"):
            layouts.save(root / split / f"{number}.png", width, height)
        image = {"id": number, "file_name": f"{number}.png", "width": width, "height": height}
        content["images"].append(image)
        note = {"id": number + 1, "image_id": number, "category_id": 1, "bbox": list(box)}
        content["annotations"].append(note)
    for split in ("train", "val"):
        layouts.coco(root, content, f"{split}/0.png", f"annotations/{split}.json")
    return root


def train(data: Path, name: str, *options: str) -> int:
    runs = str(data.parent / "runs")
    return main(["train", "--data", str(data), "--runs", runs, "--name", name, *SMALL, *options])


@pytest.mark.parametrize(
    ("sizes", "settings", "expected"),
    [
        ([(320, 240)], {}, (256, 341)),  # to a multiple of 32, in its shape
        ([(160, 128), (160, 128), (480, 640)], {}, (128, 160)),  # the median, not the largest
        ([(2000, 1500)], {}, (640, 853)),
        ([(40, 20)], {}, (32, 64)),
        ([(1000, 64)], {}, (8, 128)),  # a panorama costs no more than twice a square
        ([(1000, 64)], {"max_side": 500}, (32, 500)),
        ([(320, 240)], {"short_side": 100}, (100, 133)),
        ([(320, 240)], {"size": 0}, (240, 320)),
        ([(320, 240)], {"size": 96}, (96, 96)),
    ],
)
def test_sizes(
    tmp_path: Path, sizes: list[tuple[int, int]], settings: dict[str, int], expected: Any
) -> None:
    config = DataConfig(str(photos(tmp_path, *sizes, box=(2, 2, 16, 16))), **settings)
    data = open_data(config, train=True)
    image, target = data[0]
    height, width = image_shape(data)
    assert (height, width) == expected
    if len(sizes) == 1:
        assert image.shape == (3, *expected)
        factor = torch.tensor([width / sizes[0][0], height / sizes[0][1]])
        (box,) = target["boxes"]
        assert torch.allclose(box[2:] - box[:2], 16 * factor, rtol=1e-4)  # mirrored or not
    # What was chosen, written down, opens the same.
    again = open_data(settled(config, data))
    assert again[0][0].shape == image.shape and image_shape(again) == expected


def test_digits_and_saved_settings_keep_their_sizes() -> None:
    assert settled(DataConfig()).size == 96 and settled(DataConfig(size=64)).size == 64
    saved = from_dict({"data": {"source": "photos", "size": 96, "short_side": 0, "max_side": 0}})
    assert settled(saved.data) == saved.data


@pytest.mark.require("onnx", "onnxruntime", "onnxscript")
def test_from_photos_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes are said and kept; neither export nor a quantized run asks for them again."""
    data = photos(tmp_path / "photos", (160, 120), (160, 120))
    assert train(data, "fp32") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Images: 2 to train on with 2 boxes (0 clipped at the border, 0 dr")
    assert "from 160 x 120 to 171 x 128 pixels" in lines[0]
    runs = tmp_path / "runs"
    settings = load_detector(runs / "fp32")[1].data
    assert (settings.size, settings.short_side, settings.max_side) == (0, 128, 256)
    assert from_dict(json.loads((runs / "fp32" / "config.json").read_text())).data == settings
    # Another folder's photos are brought to the sizes that the weights know.
    larger = photos(tmp_path / "larger", (640, 480))
    assert train(larger, "w4", "--bits", "4", "--init", str(runs / "fp32")) == 0
    quantized = load_detector(runs / "w4")[1].data
    assert replace(quantized, source=settings.source) == settings
    assert saved_shape(runs / "w4") == (128, 171)
    assert train(larger, "w4", "--bits", "4", "--init", str(runs / "fp32"), "--resume") == 0

    capsys.readouterr()
    shutil.move(larger, tmp_path / "moved")
    file = tmp_path / "w4.onnx"
    import onnx

    def shape() -> list[int]:
        dims = onnx.load(file).graph.input[0].type.tensor_type.shape.dim
        return [dim.dim_value for dim in dims]

    assert main(["export", str(runs / "w4"), "--out", str(file)]) == 0
    assert shape() == [1, 3, 128, 176]  # padded to the network's stride, as a batch is
    assert main(["export", str(runs / "w4"), "--out", str(file), "--data", str(data)]) == 0
    assert shape() == [1, 3, 128, 176]
    capsys.readouterr()
    assert main(["eval", str(runs / "w4"), "--quiet"]) == BAD_INPUT
    assert "no such folder" in (error := capsys.readouterr().err) and "--data names where" in error
    assert main(["eval", str(runs / "w4"), "--quiet", "--data", str(tmp_path / "moved")]) == 0
    assert "AP" in capsys.readouterr().out


def test_boxes_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = photos(tmp_path / "photos", (64, 48), (64, 48), (64, 48), box=(8, 6, 30, 24))
    file = data / "annotations/train.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"] = [50, 30, 40, 10]
    content["annotations"][1]["bbox"] = [500, 500, 30, 24]
    file.write_text(json.dumps(content))
    assert train(data, "run") == 0
    assert "3 to train on with 2 boxes (1 clipped at the border, 1 dropped)" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((5000, 5000, 30, 24), "none of its 2 boxes has an area inside its image"),
        ((0.1, 0.1, 0.4, 0.4), "are they fractions of the image?"),
    ],
)
def test_nothing_to_learn_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], box: Any, message: str
) -> None:
    assert train(photos(tmp_path / "photos", (64, 48), (64, 48), box=box), "run") == BAD_INPUT
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_size_is_a_number_or_auto(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = photos(tmp_path / "photos", (64, 48))
    for text, wanted in (("-1", "int >= 0"), ("large", "int or 'auto'"), ("1.5", "int or 'auto'")):
        assert train(data, "run", "--set", f"data.size={text}") == BAD_INPUT
        error = capsys.readouterr().err
        assert error.startswith(f"hqod: data.size: expected {wanted}, got "), error
    assert train(data, "run", "--set", "data.size=auto") == 0
