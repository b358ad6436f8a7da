"""Detection data: handwritten-digit scenes, and the COCO and Pascal VOC layouts on disk."""

from hqod_ops.detection.data.coco import CocoDataset, write_coco
from hqod_ops.detection.data.dataset import (
    DataError,
    DetectionDataset,
    RandomHorizontalFlip,
    Target,
    collate,
)
from hqod_ops.detection.data.digits import DigitScenes
from hqod_ops.detection.data.files import Resize
from hqod_ops.detection.data.opening import open_dataset
from hqod_ops.detection.data.voc import VocDataset

__all__ = [
    "CocoDataset",
    "DataError",
    "DetectionDataset",
    "DigitScenes",
    "RandomHorizontalFlip",
    "Resize",
    "Target",
    "VocDataset",
    "collate",
    "open_dataset",
    "write_coco",
]
