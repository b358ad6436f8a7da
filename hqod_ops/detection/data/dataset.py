"""What every detection data set looks like, and how a batch of it is put together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils.data import Dataset

from hqod_ops.detection._extras import require

logger = logging.getLogger(__package__)
"""What a data set has to say once, as it is opened."""

Target: TypeAlias = dict[str, Any]
Transform: TypeAlias = Callable[[Tensor, Target], tuple[Tensor, Target]]


class DataError(ValueError):
    """The data on disk cannot be used; the message is one line naming the file and the fault."""

    def __init__(self, message: str) -> None:
        # A DataLoader raises what its worker met again, with the worker's stack before the message.
        if message.startswith("Caught DataError in DataLoader worker"):
            message = message.rstrip().rpartition(f"{__name__}.DataError: ")[2]
        # Names in files may hold half characters, which no terminal takes.
        message = message.encode("utf-8", "backslashreplace").decode("utf-8")
        super().__init__(" ".join(message.splitlines()))


class DetectionDataset(Dataset[tuple[Tensor, Target]]):
    """Base of the data sets: images with boxes, and their ground truth in COCO format.

    ``dataset[i]`` is ``(image, target)``. The image is a float32 ``Tensor[3, H, W]`` in [0, 1]. The
    target is a dict of

    - ``"boxes"`` (float32 ``Tensor[M, 4]``): x1, y1, x2, y2 in pixels of the image as returned,
    - ``"labels"`` (int64 ``Tensor[M]``): indices into :attr:`categories`,
    - ``"iscrowd"`` (int64 ``Tensor[M]``): 1 for crowds and objects too difficult to count,
    - ``"image_id"`` (int): the key of the image in :attr:`coco_ground_truth`,
    - ``"scale"`` (float32 ``Tensor[2]``): size of the returned image over that of the original, x
      and y.

    Attributes:
        categories (list[str]): the names of the classes, by label.
        flip_safe (bool): whether a mirrored image shows an object of the same class.
        transform (callable, optional): ``(image, target) -> (image, target)``, such as
            :class:`RandomHorizontalFlip`.

    A subclass sets ``categories`` and defines ``__len__``, ``coco_ground_truth`` and ``load``.
    """

    categories: list[str]
    flip_safe: bool = True

    def __init__(self, transform: Transform | None = None) -> None:
        if transform is not None and not self.flip_safe and getattr(transform, "flips", False):
            raise ValueError(
                f"transform: expected one that does not mirror {type(self).__name__}, whose "
                f"classes are not symmetric, got {type(transform).__name__}"
            )
        self.transform = transform

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def coco_ground_truth(self) -> dict[str, Any]:
        """The annotations in COCO's format, in pixels of the original images.

        The category ids are the labels (0-based), and annotation ids start at 1, as COCOeval needs.
        """
        raise NotImplementedError

    def load(self, index: int) -> tuple[Tensor, Target]:
        """One image with its target, before :attr:`transform`."""
        raise NotImplementedError

    def require_boxes(self) -> None:
        """Refuse images without a box that a detector can learn from.

        Raises:
            DataError: there is none.
        """

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected one of {len(self)} images, got {index}")
        image, target = self.load(index % len(self))
        return (image, target) if self.transform is None else self.transform(image, target)


class RandomHorizontalFlip:
    """Mirror an image and its boxes with a probability: torchvision's transform of this name.

    Args:
        p (float): the probability. Default: 0.5

    Example:
        >>> import torch
        >>> from hqod_ops.detection.data import RandomHorizontalFlip
        >>> target = {"boxes": torch.tensor([[0., 0., 2., 4.]])}
        >>> _, flipped = RandomHorizontalFlip(p=1.0)(torch.zeros(3, 8, 8), target)
        >>> flipped["boxes"]
        tensor([[6., 0., 8., 4.]])
    """

    flips = True

    def __init__(self, p: float = 0.5) -> None:
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p: expected a probability in [0, 1], got {p}")
        self.p = p
        self._flip = require("torchvision.transforms.v2", "torchvision").RandomHorizontalFlip(p)

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        tv_tensors = require("torchvision.tv_tensors", "torchvision")
        boxes = tv_tensors.BoundingBoxes(
            target["boxes"], format="XYXY", canvas_size=image.shape[-2:]
        )
        image, boxes = self._flip(tv_tensors.Image(image), boxes)
        return image.as_subclass(Tensor), {**target, "boxes": boxes.as_subclass(Tensor)}


def collate(batch: Sequence[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """A batch as a list of images and a list of targets, for ``DataLoader(collate_fn=collate)``.

    Images may differ in size, as torchvision's detectors accept them.

    Args:
        batch (sequence): items of a :class:`DetectionDataset`.

    Returns:
        list[Tensor[3, H, W]], list[dict]: images and targets, in the order of the batch.

    Example:
        >>> import torch
        >>> from hqod_ops.detection.data import collate
        >>> images, targets = collate([(torch.zeros(3, 8, 8), {"image_id": 1})])
        >>> len(images), targets
        (1, [{'image_id': 1}])
    """
    return [image for image, _ in batch], [target for _, target in batch]
