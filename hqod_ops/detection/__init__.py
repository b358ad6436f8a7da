"""Detectors, their data and their evaluation; needs ``pip install "hqod_ops[detection]"``.

The public names are imported from their modules when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "data": (
        "CocoDataset",
        "DataError",
        "DetectionDataset",
        "DigitScenes",
        "RandomHorizontalFlip",
        "Resize",
        "VocDataset",
        "collate",
        "open_dataset",
        "write_coco",
    ),
    "evaluation": ("coco_results", "evaluate_coco"),
    "harmony": ("HarmonyReport", "harmony_report", "match_detections"),
    "plots": ("draw_detections", "plot_curves", "plot_harmony"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
