#!/usr/bin/env python
"""What works with which detector: every step of a quantization, with the real libraries.

    python benchmarks/detectors.py --output benchmarks/results/detectors.json
    python benchmarks/detectors.py --only YOLO11n RT-DETR
    python benchmarks/detectors.py --markdown benchmarks/results/detectors.json

Models have random weights, and images are small: it shows what works, and what a step costs beside
the float model's, not how good a detector is.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Last, so that an installed hqod_ops goes before the one in the tree.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from bench import machine
from torch import Tensor, nn

from hqod_ops.integrations import harmonize
from hqod_ops.quant import (
    calibrate,
    detection_network,
    export_onnx,
    parameter_groups,
    place_on_producers,
    prepare_qat,
    summary,
)

SIZE = 128
STEPS = 3
ROUNDS = 3
COLUMNS = (
    "harmonize",
    "prepare",
    "producers",
    "calibrate",
    "train",
    "EMA copy",
    "save and load",
    "compile",
    "export",
    "equal in the runtime",
    "speed",
)


@dataclass(frozen=True)
class Detector:
    """A model of a library, and how it is trained."""

    library: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    images: Callable[[nn.Module, Any], Tensor]
    """What its exported network takes."""


def _boxes() -> Tensor:
    return torch.tensor([[0.2, 0.2, 0.6, 0.7], [0.5, 0.4, 0.9, 0.8]])


def _pictures() -> Tensor:
    pictures = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 0.3
    for x1, y1, x2, y2 in (_boxes() * SIZE).int().tolist():
        pictures[:, :, y1:y2, x1:x2] += 0.5
    return pictures


def torchvision_detector(name: str) -> Detector:
    def build() -> nn.Module:
        from torchvision.models import detection

        size = {} if name.startswith("ssd") else {"min_size": SIZE, "max_size": SIZE}
        made: nn.Module = getattr(detection, name)(
            weights=None, weights_backbone=None, num_classes=2 if "keypoint" in name else 3, **size
        )
        return made

    def batch() -> Any:
        target: dict[str, Tensor] = {"boxes": _boxes() * SIZE, "labels": torch.tensor([1, 1])}
        if "mask" in name:
            target["masks"] = torch.ones(2, SIZE, SIZE, dtype=torch.uint8)
        if "keypoint" in name:
            target["keypoints"] = torch.tensor([[[60.0, 60.0, 1.0]] * 17] * 2)
        return list(_pictures()), [target, target]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return sum(model(*batch).values(), start=torch.zeros(()))

    def images(model: Any, batch: Any) -> Any:
        found = model.transform([batch[0][0]])[0].tensors
        if "rcnn" in name:
            return found, torch.tensor([[[8.0, 8.0, 90.0, 90.0], [30.0, 20.0, 100.0, 80.0]]])
        return found

    return Detector("torchvision", build, batch, loss, images)


def ultralytics_detector(name: str) -> Detector:
    def build() -> nn.Module:
        from ultralytics.cfg import get_cfg
        from ultralytics.nn.tasks import DetectionModel

        model: Any = DetectionModel(f"{name}.yaml", nc=3, verbose=False)
        model.args = get_cfg()
        return model

    def batch() -> Any:
        corners = _boxes()
        centres = torch.cat(
            [(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1
        )
        return {
            "img": _pictures(),
            "batch_idx": torch.tensor([0.0, 0.0, 1.0, 1.0]),
            "cls": torch.tensor([[0.0], [1.0]] * 2),
            "bboxes": centres.repeat(2, 1),
        }

    return Detector(
        "ultralytics", build, batch, lambda m, b: m(b)[0].sum(), lambda m, b: b["img"][:1]
    )


def transformers_detector(name: str) -> Detector:
    def build() -> nn.Module:
        import transformers as hf

        kind = getattr(hf, f"{name}Config")
        if "Detr" in name and "RT" not in name:
            backbone = hf.ResNetConfig(out_features=["stage2", "stage3", "stage4"])
            layers = {"encoder_layers": 2, "decoder_layers": 2, "num_queries": 30}
            config = kind(backbone_config=backbone, use_timm_backbone=False, num_labels=3, **layers)
        else:
            config = kind(num_labels=3, num_queries=30)
        model: nn.Module = hf.AutoModelForObjectDetection.from_config(config)
        return model

    def batch() -> Any:
        corners = _boxes()
        centres = torch.cat(
            [(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1
        )
        label = {"boxes": centres, "class_labels": torch.tensor([0, 1])}
        return {"pixel_values": _pictures(), "labels": [label, label]}

    return Detector(
        "transformers", build, batch, lambda m, b: m(**b).loss, lambda m, b: b["pixel_values"][:1]
    )


DETECTORS = {
    "RetinaNet-R50": torchvision_detector("retinanet_resnet50_fpn"),
    "FCOS-R50": torchvision_detector("fcos_resnet50_fpn"),
    "SSD300-VGG16": torchvision_detector("ssd300_vgg16"),
    "SSDLite320": torchvision_detector("ssdlite320_mobilenet_v3_large"),
    "Faster R-CNN MBv3": torchvision_detector("fasterrcnn_mobilenet_v3_large_320_fpn"),
    "Mask R-CNN R50": torchvision_detector("maskrcnn_resnet50_fpn"),
    "Keypoint R-CNN R50": torchvision_detector("keypointrcnn_resnet50_fpn"),
    "YOLOv8n": ultralytics_detector("yolov8n"),
    "YOLO11n": ultralytics_detector("yolo11n"),
    "YOLOv10n": ultralytics_detector("yolov10n"),
    "YOLO26n": ultralytics_detector("yolo26n"),
    "DETR-R50": transformers_detector("Detr"),
    "Deformable DETR-R50": transformers_detector("DeformableDetr"),
    "RT-DETR": transformers_detector("RTDetr"),
    "RT-DETRv2": transformers_detector("RTDetrV2"),
    "D-FINE": transformers_detector("DFine"),
}


class Trial:
    """One detector through all columns; each fills in one of them."""

    def __init__(self, detector: Detector) -> None:
        torch.manual_seed(0)
        self.of = detector
        self.model: Any = detector.build().train()
        self.float_model = copy.deepcopy(self.model)
        self.batch = detector.batch()
        self.report: Any = None
        self.loads = True

    def harmonize(self) -> str:
        before = float(self.of.loss(copy.deepcopy(self.model), self.batch))
        harmonize(self.model)
        after = float(self.of.loss(copy.deepcopy(self.model), self.batch))
        assert after == after and after != before
        return "yes"

    def prepare(self) -> str:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            prepare_qat(self.model, "hqod_w4a4")
        rows = summary(self.model)
        odd = sum("stay in float" in str(w.message) for w in said)
        edges = sum(row.weight_bits == 8 for row in rows)
        return f"{len(rows)} layers, {edges} in 8 bits" + (", some in float" if odd else "")

    def producers(self) -> str:
        model = prepare_qat(copy.deepcopy(self.float_model), "hqod_w4a4")
        report = place_on_producers(model)
        moved = sum(len(entry.readers) for entry in report.placed) + len(report.sole_readers)
        left = len(report.not_placed)
        return f"{left} of {moved + left} layers left"

    def calibrate(self) -> str:
        calibrate(self.model, [self.batch], progress=False)
        left = sum(row.weight_bits == 32 for row in summary(self.model))
        return "yes" + (f", {left} copies left" if left else "")

    def train(self) -> str:
        groups = parameter_groups(self.model, 1e-4)
        optimizer = torch.optim.AdamW(groups, lr=1e-4)
        for _ in range(STEPS):
            loss = self.of.loss(self.model.train(), self.batch)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
            optimizer.step()
            optimizer.zero_grad()
        assert bool(torch.isfinite(loss))
        return "yes"

    def _outputs(self, model: Any) -> list[Tensor]:
        images = self.of.images(model.eval(), self.batch)
        with torch.no_grad():
            found = detection_network(model)(*(images if isinstance(images, tuple) else (images,)))
        return list(found)

    def _same(self, model: Any) -> str:
        pairs = zip(self._outputs(self.model), self._outputs(model), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
        return "yes"

    def ema_copy(self) -> str:
        return self._same(copy.deepcopy(self.model))

    def save_and_load(self) -> str:
        loaded = prepare_qat(self.of.build(), "hqod_w4a4")
        loaded.load_state_dict(self.model.state_dict())
        return self._same(loaded)

    def compile(self) -> str:
        images = self.of.images(self.model.eval(), self.batch)
        images = images if isinstance(images, tuple) else (images,)
        network = detection_network(self.model)
        torch._dynamo.reset()
        with torch.no_grad():
            wanted = network(*images)
            found = torch.compile(network, backend="aot_eager")(*images)
        for one, other in zip(wanted, found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        return "yes"

    def export(self) -> str:
        images = self.of.images(self.model.eval(), self.batch)
        network = detection_network(self.model).eval()
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            self.report = export_onnx(network, images, Path(folder) / "model.onnx")
        self.loads = not any("cannot load" in str(w.message) for w in said)
        return f"{self.report.size / 1e6:.3g} of {self.report.float_size / 1e6:.3g} MB"

    def equal_in_the_runtime(self) -> str:
        if self.report is None:
            return ""
        if not self.loads:
            return "no: onnxruntime's default session cannot load it"
        return f"yes, to {self.report.relative_difference:.1g}"

    def speed(self) -> str:
        def step(model: Any) -> float:
            start = time.process_time()
            self.of.loss(model.train(), self.batch).backward()
            model.zero_grad()
            return time.process_time() - start

        step(self.float_model), step(self.model)
        ratios = [step(self.model) / step(self.float_model) for _ in range(ROUNDS)]
        return f"{statistics.median(ratios):.2f}"


def run(name: str, columns: Sequence[str]) -> dict[str, str]:
    """The cells of a detector."""
    trial = Trial(DETECTORS[name])
    cells: dict[str, str] = {}
    for column in columns:
        try:
            cells[column] = getattr(trial, column.lower().replace(" ", "_"))()
        except Exception as error:  # whatever the libraries raise is the finding
            text = str(error).strip().partition("\n")[0][:160]
            cells[column] = f"no: {type(error).__name__}: {text}"
    return cells


def markdown(result: dict[str, Any]) -> str:
    """The table; what failed is a footnote."""
    lines = ["| model | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 1) + "|"]
    notes: list[str] = []
    for name, cells in result["detectors"].items():
        row = [name]
        for column in COLUMNS:
            text = cells[column]
            if text.startswith("no: "):
                if text not in notes:
                    notes.append(text)
                text = f"no ({notes.index(text) + 1})"
            row.append(text)
        lines.append("| " + " | ".join(row) + " |")
    lines += ["", *(f"{i}. {note[4:]}" for i, note in enumerate(notes, 1))]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=DETECTORS, metavar="MODEL")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=COLUMNS)
    parser.add_argument("--output", type=Path, help="the result; what is in it already is kept")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="print a result as a table")
    args = parser.parse_args()
    if args.markdown is not None:
        print(markdown(json.loads(args.markdown.read_text())))
        return
    torch.set_num_threads(1)
    result: dict[str, Any] = {"machine": machine.describe(), "detectors": {}}
    result["libraries"] = _versions()
    if args.output is not None and args.output.exists():
        result["detectors"] = json.loads(args.output.read_text())["detectors"]
    for name in args.only or DETECTORS:
        cells = {**result["detectors"].get(name, {}), **run(name, args.columns)}
        print(name, json.dumps(cells, indent=1), flush=True)
        done = {**result["detectors"], name: cells}
        result["detectors"] = {key: done[key] for key in DETECTORS if key in done}
        if args.output is not None:
            args.output.write_text(json.dumps(result, indent=1) + "\n")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torchvision", "ultralytics", "transformers", "onnxruntime")
    return {name: version(name) for name in names}


if __name__ == "__main__":
    main()
