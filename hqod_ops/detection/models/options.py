"""Settings of the detectors: network, loss, detections; read and checked by msgspec."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

# The upper limit keeps infinity out, as the lower one does NaN.
Count = Annotated[int, Meta(ge=1)]
Width = Annotated[int, Meta(ge=1, le=2**16)]
Blocks = Annotated[int, Meta(ge=1, le=1000)]
Depth = Annotated[int, Meta(ge=0, le=1000)]
"""Limits that no network reaches, and a mistyped number or a damaged file may."""
WholeNumber = Annotated[int, Meta(ge=0)]
Factor = Annotated[float, Meta(ge=0, le=sys.float_info.max)]
Part = Annotated[float, Meta(ge=0, le=1)]


@dataclass(frozen=True)
class ModelConfig:
    """The network and its anchors.

    Args:
        kind (str): which detector: "atss".
        stem (int): channels of the first convolution.
        widths (list of int): channels of the stages, of strides 4, 8, 16, ...
        depths (list of int): basic blocks of the stages.
        levels (int): pyramid levels, one for each of the last stages.
        channels (int): channels of the pyramid and the head.
        head_depth (int): convolutions in each tower of the head.
        groups (int): groups of the head's normalisation.
        level_norms (bool): AQD's batch normalisations, one for each level, in the head in place of
            the group normalisations.
        anchor_scale (float): side of an anchor, in strides of its level; at least 0.25, below which
            an anchor of stride 4 rounds to nothing.
    """

    kind: str = "atss"
    stem: Width = 16
    widths: tuple[Width, ...] = (16, 32, 64)
    depths: tuple[Blocks, ...] = (1, 1, 1)
    levels: Count = 2
    channels: Width = 32
    head_depth: Depth = 2
    groups: Count = 8
    level_norms: bool = False
    anchor_scale: Annotated[float, Meta(ge=0.25, le=sys.float_info.max)] = 3.0


@dataclass(frozen=True)
class LossConfig:
    """The training loss, with the terms of HQOD.

    Args:
        hqod (bool): add the terms of HQOD.
        hiou_weight (float), tcorr_weight (float): factors of HIoU and TCorr.
        variant (str): of TCorr: "official" or "geometric".
        normaliser (str): what the HQOD terms are divided by: "official" (sum of centerness targets)
            or "num_pos".
        box_weight (float): factor of the GIoU loss.
        focal_alpha (float): weight of the foreground in the focal loss.
        focal_gamma (float): focus of the focal loss.
        topk (int): candidates per level and object.
    """

    hqod: bool = False
    hiou_weight: Factor = 1.0
    tcorr_weight: Factor = 1.0
    variant: Literal["official", "geometric"] = "official"
    normaliser: Literal["official", "num_pos"] = "official"
    box_weight: Factor = 2.0
    focal_alpha: Part = 0.25
    focal_gamma: Factor = 2.0
    topk: Count = 9


@dataclass(frozen=True)
class TestConfig:
    """From raw predictions to detections.

    Args:
        score_threshold (float): least class score of a candidate.
        candidates (int): candidates an image before suppression.
        nms_iou (float): overlap above which the weaker of two boxes of a class is dropped.
        max_detections (int): detections an image.
    """

    __test__ = False

    score_threshold: Part = 0.05
    candidates: Count = 300
    nms_iou: Part = 0.5
    max_detections: Count = 100
