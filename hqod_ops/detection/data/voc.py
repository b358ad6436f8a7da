"""The Pascal VOC layout: JPEGImages, an XML file for each in Annotations, lists in ImageSets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from hqod_ops.detection.data.coco_format import Annotation
from hqod_ops.detection.data.dataset import DataError, Transform
from hqod_ops.detection.data.files import (
    FileDataset,
    Record,
    Resize,
    check_box,
    image_size,
    one_line,
)

VOC_CLASSES = [
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
]
"""The 20 classes of Pascal VOC, in their usual order."""

_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")


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
    ) -> None:
        root = Path(root)
        names = _read_list(root / "ImageSets" / "Main" / f"{split}.txt")
        classes = _find_classes(root) if categories is None else list(categories)
        labels = {name: label for label, name in enumerate(classes)}
        records = [_read_record(root, name, i, labels) for i, name in enumerate(names)]
        super().__init__(classes, records, resize, transform)


def _read_list(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise DataError(f"{path}: the image list is missing") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)})") from error
    names = [line.split()[0] for line in lines if line.strip()]
    if not names:
        raise DataError(f"{path}: expected at least one image, got an empty list")
    return names


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
        for path in sorted((root / "Annotations").glob("*.xml"))
        for item in _parse(path).iter("object")
    } - {""}
    return list(VOC_CLASSES) if found <= set(VOC_CLASSES) else sorted(found)


def _read_record(root: Path, name: str, image_id: int, labels: dict[str, int]) -> Record:
    path = root / "Annotations" / f"{name}.xml"
    tree = _parse(path)
    images = [root / "JPEGImages" / (name + suffix) for suffix in _SUFFIXES]
    image = next((candidate for candidate in images if candidate.is_file()), None)
    if image is None:
        raise DataError(f"{images[0]}: the image file is missing")
    try:
        width, height = (int(tree.findtext(f"size/{side}") or 0) for side in ("width", "height"))
    except ValueError as error:
        raise DataError(f"{path}: size: expected whole numbers ({one_line(error)})") from None
    if width < 1 or height < 1:
        width, height = image_size(image)
    objects = [
        _read_object(f"{path}: object {number}", item, image_id, labels)
        for number, item in enumerate(tree.iter("object"), start=1)
    ]
    return Record(image, image_id, width, height, objects)


def _read_object(
    where: str, item: ElementTree.Element, image_id: int, labels: dict[str, int]
) -> Annotation:
    name = (item.findtext("name") or "").strip()
    if name not in labels:
        raise DataError(f"{where}: unknown category {name!r}")
    corners = [item.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
    x1, y1, x2, y2 = check_box([c for c in corners if c is not None], f"{where}: bndbox")
    if x2 < x1 or y2 < y1:
        raise DataError(f"{where}: bndbox: expected xmin <= xmax and ymin <= ymax, got {corners}")
    difficult = (item.findtext("difficult") or "0").strip()
    if difficult not in ("0", "1"):
        raise DataError(f"{where}: expected difficult 0 or 1, got {difficult!r}")
    return Annotation(image_id, labels[name], (x1 - 1, y1 - 1, x2, y2), int(difficult))


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
