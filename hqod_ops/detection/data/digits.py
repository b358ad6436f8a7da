"""Scenes of handwritten digits, made from scikit-learn's samples: real handwriting, no download."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hqod_ops.detection._extras import require
from hqod_ops.detection.data import drawing as draw
from hqod_ops.detection.data.coco_format import Annotation, coco_dict
from hqod_ops.detection.data.dataset import DetectionDataset, Target, Transform

SAMPLE_RANGES = {"train": (0, 1197), "val": (1197, 1497), "test": (1497, 1797)}
"""Which of the 1,797 handwritten samples each split draws from."""

MIN_VISIBLE = 0.5
"""The least share of a digit's ink that stays visible."""

_GRID_CELLS = 4
_ATTEMPTS = 12


@dataclass(frozen=True)
class Scene:
    """A drawn scene.

    Attributes:
        image (uint8[3, size, size]): the picture.
        boxes (float32[M, 4]): x1, y1, x2, y2 around the visible ink, in pixels.
        labels (int64[M]): the digits.
        samples (int64[M]): the handwritten samples they were drawn from.
        visible (float64[M]): share of each digit's ink that nothing covers.
        owner (int8[size, size]): which digit's ink is seen at a pixel, -1 for none.
    """

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    samples: NDArray[np.int64]
    visible: NDArray[np.float64]
    owner: NDArray[np.int8]


