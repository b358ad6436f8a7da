"""Annotation files in COCO's format, as tools write them, into records."""

from __future__ import annotations

import gc
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from hqod_ops.detection._extras import require
from hqod_ops.detection.data.dataset import DataError, logger
from hqod_ops.detection.data.files import Records, check_box, check_names, whole
from hqod_ops.detection.data.images import image_size, one_line

Entry = dict[str, Any]


def read_coco(
    path: Path, folder: Path, categories: Sequence[str] | None, orientation: str
) -> tuple[list[str], Records]:
    """The names of the classes, and the images in ascending order of their ids.

    Whatever has one plain meaning is read: ids as integral floats or as text, null for a missing
    field, a byte order mark, backslashes and the images' folder in file names, boxes by their
    segmentation alone.

    Raises:
        DataError: a file is missing or broken; one line names it and its fault.
    """
    content = _read_json(path)
    records = Records(path)
    entries = _index(path, content, "images", records.lenient)
    for number, entry in entries.items():
        _add_image(path, folder, number, entry, records, orientation)
    names = {
        number: str(number if entry.get("name") is None else entry["name"])
        for number, entry in _index(path, content, "categories", records.lenient).items()
    }
    notes = _entries(path, content, "annotations")
    if categories is None:
        for number in _roots(path, content, names, notes):
            logger.warning(
                "%s: category %r only groups others and has no objects: left out",
                path,
                names.pop(number),
            )
        classes, labels = list(names.values()), {key: i for i, key in enumerate(names)}
        _warn_of_namesakes(path, classes)
    else:
        classes = check_names(categories)
        labels = {key: classes.index(name) for key, name in names.items() if name in classes}
    places = {number: place for place, number in enumerate(entries)}
    for position, note in enumerate(notes):
        try:
            _add_object(note, places, names, labels, records)
        except DataError as error:
            where = f"{path}: annotation {note.get('id', position)}"
            raise DataError(f"{where}: {error}") from error.__cause__
    return classes, records


def _read_json(path: Path) -> Entry:
    collects = gc.isenabled()
    gc.disable()  # a third of the time would go into looking for cycles where there are none
    try:
        with path.open("rb") as file:
            encoding = json.detect_encoding(file.read(4))  # also by a byte order mark
        text = path.read_text(encoding, "surrogatepass")
        content = json.loads(text, object_hook=_without_needless)
    except FileNotFoundError:
        raise DataError(f"{path}: the annotation file is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({one_line(error)})") from error
    finally:
        if collects:
            gc.enable()
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, got a {type(content).__name__}")
    return content


def _without_needless(entry: Entry) -> Entry:
    """Outlines are most of a file, and their boxes stand beside them."""
    if entry.get("bbox"):
        entry.pop("segmentation", None)
    return entry


def _entries(path: Path, content: Entry, key: str) -> list[Entry]:
    entries = content.get(key)
    if entries is None and key == "annotations":  # a file of images alone
        return []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{path}: expected a list of objects under {key!r}")
    return entries


def _index(path: Path, content: Entry, key: str, lenient: Counter[str]) -> dict[int, Entry]:
    """The entries by their ids, in ascending order."""
    entries = _entries(path, content, key)
    if not entries:
        raise DataError(f"{path}: expected at least one entry under {key!r}, got none")
    by_id: dict[int, Entry] = {}
    for position, entry in enumerate(entries):
        number = _id(entry.get("id"), lenient)
        if number is None:
            raise DataError(
                f"{path}: {key}[{position}]: expected a whole number as id, got {entry.get('id')!r}"
            )
        if number in by_id:
            raise DataError(f"{path}: {key}[{position}]: id {number} is there twice")
        by_id[number] = entry
    return dict(sorted(by_id.items()))


def _id(value: Any, lenient: Counter[str]) -> int | None:
    if type(value) is int and 0 <= value < 2**63:  # nearly all are
        return value
    number = whole(value)
    if number is not None and type(value) is not int:
        lenient["ids written as text or as floats"] += 1
    return number


def _add_image(
    path: Path, folder: Path, number: int, entry: Entry, records: Records, orientation: str
) -> None:
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        raise DataError(f"{path}: image {number}: expected a file_name, got {name!r}")
    file = os.path.join(folder, name)
    there = os.path.isfile(file)
    if not there:
        for found in _elsewhere(folder, name):
            if os.path.isfile(found):
                file, there = found, True
                records.lenient["file names with backslashes or with the images' folder"] += 1
                break
    sides = _given(entry.get("width"), None), _given(entry.get("height"), None)
    if None in sides and there:
        records.add_image(file, number, *image_size(file, orientation))
        records.lenient["images without width and height"] += 1
        return
    width, height = map(whole, sides)
    for key, side, given in zip(("width", "height"), (width, height), sides, strict=True):
        if given is not None and (side is None or side < 1):
            raise DataError(f"{path}: image {number}: expected a {key} in pixels, got {given!r}")
    records.add_image(file, number, width or 1, height or 1)


