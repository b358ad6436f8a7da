"""Coverage masks for synthetic scenes, the same on every platform.

Only elementwise IEEE operations (+, -, *, /, sqrt, floor) and integers are used: no BLAS, no libm,
no reduction of floats. A mask is a uint8 coverage, 255 inside, with its position on the canvas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.uint8]
Canvas = NDArray[np.int32]

INK = 128
"""From this coverage on, a pixel counts as ink."""


@dataclass(frozen=True)
class Rotation:
    """A rotation by 2 * atan(tangent), made of rational numbers instead of sine and cosine."""

    tangent: float

    @property
    def cosine_sine(self) -> tuple[float, float]:
        square = self.tangent * self.tangent
        return (1.0 - square) / (1.0 + square), 2.0 * self.tangent / (1.0 + square)


def extent(mask: NDArray[Any]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is not 0 in a mask; all 0 where it is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def handwriting(
    sample: NDArray[np.int64], size: float, rotation: Rotation, aspect: float, weight: float
) -> Mask:
    """A handwritten sample as a pen stroke of the given size.

    The 8x8 grey values are interpolated bilinearly and cut at a level, with an edge one pixel wide.

    Args:
        sample (int64[8, 8]): grey values from 0 to 16.
        size (float): pixels that the 8 rows become.
        rotation (Rotation): about the centre, by 17 degrees at most.
        aspect (float): width over height, relative to the sample's own.
        weight (float): thickness of the pen in [0, 1].

    Returns:
        uint8[h, w]: the coverage, without empty rows and columns at its border.
    """
    # Rotated by 17 degrees at most, a square reaches to 0.63 of its side, its blurred edge to 0.71.
    across = np.arange(-int(size * 0.71 * aspect) - 2, int(size * 0.71 * aspect) + 3)
    down = np.arange(-int(size * 0.71) - 2, int(size * 0.71) + 3)
    cosine, sine = rotation.cosine_sine
    step = 256.0 * 8.0 / size
    x, y = across[None, :] * (step / aspect), down[:, None] * step
    u = np.floor(x * cosine + y * sine).astype(np.int32) + (9 * 128)
    v = np.floor(y * cosine - x * sine).astype(np.int32) + (9 * 128)
    u, v = u.clip(0, 9 * 256 - 1), v.clip(0, 9 * 256 - 1)
    padded = np.pad(sample, 1).ravel().astype(np.int32)
    at = (v >> 8) * 10 + (u >> 8)
    fu, fv = u & 255, v & 255
    top = padded[at] * (256 - fu) + padded[at + 1] * fu
    bottom = padded[at + 10] * (256 - fu) + padded[at + 11] * fu
    level = top * (256 - fv) + bottom * fv  # 0 to 2**20
    cut = int((10.0 - 6.0 * weight) * 2**16)
    # One sample pixel is size / 8 pixels wide and its grey value changes by about 10 over it.
    gain = size / 8.0 / 10.0
    coverage = np.floor((level - cut) * (gain * 255.0 / 2**16)) + 128.0
    mask: Mask = coverage.clip(0.0, 255.0).astype(np.uint8)
    left, upper, right, lower = extent(mask)
    return mask[upper:lower, left:right]


def stroke(points: list[tuple[float, float]], radius: float, size: int) -> tuple[Mask, int, int]:
    """A polyline of round pen strokes; the mask with its left and top on a canvas of ``size``."""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    left, top = max(int(min(xs) - radius) - 1, 0), max(int(min(ys) - radius) - 1, 0)
    right, bottom = min(int(max(xs) + radius) + 2, size), min(int(max(ys) + radius) + 2, size)
    x = np.arange(left, right, dtype=np.float64)[None, :]
    y = np.arange(top, bottom, dtype=np.float64)[:, None]
    nearest = np.full((bottom - top, right - left), np.inf)
    for (ax, ay), (bx, by) in zip(points[:-1], points[1:], strict=True):
        dx, dy = bx - ax, by - ay
        length = max(dx * dx + dy * dy, 1e-9)
        along = (((x - ax) * dx + (y - ay) * dy) / length).clip(0.0, 1.0)
        px, py = x - ax - along * dx, y - ay - along * dy
        nearest = np.minimum(nearest, px * px + py * py)
    coverage = np.floor((radius + 0.5 - np.sqrt(nearest)) * 255.0).clip(0.0, 255.0)
    return coverage.astype(np.uint8), left, top


def blob(
    center: tuple[float, float],
    radii: tuple[float, float],
    rotation: Rotation,
    softness: float,
    size: int,
) -> tuple[Mask, int, int]:
    """An ellipse with a soft edge; the mask with its left and top on a canvas of ``size``."""
    reach = max(radii) + 1.0
    left, top = max(int(center[0] - reach), 0), max(int(center[1] - reach), 0)
    right, bottom = min(int(center[0] + reach) + 2, size), min(int(center[1] + reach) + 2, size)
    x = np.arange(left, right, dtype=np.float64)[None, :] - center[0]
    y = np.arange(top, bottom, dtype=np.float64)[:, None] - center[1]
    cosine, sine = rotation.cosine_sine
    u, v = (x * cosine + y * sine) / radii[0], (y * cosine - x * sine) / radii[1]
    distance = np.sqrt(u * u + v * v)
    coverage = np.floor((1.0 - distance) * (255.0 / softness)).clip(0.0, 255.0)
    return coverage.astype(np.uint8), left, top


def ramp_weights(cells: int, size: int) -> NDArray[np.int64]:
    """Bilinear weights [size, cells + 1] of a grid stretched over size pixels; rows sum to 256."""
    position = (2 * np.arange(size, dtype=np.int64) + 1) * cells * 128 // size
    cell, part = position >> 8, position & 255
    weights = np.zeros((size, cells + 1), dtype=np.int64)
    weights[np.arange(size), cell] = 256 - part
    weights[np.arange(size), cell + 1] = part
    return weights


def paint(
    canvas: Canvas, mask: Mask, left: int, top: int, color: NDArray[np.int32], opacity: int = 255
) -> None:
    """Blend a colour [3] into a canvas [3, H, W] where a mask covers it; opacity is out of 255."""
    height, width = mask.shape
    alpha = mask.astype(np.int32) * opacity // 255
    region = canvas[:, top : top + height, left : left + width]
    region += ((color[:, None, None] - region) * alpha + 127) // 255
