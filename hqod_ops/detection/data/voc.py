"""The Pascal VOC layout: JPEGImages, an XML file for each in Annotations, lists in ImageSets."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from xml.etree import ElementTree

from hqod_ops.detection.data.dataset import DataError, Transform, logger
from hqod_ops.detection.data.files import (
    FileDataset,
    Records,
    Resize,
    check_box,
    check_names,
    no_split,
    split_names,
    whole,
)
from hqod_ops.detection.data.images import image_size, one_line

VOC_CLASSES = [
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
]
"""The 20 classes of Pascal VOC, in their usual order."""

_KINDS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_SUFFIXES = _KINDS + tuple(map(str.upper, _KINDS))

_FLAG = re.compile(r"\s+[-+]?[01]$")
"""Behind a name in the list of one class: 1 where the image shows it, -1 where not, 0 if hardly."""


class VocDataset(FileDataset):
    """A data set in Pascal VOC's layout.

    VOC counts pixels from 1 and includes the last one: (xmin, ymin, xmax, ymax) becomes
    (xmin - 1, ymin - 1, xmax, ymax). Objects marked difficult get ``iscrowd`` 1, so that, as in
    VOC, finding them counts neither for nor against a detector.

    Args:
        root (str or Path): the folder with JPEGImages, Annotations and ImageSets.
        split (str): name of a list in ``ImageSets/Main``, such as ``"val"``. Default: ``"train"``
        resize (Resize): the size images are brought to. Default: none
        transform (callable, optional): see :class:`DetectionDataset`.
        categories (sequence of str, optional): names of the classes, by label. Default: None, the
            20 classes of VOC if there are no others in Annotations, else those there, sorted
        orientation (str): ``"auto"``, ``"exif"`` or ``"stored"``, see
            :class:`~hqod_ops.detection.data.files.FileDataset`. Default: ``"auto"``

    Raises:
        DataError: a file is missing or broken; one line names it and its fault.

    Example:
        >>> from hqod_ops.detection.data import DataError, VocDataset
        >>> try:
        ...     VocDataset("missing", "val")
        ... except DataError as error:
        ...     print(error)
        missing/ImageSets/Main/val.txt: the image list is missing
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        resize: Resize = Resize(),  # noqa: B008 - it is immutable
        transform: Transform | None = None,
        categories: Sequence[str] | None = None,
        orientation: str = "auto",
    ) -> None:
        root = Path(root)
        file = _find_list(root / "ImageSets" / "Main", split)
        names = _read_list(file, root / "Annotations")
        classes = _find_classes(root) if categories is None else check_names(categories)
        labels = {name: label for label, name in enumerate(classes)}
        records = Records(file)
        for image_id, name in enumerate(names):
            _read_image(root, name, image_id, labels, records, orientation)
        super().__init__(classes, records, resize, transform, orientation)


def _find_list(folder: Path, split: str) -> Path:
    for name in split_names(split):
        path = folder / f"{name}.txt"
        if path.is_file():
            return path
    # Lists of one class (cat_train) come last.
    there = sorted((path.stem for path in folder.glob("[!.]*.txt")), key=lambda s: ("_" in s, s))
    raise no_split(f"{folder / split}.txt: the image list is missing", split, there)


def _read_list(path: Path, folder: Path) -> list[str]:
    """The names of a list's images: what stands on a line, or that without the flag of a class."""
    try:
        data = path.read_bytes()
        wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)})") from error
    lines = [line.strip() for line in re.split(r"[\r\n]+", text)]
    lines = [line for line in lines if line and not PurePath(line).name.startswith("._")]
    if not lines:
        raise DataError(f"{path}: expected at least one image, got an empty list")

    def find(line: str) -> str | None:
        """The name of the annotations that a line means, by their file's name."""
        last = line.replace("\\", "/").rpartition("/")[2]
        stem, dot, suffix = last.rpartition(".")
        names = [line, last, stem] if dot and f".{suffix.lower()}" in _SUFFIXES else [line, last]
        return next((name for name in names if _is_file(folder / f"{name}.xml")), None)

    # "frame 1" is a name of its own, unless other lines show that the list has flags.
    found = [find(line) for line in lines]
    if None in found:
        bare = [_FLAG.sub("", line) for line in lines]
        found = [find(b) or find(line) or b for b, line in zip(bare, lines, strict=True)]
    return list(dict.fromkeys(name for name in found if name is not None))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no name that a file could have
        return False


