"""One way to open every data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hqod_ops.detection.data.coco import CocoDataset, find_coco
from hqod_ops.detection.data.dataset import DataError, DetectionDataset, Transform
from hqod_ops.detection.data.digits import DigitScenes
from hqod_ops.detection.data.files import Resize
from hqod_ops.detection.data.voc import VocDataset, find_voc


def open_dataset(
    source: str | Path,
    split: str = "train",
    *,
    size: int | None = None,
    short_side: int | None = None,
    max_side: int | None = None,
    transform: Transform | None = None,
    **options: Any,
) -> DetectionDataset:
    """Open a data set by name, or by a folder whose layout is recognised.

    Args:
        source (str or Path): ``"digits"`` for :class:`DigitScenes`, else a folder in the layout of
            COCO (``annotations/instances_<split>.json`` and its kin) or Pascal VOC
            (``ImageSets/Main/<split>.txt``).
        split (str): such as ``"train"`` or ``"val"``, which files may call "valid" or "val2017".
            Default: ``"train"``
        size (int, optional): width and height of all images; files are stretched to it. Default:
            None, 96 for digits, the files' own
        short_side (int, optional): length of the shorter side of images from files, keeping their
            shape. Default: None
        max_side (int, optional): with short_side, limit of the longer side. Default: None
        transform (callable, optional): see :class:`DetectionDataset`.
        **options: further options of :class:`DigitScenes`, such as ``num_images``; for files
            ``categories``, the names of the classes by label, and ``orientation``, see
            :class:`~hqod_ops.detection.data.files.FileDataset`.

    Returns:
        DetectionDataset: the data set.

    Raises:
        DataError: the folder or its content cannot be used; one line names the file and its fault.
        ValueError: an option is out of its range.
        TypeError: an option does not belong to this data set.

    Example:
        >>> from hqod_ops.detection.data import open_dataset
        >>> open_dataset("digits", "val", num_images=2).categories[:3]
        ['0', '1', '2']
    """
    if source == "digits":
        if short_side is not None or max_side is not None:
            raise ValueError("short_side, max_side: expected None for digits, use size")
        if size is not None:
            options["size"] = size
        return DigitScenes(split, transform=transform, **options)
    root, resize = Path(source), Resize(size, short_side, max_side)
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "no such folder"
        raise DataError(f'{root}: {what}; expected "digits", or a data set of COCO or VOC layout')
    voc = find_voc(root)
    if voc is not None:
        return VocDataset(voc, split, resize, transform, **options)
    coco = find_coco(root, split)
    if coco is not None:
        return CocoDataset(*coco, resize, transform, **options)
    raise DataError(
        f"{root}: expected COCO's layout (annotations/*.json) or VOC's (Annotations, ImageSets)"
    )
