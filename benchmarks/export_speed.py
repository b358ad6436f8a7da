#!/usr/bin/env python
"""Speed of exported files beside the float model's, for torchvision's and Ultralytics' detectors.

    python benchmarks/export_speed.py                        # all, some minutes
    python benchmarks/export_speed.py --models retinanet --bits 4 --targets onnxruntime
    python benchmarks/export_speed.py --write                # the table in docs/export.md anew

Random weights, with statistics of batch norms from a random image: speed does not depend on the
values. Every file was checked against its model by the export. One thread; in a round all files
of a model run once each; time of the CPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

# Last, so that an installed hqod_ops goes before the one in the tree.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from bench import machine, tables
from bench.documents import write_block
from torch import nn

from hqod_ops.quant import PRESETS, calibrate, detection_network, prepare_qat
from hqod_ops.quant.export import bench_export, export_onnx, speed_table

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "export-speed.json"
DOCUMENT = ROOT / "docs" / "export.md"
SIZE = 320
CONFIGS = {2: "hqod_w2a2", 4: "hqod_w4a4", 8: "w8a8"}


def retinanet() -> nn.Module:
    """torchvision's RetinaNet-R50, with batch norms that train."""
    from torchvision.models.detection import retinanet_resnet50_fpn

    return retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=20)


def yolo11n() -> nn.Module:
    """Ultralytics' YOLO11n."""
    from ultralytics import YOLO

    model: nn.Module = YOLO("yolo11n.yaml").model
    return model


GOALS = {
    ("retinanet", 8, "onnxruntime"): 2.5,
    ("retinanet", 4, "onnxruntime"): 2.0,
    ("retinanet", 8, "openvino"): 3.2,
    ("retinanet", 4, "openvino"): 3.2,
    ("yolo11n", 8, "onnxruntime"): 1.3,
    ("yolo11n", 4, "onnxruntime"): 1.3,
    ("yolo11n", 8, "openvino"): 1.8,
    ("yolo11n", 4, "openvino"): 1.8,
}
"""How many times as fast as the float file the one for a runtime is to be there."""

MODELS: dict[str, Callable[[], nn.Module]] = {"retinanet": retinanet, "yolo11n": yolo11n}


def settled(build: Callable[[], nn.Module], image: torch.Tensor) -> nn.Module:
    """A model whose batch norms have factors of both signs and fit the image."""
    torch.manual_seed(0)
    model = build()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
        norm.momentum = None
    network = detection_network(model.eval())
    for norm in norms:
        norm.train()
    with torch.no_grad():
        network(image)
    return model.eval()


def quantized(model: nn.Module, bits: int, image: torch.Tensor, placement: str) -> nn.Module:
    """A prepared and calibrated copy."""
    config = replace(PRESETS[CONFIGS[bits]], placement=placement)
    model = prepare_qat(copy.deepcopy(model), config, example=[image])
    return calibrate(
        model, [image], forward=lambda m, x: detection_network(m)(x), progress=False
    ).eval()


def measure(name: str, placement: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The float file and those of all bits and targets, side by side."""
    image = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    model = settled(MODELS[name], image)
    network = detection_network(model)
    files = [folder / "float.onnx"]
    torch.onnx.export(network, (image,), files[0], opset_version=18, dynamo=True, verbose=False)
    facts: dict[str, dict[str, Any]] = {}
    for bits in args.bits:
        network = detection_network(quantized(model, bits, image, placement))
        for target in args.targets:
            path = folder / f"W{bits}A{bits}, {target}"
            report = export_onnx(network, image, path, target=target)
            facts[path.name] = {"bits": bits, "target": target, "kilobytes": report.size // 1000}
            files.append(path)
    speeds = bench_export(files, rounds=args.rounds, clock=time.process_time)
    print(f"{name}, {SIZE} px, quantizers on the {placement}\n{speed_table(speeds)}\n", flush=True)
    rows = [{**asdict(speed), **facts.get(speed.file, {})} for speed in speeds]
    return {"model": name, "placement": placement, "rows": rows}


def block(result: dict[str, Any]) -> str:
    """The tables of the document."""
    parts = [f"From `benchmarks/results/{RESULT.name}` (`python benchmarks/export_speed.py`):"]
    parts += [tables.head(result), ""]
    columns = ["runtime", "file", "ms", "against float", "goal", "in integers", "in float", "size"]
    for found in result["results"]:
        rows = []
        for row in found["rows"]:
            runtime = row["runtime"].partition(" ")[0]
            own = row.get("target") == runtime
            goal = GOALS.get((found["model"], row.get("bits"), runtime)) if own else None
            size = f"{row['kilobytes'] / 1000:.1f} MB" if "kilobytes" in row else ""
            left = sum((row["float_left"] or {}).values())
            cells = [row["runtime"], row["file"], f"{row['milliseconds']:.1f}"]
            cells += [f"{row['ratio']:.2f}x", f"{goal}x" if goal else "", str(row["integer"])]
            rows.append([*cells, str(left), size])
        title = f"{found['model']}, {SIZE} px, quantizers on the {found['placement']}"
        parts.append(tables.markdown(tables.Table(title, columns, rows)))
    return "\n".join(parts)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--bits", nargs="+", type=int, choices=CONFIGS, default=[8, 4])
    parser.add_argument(
        "--targets", nargs="+", default=["onnxruntime", "openvino", "smallest"], help="of the files"
    )
    parser.add_argument(
        "--placements", nargs="+", default=["inputs", "producers"], help="of the quantizers"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--write", action="store_true", help="measure nothing, write the document")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    args = parser.parse_args()
    if args.write:
        result = json.loads(args.output.read_text(encoding="utf-8"))
        write_block(args.document, "export_speed", block(result))
        return
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    described = {**machine.describe(), "clock": "cpu"}
    results = []
    for name in args.models:
        for placement in args.placements:
            with tempfile.TemporaryDirectory() as folder:
                results.append(measure(name, placement, args, Path(folder)))
            args.output.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"machine": described, "results": results}, indent=1)
            args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
