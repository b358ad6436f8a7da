"""Entries of the losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hqod_ops
from bench import peers
from bench.entry import GPU_PHASES, Entry, Inputs

try:
    from torchvision.ops import generalized_box_iou_loss
except (ImportError, RuntimeError):
    # A torchvision that was built for another torch raises RuntimeError.
    generalized_box_iou_loss = None

SIZES = (16, 256, 4096, 65536, 1048576)
GPU_SIZES = (16, 256, 4096, 16384, 65536, 1048576)
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
        waiting=frozenset({"torchvision GIoU"}),
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


class _Empty(torch.autograd.Function):
    """Saves and returns what the loss does, and launches one kernel a pass, which does nothing."""

    @staticmethod
    def forward(ctx: Any, pred: Tensor, target: Tensor, scores: Tensor) -> Tensor:
        ctx.save_for_backward(pred, target, scores)
        torch.cuda._sleep(0)
        return pred.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pred, _, scores = ctx.saved_tensors
        torch.cuda._sleep(0)
        return torch.empty_like(pred), None, torch.empty_like(scores)


def _empty(pred: Tensor, target: Tensor, scores: Tensor) -> Tensor:
    result: Tensor = _Empty.apply(pred, target, scores)
    return result


def _hqod_on_gpu(n: int, logits: bool = False) -> Entry:
    """Beside what an op with two kernels costs at the least; the floor for it at common sizes."""
    goals = {("FB", "eager"): 12.0, ("FB", "compile"): 2.0}
    if n <= 16384:
        goals["FB", "empty op"] = 1 / 1.3
    return dataclasses.replace(_hqod(n, logits), others={"empty op": _empty}, goals=goals)


def _on_gpu(entry: Entry) -> Entry:
    return dataclasses.replace(entry, phases=GPU_PHASES)


def gpu_entries() -> list[Entry]:
    """All entries of this module for a GPU."""
    entries = [
        *(_hqod_on_gpu(n) for n in GPU_SIZES),
        *(_hqod_on_gpu(n, logits=True) for n in (256, 65536)),
        *(_harmonious(n) for n in (256, 16384, 1048576)),
        *(_tcorr(n) for n in (256, 16384, 1048576)),
    ]
    return [_on_gpu(entry) for entry in entries]


def entries() -> list[Entry]:
    """All entries of this module."""
    return [
        *(_hqod(n) for n in SIZES),
        *(_hqod(n, logits=True) for n in (256, 65536)),
        *(_harmonious(n) for n in SIZES),
        *(_tcorr(n) for n in SIZES),
    ]
