"""Entries of the losses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import hqod_ops
from bench import peers
from bench.entry import Entry, Inputs

try:
    from torchvision.ops import generalized_box_iou_loss
except (ImportError, RuntimeError):
    # A torchvision that was built for another torch raises RuntimeError.
    generalized_box_iou_loss = None

SIZES = (16, 256, 4096, 65536, 1048576)
QUICK = (256, 65536)
BOX, SCORE = 16, 4
"""Bytes of a box and of a score."""


def _boxes(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Predictions and targets of an 800-pixel image; nearly all overlap."""
    centre = torch.rand(n, 2, generator=generator) * 800
    size = torch.rand(n, 2, generator=generator) * 90 + 10
    noise = torch.randn(n, 4, generator=generator) * 0.1 * torch.cat([size, size], dim=1)
    target = torch.cat([centre - size / 2, centre + size / 2], dim=1)
    return target + noise, target


def _scores(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator) * 0.9 + 0.05


def _hqod_inputs(n: int, logits: bool) -> Callable[[], Inputs]:
    def setup() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        pred, target = _boxes(n, generator)
        scores = _scores(n, generator)
        scores = (scores.logit() if logits else scores).requires_grad_()
        return Inputs({"pred": pred.requires_grad_(), "target": target, "scores": scores})

    return setup


def _box_inputs(n: int) -> Callable[[], Inputs]:
    def setup() -> Inputs:
        pred, target = _boxes(n, torch.Generator().manual_seed(0))
        return Inputs({"pred": pred.requires_grad_(), "target": target})

    return setup


def _tcorr_inputs(n: int) -> Callable[[], Inputs]:
    def setup() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        scores, ious = _scores(n, generator), _scores(n, generator)
        return Inputs({"scores": scores.requires_grad_(), "ious": ious.requires_grad_()})

    return setup


def _hqod(n: int, logits: bool = False) -> Entry:
    def ours(pred: Tensor, target: Tensor, scores: Tensor) -> Tensor:
        return hqod_ops.hqod_loss(pred, target, scores, logits=logits)

    eager = peers.hqod_loss_of_logits if logits else peers.hqod_loss
    large = n >= 4096
    return Entry(
        name=f"hqod_loss{'_logits' if logits else ''}/N={n}",
        setup=_hqod_inputs(n, logits),
        ours=ours,
        peers={"eager": eager},
        compiled=eager,
        traffic={"F": n * (2 * BOX + SCORE), "FB": n * (3 * BOX + 2 * SCORE)},
        memory_unit=("B/box", n),
        goals={("FB", "eager"): 17 if large else 12, ("FB", "compile"): 8 if large else 4},
        quick=n in QUICK and not logits,
    )


def _harmonious(n: int) -> Entry:
    def ours(pred: Tensor, target: Tensor) -> Tensor:
        return hqod_ops.harmonious_iou_loss(pred, target, reduction="mean")

    def giou(pred: Tensor, target: Tensor) -> Tensor:
        return generalized_box_iou_loss(pred, target, reduction="mean")

    return Entry(
        name=f"harmonious_iou_loss/N={n}",
        setup=_box_inputs(n),
        ours=ours,
        peers={"eager": peers.harmonious_iou_loss},
        others={} if generalized_box_iou_loss is None else {"torchvision GIoU": giou},
        compiled=peers.harmonious_iou_loss,
        traffic={"F": n * 2 * BOX, "FB": n * 3 * BOX},
        memory_unit=("B/box", n),
        goals={("FB", "torchvision GIoU"): 15},
    )


def _tcorr(n: int) -> Entry:
    def ours(scores: Tensor, ious: Tensor) -> Tensor:
        return hqod_ops.tcorr_loss(scores, ious, reduction="mean")

    return Entry(
        name=f"tcorr_loss/N={n}",
        setup=_tcorr_inputs(n),
        ours=ours,
        peers={"eager": peers.tcorr_loss},
        compiled=peers.tcorr_loss,
        traffic={"F": n * 2 * SCORE, "FB": n * 4 * SCORE},
        memory_unit=("B/box", n),
    )


def entries() -> list[Entry]:
    """All entries of this module."""
    return [
        *(_hqod(n) for n in SIZES),
        *(_hqod(n, logits=True) for n in (256, 65536)),
        *(_harmonious(n) for n in SIZES),
        *(_tcorr(n) for n in SIZES),
    ]
