"""Which level a call of a shared layer belongs to."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def in_backward() -> bool:
    """Whether this runs within a backward pass, as calls that activation checkpointing repeats."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Calls:
    """The calls of a module since the model's forward pass began, each with its input's shape.

    One call after the other belongs to one level after the other. When activation checkpointing
    repeats a call in the backward pass, its level is that of the call of the same shape.
    """

    def __init__(self) -> None:
        self._shapes: list[torch.Size] = []

    def __len__(self) -> int:
        return len(self._shapes)

    def add(self, shape: torch.Size) -> int:
        """The index of this call."""
        self._shapes.append(shape)
        return len(self._shapes) - 1

    def clear(self) -> None:
        """The next call is the first of a forward pass."""
        self._shapes.clear()

    def next_level(self, shape: torch.Size, levels: int, label: str) -> int:
        """The level of this call.

        Args:
            shape (torch.Size): of its input.
            levels (int): how many there are.
            label (str): name of the module, for errors.

        Raises:
            RuntimeError: there were that many calls already, or the call is a repetition that
                shapes cannot tell apart.
        """
        if in_backward():
            return self._repeated(shape, label)
        level = self.add(shape)
        if level >= levels:
            raise RuntimeError(
                f"{label}: called more than {levels} times in one forward pass, the number of its "
                "levels in calibration; call the prepared model as a whole, or "
                "hqod_ops.quant.reset_levels(model) before calling a part of it"
            )
        return level

    def _repeated(self, shape: torch.Size, label: str) -> int:
        same = [index for index, seen in enumerate(self._shapes) if seen == shape]
        if len(same) != 1:
            raise RuntimeError(
                f"{label}: cannot tell which level activation checkpointing repeats: "
                f"{len(same)} calls of the forward pass had an input of shape {tuple(shape)}"
            )
        return same[0]


class CountsCalls(nn.Module):
    """A module whose calls in one forward pass are those of one level after the other."""

    def __init__(self) -> None:
        super().__init__()
        self._calls = Calls()

    def reset_level(self) -> None:
        """The next call is that of the first level."""
        self._calls.clear()


def reset_levels(model: nn.Module) -> None:
    """Start a new forward pass: the next call of every shared layer is that of its first level.

    A prepared model does this by itself whenever it is called as a whole, and so does
    :func:`hqod_ops.quant.detection_network`. It is needed only before calling parts of them.

    Args:
        model (nn.Module): a model from :func:`hqod_ops.quant.prepare_qat` or
            :func:`hqod_ops.quant.use_level_batch_norm`, or a part of one.
    """
    for module in model.modules():
        if isinstance(module, CountsCalls):
            module.reset_level()


def start_levels(model: nn.Module, args: Any) -> None:
    """:func:`reset_levels` as a forward pre-hook. It resets the model it is given: in a copy of a
    model the copy."""
    reset_levels(model)
