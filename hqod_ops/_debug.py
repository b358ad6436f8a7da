"""Checks of values, which cost a device synchronisation and therefore run on request only."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_enabled = False


def debug(enabled: bool = True) -> None:
    """Switch the checks of values on or off, for every op and thread of the process.

    With them on, an op raises ValueError when a box, a score or an IoU is not finite, when a box
    has x2 < x1 or y2 < y1, when a score that is not a logit lies outside of [0, 1], when a divisor
    of a mean or a scale is not positive and finite, and when a zero point lies outside of the
    codes. They read values back from the device, so they are off by default, and
    they are skipped inside ``torch.compile``.

    Args:
        enabled (bool): whether to check values from now on.

    Example:
        >>> import torch, hqod_ops
        >>> hqod_ops.debug(True)
        >>> try:
        ...     hqod_ops.fake_quant(torch.ones(3), torch.tensor(-1.0), quant_min=0, quant_max=15)
        ... except ValueError as error:
        ...     print(error)
        scale: expected positive finite values, got -1.0 at index 0
        >>> hqod_ops.debug(False)
    """
    global _enabled
    _enabled = enabled


def active() -> bool:
    """Whether values are to be checked now."""
    return _enabled and not torch.compiler.is_compiling()


def _fail(name: str, expected: str, values: Tensor, bad: Tensor) -> None:
    index = int(bad.reshape(-1).to(torch.uint8).argmax())
    got = values.detach().reshape(bad.numel(), -1)[index].tolist()
    raise ValueError(
        f"{name}: expected {expected}, got {got[0] if len(got) == 1 else got} at index {index}"
    )


def boxes(name: str, values: Tensor) -> None:
    """Finite boxes with x1 <= x2 and y1 <= y2."""
    ordered = (values[..., 2:] >= values[..., :2]).all(-1) & values.isfinite().all(-1)
    if not ordered.all():
        _fail(name, "finite boxes (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2", values, ~ordered)


def finite(name: str, values: Tensor | None) -> None:
    """Finite values, where there are any."""
    if values is None:
        return
    good = values.isfinite()
    if not good.all():
        _fail(name, "finite values", values, ~good)


def scores(values: Tensor, logits: bool) -> None:
    """Finite values, and probabilities unless they are logits."""
    finite("scores", values)
    good = (values >= 0) & (values <= 1)
    if not (logits or good.all()):
        _fail("scores", "values in [0, 1] (did you mean logits=True?)", values, ~good)


def average(samples: int, avg_factor: float | Tensor | None) -> None:
    """A positive finite divisor, where there is something to divide."""
    if avg_factor is None or not samples:
        return
    value = float(avg_factor)
    if not 0 < value < math.inf:
        raise ValueError(f"avg_factor: expected a positive finite value, got {value}")


def quantized(x: Tensor, scale: Tensor, zero_point: Tensor | None, codes: tuple[int, int]) -> None:
    """Finite values, with positive finite scales and zero points that are codes when rounded."""
    finite("x", x)
    good = (scale > 0) & scale.isfinite()
    if not good.all():
        _fail("scale", "positive finite values", scale, ~good)
    if zero_point is not None:
        finite("zero_point", zero_point)
        rounded = zero_point.detach().round()
        good = (rounded >= codes[0]) & (rounded <= codes[1])
        if not good.all():
            _fail("zero_point", f"values in [{codes[0]}, {codes[1]}]", zero_point, ~good)
