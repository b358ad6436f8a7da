"""Where the op tests run: on the CPU, or on what ``HQOD_TEST_DEVICE`` names.

Inputs are made on the CPU, the same for every device; results are judged on the CPU. In between
they are on :data:`DEVICE`: :meth:`hqod_ops.testing.cases.OpCase.make` puts them there, and so do
the public functions as this module exports them, which take CPU tensors and give CPU tensors back
(on the CPU, the very functions)::

    from hqod_ops.testing.device import DEVICE, fake_quant

    y = fake_quant(x, scale, quant_min=-8, quant_max=7)      # x on the CPU, y on the CPU
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hqod_ops

DEVICE = torch.device(os.environ.get("HQOD_TEST_DEVICE", "cpu"))
if DEVICE.type == "cuda" and DEVICE.index is None:
    DEVICE = torch.device("cuda", 0)  # as tensors and messages name it
"""The device of the op tests."""


def emulated() -> bool:
    """Whether the library runs the bodies of the CUDA kernels on the CPU (``HQOD_EMULATED=1``)."""
    return os.environ.get("HQOD_EMULATED", "0") == "1"


def cpu_kernels() -> bool:
    """Whether the op tests reach the CPU kernels, with their threads and instruction sets."""
    return DEVICE.type == "cpu" and not emulated()


def to_device(value: Any) -> Any:
    """A tensor, or tensors in lists and tuples, moved to :data:`DEVICE`; autograd follows."""
    return _move(value, DEVICE)


def to_cpu(value: Any) -> Any:
    """The way back."""
    return _move(value, torch.device("cpu"))


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(_move(v, device) for v in value)
    return value


def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, run on :data:`DEVICE` with inputs from the CPU and results on the CPU."""
    if DEVICE.type == "cpu":
        return function

    def call(*args: Any, **options: Any) -> Any:
        options = {name: to_device(value) for name, value in options.items()}
        return to_cpu(function(*to_device(args), **options))

    return call


aligned_box_iou = on_device(hqod_ops.aligned_box_iou)
fake_quant = on_device(hqod_ops.fake_quant)
fake_quant_foreach = on_device(hqod_ops.fake_quant_foreach)
harmonious_iou_loss = on_device(hqod_ops.harmonious_iou_loss)
hqod_loss = on_device(hqod_ops.hqod_loss)
tcorr_loss = on_device(hqod_ops.tcorr_loss)
