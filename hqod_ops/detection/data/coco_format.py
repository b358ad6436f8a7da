"""COCO's annotation format, as pycocotools reads it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Annotation(NamedTuple):
    """One object of an image.

    Attributes:
        image_id (int): its image.
        label (int): index of its class.
        box (sequence): x1, y1, x2, y2 in pixels.
        iscrowd (int): 1 where detections inside it count neither for nor against.
        area (float, optional): by which evaluation calls it small, medium or large, in square
            pixels. Default: None, that of the box
    """

    image_id: int
    label: int
    box: Sequence[float]
    iscrowd: int = 0
    area: float | None = None


def coco_dict(
    categories: Sequence[str],
    images: Sequence[dict[str, Any]],
    annotations: Iterable[Annotation],
) -> dict[str, Any]:
    """Ground truth in COCO's format.

    Args:
        categories (sequence of str): names of the classes; their positions become the ids.
        images (sequence of dict): with ``"id"``, ``"file_name"``, ``"width"`` and ``"height"``.
        annotations (iterable of Annotation): the objects.

    Returns:
        dict: ``{"info", "images", "annotations", "categories"}``, ready for JSON. Annotation ids
        start at 1: COCOeval takes a match with annotation 0 for no match.

    Example:
        >>> from hqod_ops.detection.data.coco_format import Annotation, coco_dict
        >>> image = {"id": 7, "file_name": "7.png", "width": 10, "height": 10}
        >>> coco_dict(["cat"], [image], [Annotation(7, 0, (1, 2, 4, 8))])["annotations"][0]["bbox"]
        [1.0, 2.0, 3.0, 6.0]
    """
    entries = []
    for number, note in enumerate(annotations, start=1):
        x1, y1, x2, y2 = map(float, note.box)
        area = (x2 - x1) * (y2 - y1) if note.area is None else note.area
        entries.append(
            {
                "id": number,
                "image_id": note.image_id,
                "category_id": note.label,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": area,
                "iscrowd": note.iscrowd,
            }
        )
    return {
        "info": {},
        "images": list(images),
        "annotations": entries,
        "categories": [{"id": i, "name": name} for i, name in enumerate(categories)],
    }