def _parse(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except FileNotFoundError:
        raise DataError(f"{path}: the annotation file is missing") from None
    # Expat raises LookupError or ValueError for an encoding that it does not know.
    except (OSError, ElementTree.ParseError, LookupError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as XML ({one_line(error)})") from error


def _find_classes(root: Path) -> list[str]:
    """The classes of all images, so that every split has the same labels."""
    found = {
        (item.findtext("name") or "").strip()
        for path in sorted((root / "Annotations").glob("[!.]*.xml"))
        for item in _parse(path).iter("object")
    } - {""}
    if not found <= set(VOC_CLASSES):
        return sorted(found)
    if 0 < len(found) < len(VOC_CLASSES):
        logger.warning(
            "%s: %d of the 20 classes of Pascal VOC occur (%s), all 20 are taken: categories names "
            "others (setting data.categories)",
            root,
            len(found),
            ", ".join(sorted(found)),
        )
    return list(VOC_CLASSES)


def _read_image(
    root: Path,
    name: str,
    image_id: int,
    labels: dict[str, int],
    records: Records,
    orientation: str,
) -> None:
    path = root / "Annotations" / f"{name}.xml"
    tree = _parse(path)
    images = [root / "JPEGImages" / (name + suffix) for suffix in _SUFFIXES]
    image = next((str(candidate) for candidate in images if candidate.is_file()), None)
    if image is None:
        raise DataError(f"{images[0]}: the image file is missing")
    sides = [tree.findtext(f"size/{side}") for side in ("width", "height")]
    width, height = (whole((side or "").strip() or 0) for side in sides)
    if width is None or height is None:
        raise DataError(f"{path}: size: expected whole numbers, got {sides}")
    if width < 1 or height < 1:
        width, height = image_size(image, orientation)
    records.add_image(image, image_id, width, height)
    for number, item in enumerate(tree.iter("object"), start=1):
        _read_object(f"{path}: object {number}", item, image_id, labels, records)


def _read_object(
    where: str,
    item: ElementTree.Element,
    image: int,
    labels: dict[str, int],
    records: Records,
) -> None:
    name = (item.findtext("name") or "").strip()
    if name not in labels:
        raise DataError(f"{where}: unknown category {name!r}")
    corners = [item.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
    x1, y1, x2, y2 = check_box([c for c in corners if c is not None], f"{where}: bndbox")
    if x2 < x1 or y2 < y1:
        raise DataError(f"{where}: bndbox: expected xmin <= xmax and ymin <= ymax, got {corners}")
    difficult = (item.findtext("difficult") or "").strip() or "0"
    if difficult not in ("0", "1"):
        raise DataError(f"{where}: expected difficult 0 or 1, got {difficult!r}")
    x1, y1 = x1 - 1, y1 - 1
    area = (x2 - x1) * (y2 - y1)
    records.add_object(image, labels[name], (x1, y1, x2, y2), int(difficult), area)


def find_voc(root: Path) -> Path | None:
    """The folder with VOC's layout: root itself, or the only one in it (``VOCdevkit/VOC2007``).

    Raises:
        DataError: there are several.
    """
    folders = [root, *sorted(root.glob("VOC*")), *sorted(root.glob("VOCdevkit/VOC*"))]
    found = [path for path in folders if (path / "ImageSets").is_dir()]
    if len(found) > 1:
        listed = ", ".join(str(path) for path in found)
        raise DataError(f"{root}: several folders in Pascal VOC's layout, name one of {listed}")
    return found[0] if found else None