def _elsewhere(folder: Path, name: str) -> Iterator[str]:
    """Where an image may be that is not at its name in the folder."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    yield os.path.join(folder, *parts)
    if folder.name in parts[:-1]:
        after = len(parts) - parts[::-1].index(folder.name)
        yield os.path.join(folder, *parts[after:])
    yield os.path.join(folder.parent, *parts)


def _roots(path: Path, content: Entry, names: dict[int, str], notes: Sequence[Entry]) -> list[int]:
    """Categories that others name as their supercategory, and that no annotation names.

    The annotations of the other splits count too: all must have the same classes.
    """
    parents = {whole(entry["id"]): entry.get("supercategory") for entry in content["categories"]}
    groups = Counter(parent for parent in parents.values() if isinstance(parent, str))
    used = {whole(note.get("category_id")) for note in notes}
    roots = [
        number
        for number, name in names.items()
        if groups[name] > (parents[number] == name) and number not in used
    ]
    if not roots or len(roots) == len(names):
        return []
    for other in (*path.parent.glob("[!.]*.json"), *path.parent.parent.glob(f"*/{path.name}")):
        if other != path:
            try:
                more = _entries(other, _read_json(other), "annotations")
            except DataError:  # it will be told of when it is opened
                continue
            used |= {whole(note.get("category_id")) for note in more}
    return [number for number in roots if number not in used]


def _warn_of_namesakes(path: Path, classes: Sequence[str]) -> None:
    twice = [name for name, count in Counter(classes).items() if count > 1]
    if twice:
        logger.warning(
            "%s: several categories are named %s: they stay different classes",
            path,
            ", ".join(map(repr, twice)),
        )


def _add_object(
    note: Entry,
    places: dict[int, int],
    names: dict[int, str],
    labels: dict[int, int],
    records: Records,
) -> None:
    image_id = _id(note.get("image_id"), records.lenient)
    category_id = _id(note.get("category_id"), records.lenient)
    if image_id is None or image_id not in places:
        raise DataError(f"unknown image_id {note.get('image_id')!r}")
    if category_id is None or category_id not in names:
        raise DataError(f"unknown category_id {note.get('category_id')!r}")
    if category_id not in labels:
        raise DataError(f"category {names[category_id]!r} is none of those asked for")
    place = places[image_id]
    box = note.get("bbox")
    if not box:
        box = _outline_box(note.get("segmentation"), records, place) or box
    x, y, width, height = check_box(box, "bbox")
    if width < 0 or height < 0:
        raise DataError(f"bbox: expected a width and height of at least 0, got {box}")
    crowd = _given(note.get("iscrowd"), 0)
    number = int(crowd) if isinstance(crowd, bool) else whole(crowd)
    if number not in (0, 1):
        raise DataError(f"expected iscrowd 0 or 1, got {crowd!r}")
    area = _given(note.get("area"), width * height)
    try:
        size = float(area)
    except (OverflowError, TypeError, ValueError):
        size = math.nan
    if not 0 <= size <= sys.float_info.max:
        raise DataError(f"expected an area of at least 0, got {area!r}")
    records.add_object(place, labels[category_id], (x, y, x + width, y + height), number, size)


def _given(value: Any, default: Any) -> Any:
    """The value of a field; the default where a tool wrote null or, for it, NaN."""
    return default if value is None or value != value else value


def _outline_box(outline: Any, records: Records, place: int) -> Any:
    """x, y, width and height around a polygon or a run-length mask; None where there is neither."""
    if not outline:
        return None
    records.lenient["boxes made from segmentations"] += 1
    width, height = records.sizes[2 * place : 2 * place + 2]
    try:
        if isinstance(outline, list):
            points = [float(value) for ring in outline for value in ring]
            left, top = min(points[0::2]), min(points[1::2])
            return [left, top, max(points[0::2]) - left, max(points[1::2]) - top]
        masks = require("pycocotools.mask", "pycocotools")
        # pycocotools takes the sizes of a mask on trust, and its C code the rest.
        if list(outline["size"]) != [height, width]:
            raise ValueError
        packed = {"size": [height, width], "counts": outline["counts"]}
        if isinstance(outline["counts"], list):
            packed = masks.frPyObjects(packed, height, width)
        return masks.toBbox(packed).tolist()
    except (KeyError, OverflowError, TypeError, ValueError):
        raise DataError("expected a bbox, or a segmentation of polygons or a mask") from None