@lru_cache(maxsize=1)
def _handwriting() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All samples [1797, 8, 8], grey values 0 to 16, and their digits [1797]."""
    bunch = require("sklearn.datasets", "scikit-learn").load_digits()
    return bunch.images.astype(np.int64), bunch.target.astype(np.int64)


class DigitScenes(DetectionDataset):
    """Images with handwritten digits of several sizes among clutter, the same on every machine.

    Scene i of a split depends on ``(seed, split, i)`` and the options alone: it is drawn with
    integers and exactly rounded operations from a generator whose stream is frozen
    (``numpy.random.RandomState``). The splits use different handwritten samples. Boxes are tight
    around the visible ink, and at least half of each digit's ink is visible.

    Args:
        split (str): ``"train"``, ``"val"`` or ``"test"``. Default: ``"train"``
        num_images (int): number of scenes. Default: 2000
        size (int): width and height in pixels; digits are size/5 to size*11/24 high. Default: 96
        max_objects (int): at most so many digits a scene, at least one. Default: 5
        noise (float): standard deviation of the pixel noise, in grey levels of 255. Default: 8.0
        clutter (float): mean number of strokes, blobs and pieces of digits a scene; 0 gives a plain
            background. Default: 4.0
        overlap (float): largest share of a digit's ink that others may cover, at most 0.5. Default:
            0.25
        contrast (int): least difference in grey level between ink and background. Default: 64
        seed (int): chooses other scenes of the same kind. Default: 0
        cache (bool): draw all scenes at once and keep them as uint8 (size * size * 3 bytes each)
            instead of drawing at each access. Default: True
        transform (callable, optional): see :class:`DetectionDataset`; it may not mirror.

    Raises:
        ValueError: an option is out of its range, or transform mirrors images.
        ImportError: scikit-learn is missing.

    Source: the handwriting is the test part of the UCI "Optical Recognition of Handwritten Digits"
    data (E. Alpaydin and C. Kaynak, 1998, https://doi.org/10.24432/C50P49), as scikit-learn has it.

    Example:
        >>> from hqod_ops.detection.data import DigitScenes
        >>> image, target = DigitScenes("val", num_images=1)[0]
        >>> image.shape, target["boxes"].shape[-1]
        (torch.Size([3, 96, 96]), 4)
    """

    flip_safe = False

    def __init__(
        self,
        split: str = "train",
        *,
        num_images: int = 2000,
        size: int = 96,
        max_objects: int = 5,
        noise: float = 8.0,
        clutter: float = 4.0,
        overlap: float = 0.25,
        contrast: int = 64,
        seed: int = 0,
        cache: bool = True,
        transform: Transform | None = None,
    ) -> None:
        super().__init__(transform)
        if split not in SAMPLE_RANGES:
            options = ", ".join(repr(name) for name in SAMPLE_RANGES)
            raise ValueError(f"split: expected one of {options}, got {split!r}")
        for name, value, low, high in (
            ("num_images", num_images, 1, 2**31 - 1),
            ("size", size, 64, 1024),
            ("max_objects", max_objects, 1, 100),
            ("noise", noise, 0, 64),
            ("clutter", clutter, 0, 100),
            ("overlap", overlap, 0, 1 - MIN_VISIBLE),
            ("contrast", contrast, 0, 100),
            ("seed", seed, 0, 2**32 - 1),
        ):
            if not low <= value <= high:
                raise ValueError(f"{name}: expected a value in [{low}, {high}], got {value}")
        self.categories = [str(digit) for digit in range(10)]
        self.split, self.num_images, self.size, self.seed = split, num_images, size, seed
        self.max_objects, self.noise, self.clutter = max_objects, noise, clutter
        self.overlap, self.contrast = overlap, contrast
        self._grid = draw.ramp_weights(_GRID_CELLS, size)
        self._scenes = [self._draw(i) for i in range(num_images)] if cache else None

    def __len__(self) -> int:
        return self.num_images

    def scene(self, index: int) -> Scene:
        """The scene behind ``dataset[index]``, with what is known about its digits."""
        return self._draw(index) if self._scenes is None else self._scenes[index]

    def load(self, index: int) -> tuple[Tensor, Target]:
        scene = self.scene(index)
        target = {
            "boxes": torch.from_numpy(scene.boxes.copy()),
            "labels": torch.from_numpy(scene.labels.copy()),
            "iscrowd": torch.zeros(len(scene.labels), dtype=torch.int64),
            "image_id": index,
            "scale": torch.ones(2),
        }
        return torch.from_numpy(scene.image).float().div_(255.0), target

    @property
    def coco_ground_truth(self) -> dict[str, Any]:
        scenes = [self.scene(i) for i in range(len(self))]
        return coco_dict(
            self.categories,
            [
                {"id": i, "file_name": f"{i:06d}.png", "width": self.size, "height": self.size}
                for i in range(len(self))
            ],
            [
                Annotation(i, int(label), box.tolist())
                for i, scene in enumerate(scenes)
                for box, label in zip(scene.boxes, scene.labels, strict=True)
            ],
        )

    def _draw(self, index: int) -> Scene:
        split = list(SAMPLE_RANGES).index(self.split)
        return _Painter(self, np.random.RandomState([self.seed, split, index]), self._grid).scene()


class _Painter:
    """Draws one scene: background, clutter, digits, a few strokes across them, noise."""

    def __init__(
        self, spec: DigitScenes, rng: np.random.RandomState, grid: NDArray[np.int64]
    ) -> None:
        self.spec, self.rng, self.grid = spec, rng, grid
        self.images, self.digits = _handwriting()
        self.canvas = np.zeros((3, spec.size, spec.size), dtype=np.int32)
        self.owner = np.full((spec.size, spec.size), -1, dtype=np.int8)
        self.samples: list[int] = []
        self.ink: list[int] = []

    def scene(self) -> Scene:
        clutter = self._count(self.spec.clutter)
        across = clutter // 4
        self._background()
        for _ in range(clutter - across):
            self._distract()
        for _ in range(self.rng.randint(1, self.spec.max_objects + 1)):
            self._place_digit()
        for _ in range(across):
            self._cross()
        self._add_noise()
        samples = np.array(self.samples, dtype=np.int64)
        seen = [self.owner == k for k in range(len(samples))]
        return Scene(
            image=self.canvas.astype(np.uint8),
            boxes=np.array([draw.extent(mask) for mask in seen], dtype=np.float32).reshape(-1, 4),
            labels=self.digits[samples],
            samples=samples,
            visible=np.array([int(m.sum()) / n for m, n in zip(seen, self.ink, strict=True)]),
            owner=self.owner,
        )

    def _uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.rng.random_sample())

    def _count(self, mean: float) -> int:
        """A whole number between 0.5 and 1.5 times the mean."""
        return int(self._uniform(0.5 * mean, 1.5 * mean) + 0.5)

    def _color(self, gray: int, spread: int) -> NDArray[np.int32]:
        tint = self.rng.randint(-spread, spread + 1, size=3)
        return np.asarray((gray + tint).clip(0, 255), dtype=np.int32)

    def _background(self) -> None:
        self.canvas += self._color(int(self.rng.randint(30, 226)), 25)[:, None, None]
        if self.spec.clutter > 0:
            heights = self.rng.randint(-40, 41, size=(_GRID_CELLS + 1, _GRID_CELLS + 1))
            shade = (self.grid @ heights @ self.grid.T) >> 16
            self.canvas += shade.astype(np.int32)
            self.canvas.clip(0, 255, out=self.canvas)

    def _random_sample(self) -> int:
        return int(self.rng.randint(*SAMPLE_RANGES[self.spec.split]))

    def _glyph(self, sample: int) -> draw.Mask:
        size = self._uniform(self.spec.size / 5, self.spec.size * 11 / 24)
        rotation = draw.Rotation(self._uniform(-0.15, 0.15))  # 17 degrees each way
        aspect, weight = self._uniform(0.75, 1.25), self._uniform(0.1, 0.6)
        return draw.handwriting(self.images[sample], size, rotation, aspect, weight)

    def _stroke(self, widest: float) -> tuple[draw.Mask, int, int]:
        size, reach = self.spec.size, self.spec.size * 0.3
        x, y = self._uniform(0, size), self._uniform(0, size)
        points = [(x, y)]
        for _ in range(self.rng.randint(1, 4)):
            x = min(max(x + self._uniform(-reach, reach), 0.0), size - 1.0)
            y = min(max(y + self._uniform(-reach, reach), 0.0), size - 1.0)
            points.append((x, y))
        return draw.stroke(points, self._uniform(0.5, widest), size)

    def _distract(self) -> None:
        """A stroke, a blob, or a piece of a digit behind everything that counts."""
        size, kind = self.spec.size, self.rng.randint(4)
        if kind == 0:
            radii = self._uniform(0.03, 0.2) * size, self._uniform(0.03, 0.2) * size
            center = self._uniform(0, size), self._uniform(0, size)
            turn = draw.Rotation(self._uniform(-1, 1))
            mask, left, top = draw.blob(center, radii, turn, self._uniform(0.1, 0.8), size)
        elif kind < 3:
            mask, left, top = self._stroke(size / 40)
        else:
            mask = self._piece(self._glyph(self._random_sample()))
            left = int(self.rng.randint(0, size - mask.shape[1] + 1))
            top = int(self.rng.randint(0, size - mask.shape[0] + 1))
        color = self._color(int(self.rng.randint(0, 256)), 30)
        draw.paint(self.canvas, mask, left, top, color, int(self.rng.randint(100, 256)))

    def _piece(self, mask: draw.Mask) -> draw.Mask:
        """About half of a digit, cut off straight."""
        height, width = mask.shape
        part = self._uniform(0.4, 0.6)
        rows, columns = int(height * part) + 1, int(width * part) + 1
        side = self.rng.randint(4)
        return (mask[:rows], mask[-rows:], mask[:, :columns], mask[:, -columns:])[side]

    def _place_digit(self) -> None:
        """Draw a digit where it covers little of the others; leave it out where none is free."""
        sample = self._random_sample()
        mask = self._glyph(sample)
        height, width = mask.shape
        ink = mask >= draw.INK
        total = int(ink.sum())
        if total == 0 or max(height, width) > self.spec.size:
            return
        for _ in range(_ATTEMPTS):
            left = int(self.rng.randint(0, self.spec.size - width + 1))
            top = int(self.rng.randint(0, self.spec.size - height + 1))
            region = self.owner[top : top + height, left : left + width]
            if self._covers_little(region, ink):
                gray = self._contrasting(top, left, height, width)
                draw.paint(self.canvas, mask, left, top, self._color(gray, 20))
                region[ink] = len(self.samples)
                self.samples.append(sample)
                self.ink.append(total)
                return

    def _covers_little(self, region: NDArray[np.int8], ink: NDArray[np.bool_]) -> bool:
        """Whether new ink leaves each digit's visible share at 1 - overlap or more."""
        covered = region[ink]
        for k in np.unique(covered[covered >= 0]):
            visible = int((self.owner == k).sum()) - int((covered == k).sum())
            if visible < (1.0 - self.spec.overlap) * self.ink[k]:
                return False
        return True

    def _contrasting(self, top: int, left: int, height: int, width: int) -> int:
        """A grey level that stands out from what is there."""
        there = self.canvas[:, top : top + height, left : left + width]
        mean = int(there.sum()) // there.size
        least = self.spec.contrast
        darker, lighter = max(mean - least, 0), max(255 - mean - least, 0)
        pick = int(self.rng.randint(0, darker + lighter + 1))
        return pick if pick < darker else min(mean + least + pick - darker, 255)

    def _cross(self) -> None:
        """A thin stroke over the digits, unless it hides too much of one."""
        mask, left, top = self._stroke(self.spec.size / 96)
        region = self.owner[top : top + mask.shape[0], left : left + mask.shape[1]]
        ink = mask >= draw.INK
        color = self._color(int(self.rng.randint(0, 256)), 30)
        if self._covers_little(region, ink):
            draw.paint(self.canvas, mask, left, top, color)
            region[ink] = -1

    def _add_noise(self) -> None:
        """Triangular noise from two random bytes a value, whose standard deviation is 104.5."""
        if self.spec.noise > 0:
            shape = (2, *self.canvas.shape)
            raw = np.frombuffer(self.rng.bytes(2 * self.canvas.size), dtype=np.uint8).reshape(shape)
            centered = raw[0].astype(np.int32) + raw[1] - 255
            self.canvas += (centered * int(self.spec.noise * 65536.0 / 104.5)) >> 16
            self.canvas.clip(0, 255, out=self.canvas)
