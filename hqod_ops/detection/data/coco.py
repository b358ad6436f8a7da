"""The COCO layout: one JSON file of annotations, and a folder of images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from hqod_ops.detection._extras import require
from hqod_ops.detection.data.coco_json import read_coco
from hqod_ops.detection.data.dataset import DetectionDataset, Transform
from hqod_ops.detection.data.files import FileDataset, Resize, no_split, split_names


class CocoDataset(FileDataset):
    """A data set in COCO's layout.

    Labels are the categories in ascending order of their ids. A category that only groups others
    (the root that Roboflow writes) is none of them.

    Args:
        annotation_file (str or Path): the JSON file, ``annotations/instances_val2017.json`` say.
        image_folder (str or Path): the folder that its file names are relative to.
        resize (Resize): the size images are brought to. Default: none
        transform (callable, optional): see :class:`DetectionDataset`.
        categories (sequence of str, optional): names of the classes, by label. Default: None, all
            in the file
        orientation (str): ``"auto"``, ``"exif"`` or ``"stored"``, see
            :class:`~hqod_ops.detection.data.files.FileDataset`. Default: ``"auto"``

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
        categories: Sequence[str] | None = None,
        orientation: str = "auto",
    ) -> None:
        classes, records = read_coco(
            Path(annotation_file), Path(image_folder), categories, orientation
        )
        super().__init__(classes, records, resize, transform, orientation)


def find_coco(root: Path, split: str) -> tuple[Path, Path] | None:
    """The annotation file and image folder of a split, where root has COCO's layout.

    Known are COCO's own names (``annotations/instances_val2017.json`` beside ``val2017/``), plain
    ones (``annotations/val.json`` beside ``val/``, ``images/val/`` or ``images/``), and a folder a
    split with ``_annotations.coco.json`` in it. "valid" and "validation" are names of "val".

    Raises:
        DataError: the layout is COCO's, but the split is not there.
    """
    inside = sorted(root.glob("*/_annotations.coco.json"))
    folder = root / "annotations"
    plain = sorted(folder.glob("[!.]*.json"))
    if not inside and not plain:
        return None
    names = split_names(split)
    for name in names:
        roboflow = root / name / "_annotations.coco.json"
        if roboflow in inside:
            return roboflow, roboflow.parent
        for file in (folder / f"instances_{name}.json", folder / f"{name}.json"):
            if file in plain:
                near = [
                    path
                    for word in (name, *names)
                    for path in (root / word, root / "images" / word)
                ]
                return file, next(
                    (path for path in (*near, root / "images") if path.is_dir()), root
                )
    there = [file.parent.name for file in inside] + [
        file.stem.removeprefix("instances_")
        for file in plain
        if not file.stem.startswith(("captions_", "person_keypoints_", "image_info_", "stuff_"))
    ]
    raise no_split(f"{root}: no annotations of split {split!r} in COCO's layout", split, there)


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
