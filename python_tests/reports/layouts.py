"""Small data sets on disk, whose files a test writes as some tool does."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np

WIDTH, HEIGHT = 64, 48
BOX = [8.0, 6.0, 38.0, 30.0]
"""The one object of all of them: x1, y1, x2, y2."""

CONTENT: dict[str, list[dict[str, Any]]] = {
    "images": [{"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}],
    "categories": [{"id": 1, "name": "cat"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 6, 30, 24], "iscrowd": 0}
    ],
}


def edited(**changes: Any) -> dict[str, Any]:
    """The content of a COCO file; ``annotations__bbox=[1, 2, 3, 4]`` changes its one annotation."""
    content = copy.deepcopy(CONTENT)
    for key, value in changes.items():
        table, field = key.split("__")
        content[table][0][field] = value
    return content


def save(path: Path, width: int = WIDTH, height: int = HEIGHT, **options: Any) -> Path:
    """A picture whose halves differ: red on the left, dark below."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 255
    pixels[: height // 2, :, 1] = 255
    Image.fromarray(pixels).save(path, **options)
    return path


def coco(root: Path, content: Any, image: str = "val/a.png", file: str = "annotations/val.json",
         encoding: str = "utf-8") -> Path:  # fmt: skip
    """A data set of COCO's layout, with one image unless there is a file of its name already."""
    if not (root / image).exists():
        save(root / image)
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(json.dumps(content), encoding=encoding)
    return root


def xml(name: str = "cat", size: str = f"<width>{WIDTH}</width><height>{HEIGHT}</height>") -> str:
    """VOC's annotation of the one object: pixels count from 1, the last one included."""
    corners = "<xmin>9</xmin><ymin>7</ymin><xmax>38</xmax><ymax>30</ymax>"
    return (
        f"<annotation><size>{size}</size><object><name>{name}</name>"
        f"<bndbox>{corners}</bndbox></object></annotation>"
    )


def voc(root: Path, *names: str, listed: bytes | None = None, suffix: str = ".png",
        split: str = "val") -> Path:  # fmt: skip
    """A data set of VOC's layout; the list holds the names unless it is given."""
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name in names:
        save(root / "JPEGImages" / (name + suffix))
        (root / "Annotations" / f"{name}.xml").write_text(xml())
    lines = "\n".join(names).encode() if listed is None else listed
    (root / "ImageSets/Main" / f"{split}.txt").write_bytes(lines)
    return root
