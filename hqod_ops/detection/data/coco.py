"""The COCO layout: one JSON file of annotations, and a folder of images."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hqod_ops.detection._extras import require
from hqod_ops.detection.data.coco_format import Annotation
from hqod_ops.detection.data.dataset import DataError, DetectionDataset, Transform
from hqod_ops.detection.data.files import FileDataset, Record, Resize, check_box, one_line


class CocoDataset(FileDataset):
    """A data set in COCO's layout.

    Labels are the categories in ascending order of their ids.

    Args:
        annotation_file (str or Path): the JSON file, ``annotations/instances_val2017.json`` say.
        image_folder (str or Path): the folder that its file names are relative to.
        resize (Resize): the size images are brought to. Default: none
        transform (callable, optional): see :class:`DetectionDataset`.

    Raises:
        DataError: a file is missing or broken; one line names it and its fault.

    Example:
        >>> from hqod_ops.detection.data import CocoDataset, DataError
        >>> try:
        ...     CocoDataset("missing.json", "images")
        ... except DataError as error:
        ...     print(error)
        missing.json: the annotation file is missing
    """

    def __init__(
        self,
        annotation_file: str | Path,
        image_folder: str | Path,
        resize: Resize = Resize(),  # noqa: B008 - it is immutable
        transform: Transform | None = None,
    ) -> None:
        path = Path(annotation_file)
        content = _read_json(path)
        names = _index(path, content, "categories")
        labels = {key: label for label, key in enumerate(names)}
        records = _records(path, Path(image_folder), _index(path, content, "images"))
        for position, note in enumerate(_entries(path, content, "annotations")):
            _add_object(f"{path}: annotation {note.get('id', position)}", note, records, labels)
        categories = [str(entry.get("name", key)) for key, entry in names.items()]
        super().__init__(categories, list(records.values()), resize, transform)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: the annotation file is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, got a {type(content).__name__}")
    return content


def _entries(path: Path, content: dict[str, Any], key: str) -> list[dict[str, Any]]:
    entries = content.get(key)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{path}: expected a list of objects under {key!r}")
    return entries


def _index(path: Path, content: dict[str, Any], key: str) -> dict[int, dict[str, Any]]:
    """The entries by their ids, in ascending order."""
    entries = _entries(path, content, key)
    if not entries:
        raise DataError(f"{path}: expected at least one entry under {key!r}, got none")
    by_id: dict[int, dict[str, Any]] = {}
    for position, entry in enumerate(entries):
        number = entry.get("id")
        if not isinstance(number, int):
            raise DataError(
                f"{path}: {key}[{position}]: expected a whole number as id, got {number!r}"
            )
        if number in by_id:
            raise DataError(f"{path}: {key}[{position}]: id {number} is there twice")
        by_id[number] = entry
    return dict(sorted(by_id.items()))


def _records(path: Path, folder: Path, images: dict[int, dict[str, Any]]) -> dict[int, Record]:
    records = {}
    for number, entry in images.items():
        name, width, height = entry.get("file_name"), entry.get("width"), entry.get("height")
        if not isinstance(name, str) or not name:
            raise DataError(f"{path}: image {number}: expected a file_name, got {name!r}")
        for key, value in (("width", width), ("height", height)):
            if not isinstance(value, int) or value < 1:
                raise DataError(
                    f"{path}: image {number}: expected a {key} in pixels, got {value!r}"
                )
        records[number] = Record(folder / name, number, int(width or 0), int(height or 0), [])
    return records


def _add_object(
    where: str, note: dict[str, Any], records: dict[int, Record], labels: dict[int, int]
) -> None:
    image_id, category_id = note.get("image_id"), note.get("category_id")
    record = records.get(image_id) if isinstance(image_id, int) else None
    if record is None:
        raise DataError(f"{where}: unknown image_id {image_id!r}")
    if not isinstance(category_id, int) or category_id not in labels:
        raise DataError(f"{where}: unknown category_id {category_id!r}")
    x, y, width, height = check_box(note.get("bbox"), f"{where}: bbox")
    if width < 0 or height < 0:
        raise DataError(
            f"{where}: bbox: expected a width and height of at least 0, got {note['bbox']}"
        )
    crowd = note.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise DataError(f"{where}: expected iscrowd 0 or 1, got {crowd!r}")
    area = note.get("area", width * height)
    if not isinstance(area, int | float) or not 0 <= area <= sys.float_info.max:
        raise DataError(f"{where}: expected an area of at least 0, got {area!r}")
    box = (x, y, x + width, y + height)
    record.objects.append(Annotation(record.image_id, labels[category_id], box, int(crowd), area))


def find_coco(root: Path, split: str) -> tuple[Path, Path] | None:
    """The annotation file and image folder of a split, where root has COCO's layout.

    Known are COCO's own names (``annotations/instances_val2017.json`` beside ``val2017/``), plain
    ones (``annotations/val.json`` beside ``val/``, ``images/val/`` or ``images/``), and a folder a
    split with ``_annotations.coco.json`` in it.

    Raises:
        DataError: the layout is COCO's, but the split is not there.
    """
    inside = root / split / "_annotations.coco.json"
    if inside.is_file():
        return inside, inside.parent
    folder = root / "annotations"
    found = sorted(folder.glob("*.json")) + sorted(root.glob("*/_annotations.coco.json"))
    if not found:
        return None
    for name in (split, f"{split}2017", f"{split}2014"):
        for file in (folder / f"instances_{name}.json", folder / f"{name}.json"):
            if file.is_file():
                images = (root / name, root / "images" / name, root / "images")
                return file, next((path for path in images if path.is_dir()), root)
    listed = ", ".join(str(path.relative_to(root)) for path in found[:8])
    raise DataError(
        f"{root}: no annotations of split {split!r} in COCO's layout; there are {listed}"
    )


def write_coco(dataset: DetectionDataset, root: str | Path, split: str) -> None:
    """Write a data set in COCO's layout, with PNG images.

    The images are those of :meth:`DetectionDataset.load`, without the transform.

    Args:
        dataset (DetectionDataset): one whose images keep their original size.
        root (str or Path): the folder; ``annotations/instances_<split>.json`` and ``<split>/`` are
            made in it.
        split (str): the name of the split.

    Raises:
        ValueError: the data set resizes its images.

    Example:
        >>> import tempfile
        >>> from hqod_ops.detection.data import DigitScenes, open_dataset, write_coco
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_coco(DigitScenes("val", num_images=2), folder, "val")
        ...     len(open_dataset(folder, "val"))
        2
    """
    image_module = require("PIL.Image", "Pillow")
    root = Path(root)
    content = dataset.coco_ground_truth
    (root / split).mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    for index, entry in enumerate(content["images"]):
        image, target = dataset.load(index)
        if target["scale"].tolist() != [1.0, 1.0]:
            raise ValueError("dataset: expected images of their original size, got resized ones")
        entry["file_name"] = f"{index:06d}.png"
        pixels = (image * 255.0).round().byte().permute(1, 2, 0).numpy()
        image_module.fromarray(pixels).save(root / split / entry["file_name"])
    file = root / "annotations" / f"instances_{split}.json"
    file.write_text(json.dumps(content), encoding="utf-8")
