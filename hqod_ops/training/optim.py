"""Optimizer and learning rate of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hqod_ops.quant import quantizer_parameters
from hqod_ops.training.settings import ScheduleConfig


def learning_rate(config: ScheduleConfig, steps_per_epoch: int) -> Callable[[int], float]:
    """The learning rate of a step, relative to ``config.lr``.

    "onecycle": a straight rise from 1/25 over the first part ``warmup`` of all steps, then half a
    cosine down to 1/1000. "step": an exponential rise from ``warmup`` over the first epoch, then a
    tenth from each of ``steps`` on (epochs).

    Example:
        >>> from hqod_ops.training.settings import ScheduleConfig
        >>> from hqod_ops.training.optim import learning_rate
        >>> rate = learning_rate(ScheduleConfig(epochs=10, warmup=0.1), steps_per_epoch=10)
        >>> rate(0), rate(10), round(rate(100), 4)
        (0.04, 1.0, 0.001)
    """
    steps = config.epochs * steps_per_epoch
    rise = max(1.0, config.warmup * steps)

    def onecycle(step: int) -> float:
        if step < rise:
            return 0.04 + 0.96 * step / rise
        done = (step - rise) / max(1.0, steps - rise)
        return 0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def stepwise(step: int) -> float:
        if step < steps_per_epoch:
            return float(config.warmup ** (1 - step / steps_per_epoch))
        return float(0.1 ** sum(step >= epoch * steps_per_epoch for epoch in config.steps))

    return onecycle if config.policy == "onecycle" else stepwise


def make_optimizer(
    model: nn.Module, config: ScheduleConfig, *, fused: bool = True
) -> torch.optim.Optimizer:
    """AdamW or SGD with weight decay on matrices and kernels alone.

    Args:
        model (nn.Module): the model, quantized or not.
        config (ScheduleConfig): kind and rates, those of the quantizers' scales among them.
        fused (bool): AdamW in one kernel. Default: True
    """
    scales = list(quantizer_parameters(model))
    known = {id(p) for p in scales}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if scales:
        groups.append(
            {
                "params": scales,
                "weight_decay": config.scale_decay,
                "lr": config.lr * config.scale_lr,
            }
        )
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9)
    # Fused: a quantized model has a hundred scales of one element each.
    return torch.optim.AdamW(groups, lr=config.lr, fused=fused)
