"""What a quantizer is in ONNX: scale, zero point, codes, and the integer type that holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hqod_ops.functional import fake_quant
from hqod_ops.quant.export._extras import require
from hqod_ops.quant.export.targets import Target
from hqod_ops.quant.quantizers.base import Quantizer

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Storage:
    """An integer type of ONNX."""

    name: str
    low: int
    high: int
    opset: int
    """The first opset whose QuantizeLinear and DequantizeLinear know the type."""

    @property
    def bits(self) -> int:
        """Its width."""
        return (self.high - self.low).bit_length()

    @property
    def numpy_type(self) -> np.dtype[Any]:
        """The NumPy type (of ml_dtypes below 8 bits) that onnx packs."""
        dtype: np.dtype[Any] = require("onnx_ir").DataType[self.name].numpy()
        return dtype


BASE_OPSET = 18
"""The opset that torch's exporter writes by itself."""

STORAGES = (
    Storage("UINT2", 0, 3, 25),
    Storage("INT2", -2, 1, 25),
    Storage("UINT4", 0, 15, 21),
    Storage("INT4", -8, 7, 21),
    Storage("UINT8", 0, 255, BASE_OPSET),
    Storage("INT8", -128, 127, BASE_OPSET),
)
"""The smallest first."""


@dataclass(frozen=True, eq=False)
class Grid:
    """The values ``(k - zero_point) * scale``, k in [low, high], that one tensor can take.

    Attributes:
        name (str): of the quantizer in the model, and of its call where it is called several times.
        scale (float32 array [] or [C]): as trained.
        zero_point (int64 array like scale): within the storage's range.
        low (int), high (int): the codes' range.
        axis (int, optional): of the channels.
        dims (int): of the tensor.
        storage (Storage): the type that holds codes and zero point.
        activation (str, optional): ``"relu"`` or ``"relu6"`` in front of the quantizer.
        codes (int64 array, optional): of a weight.
    """

    name: str
    scale: Array
    zero_point: Array
    low: int
    high: int
    axis: int | None
    dims: int
    storage: Storage
    activation: str | None = None
    codes: Array | None = None

    @property
    def label(self) -> str:
        """What the names in the file begin with."""
        return self.name.replace("_quantizer", "")

    @property
    def clips(self) -> tuple[bool, bool]:
        """Whether the storage alone would let codes below low and above high through."""
        return self.storage.low < self.low, self.high < self.storage.high

    @property
    def code_limits(self) -> tuple[int, int] | None:
        """The codes that :attr:`activation` lets through; None if they differ by channel.

        Rounding keeps the order, so the code of a limited value is the limited code of the value.
        """
        low, high = self.low, self.high
        if self.activation is None:
            return low, high
        if self.axis is not None:
            return None
        ends = np.array([-np.inf, np.inf])
        least, most = (int(code) for code in self.quantize(ends))
        return least, most

    def along(self, values: Array) -> Array:
        """Values of the channels, shaped to broadcast with the tensor."""
        if self.axis is None:
            return values
        shape = [1] * self.dims
        shape[self.axis] = -1
        return values.reshape(shape)

    def quantize(self, x: Array) -> Array:
        """The codes of x, as ONNX defines them."""
        scale, zero = self.along(self.scale), self.along(self.zero_point)
        if self.activation is not None:
            x = np.clip(x, 0, 6 if self.activation == "relu6" else None)
        return np.asarray(np.clip(np.rint(x / scale) + zero, self.low, self.high), np.int64)

    def dequantize(self, codes: Array) -> Array:
        """The float32 values of codes."""
        zero = self.along(self.zero_point)
        return np.asarray((codes - zero).astype(np.float32) * self.along(self.scale))

    def steps(self, difference: Array) -> Array:
        """A difference of values in quantization steps."""
        return np.asarray(difference / self.along(self.scale))

    def unsigned(self) -> Grid:
        """The same values with codes that count from 0: int8 moved to uint8."""
        if self.storage.low == 0:
            return self
        to = next(s for s in STORAGES if s.low == 0 and s.bits == self.storage.bits)
        shift = to.low - self.storage.low
        return dataclasses.replace(
            self,
            zero_point=self.zero_point + shift,
            low=self.low + shift,
            high=self.high + shift,
            storage=to,
            codes=None if self.codes is None else self.codes + shift,
        )

    def spread(self) -> Grid:
        """The same values with larger codes and smaller scales, by a power of two: up to 64.

        The sum of two products with codes of 8 bits then still fits 16 bits, in which x86 without
        VNNI adds them.
        """
        largest = max(-self.low, self.high)
        factor = 1 << max(64 // max(largest, 1), 1).bit_length() - 1
        if self.codes is None or self.storage.bits != 8 or self.zero_point.any() or factor == 1:
            return self
        return dataclasses.replace(
            self,
            scale=self.scale / np.float32(factor),
            low=self.low * factor,
            high=self.high * factor,
            codes=self.codes * factor,
        )

    def symmetric(self, target: str) -> Grid:
        """The same in a signed type with the zero point 0.

        Args:
            target (str): that needs it, for the message.

        Raises:
            ValueError: it does not fit.
        """
        signed = next(s for s in STORAGES if s.low < 0 and s.bits == self.storage.bits)
        if self.zero_point.any() or self.low < signed.low or signed.high < self.high:
            raise ValueError(
                f"{self.name}: target {target!r} knows signed types with the zero point 0, but the "
                f"codes are in [{self.low}, {self.high}] and the zero points in "
                f"[{self.zero_point.min()}, {self.zero_point.max()}]; signed quantizers without a "
                'zero point fit, such as QATConfig(act_options={"signed": True})'
            )
        return dataclasses.replace(self, storage=signed)


def read_grid(
    name: str,
    quantizer: Quantizer,
    level: int,
    dims: int,
    storages: Sequence[Storage],
    weight: Tensor | None = None,
) -> Grid:
    """The grid of one level of a quantizer.

    Args:
        name (str): for messages, and for the names in the file.
        quantizer (Quantizer): calibrated, on the CPU.
        level (int): 0 for a weight.
        dims (int): of the tensor that it quantizes.
        storages (sequence of Storage): that may be used, the preferred first.
        weight (Tensor, optional): read its codes too. Default: None

    Raises:
        ValueError: ONNX cannot express the quantizer; the message says why.
        TypeError: its scale is not float32.
    """
    low, high = quantizer.codes(level) if weight is not None else _reached(quantizer, level, dims)
    with torch.no_grad():
        scale = quantizer.effective_scale(level).detach()
        zero = quantizer.effective_zero_point(level)
    if scale.dtype != torch.float32:
        raise TypeError(f"{name}: expected a float32 scale, got {scale.dtype}; use model.float()")
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(f"{name}: expected positive, finite scales, got {scale.tolist()}")
    zero = torch.zeros_like(scale) if zero is None else zero.detach().to(scale.dtype)
    if not bool((zero == zero.round()).all()):
        raise ValueError(f"{name}: ONNX needs whole zero points, got {zero.tolist()}")
    axis = quantizer.ch_axis
    shape = () if axis is None else (-1,)
    zero_point = zero.reshape(shape).numpy().astype(np.int64)
    grid = Grid(
        name=name,
        scale=scale.reshape(shape).numpy().copy(),
        zero_point=zero_point,
        low=low,
        high=high,
        axis=None if axis is None else axis % dims,
        dims=dims,
        storage=_storage(name, low, high, zero_point, storages),
        activation=quantizer.activation,
    )
    return grid if weight is None else _with_codes(grid, quantizer, weight)


@torch.no_grad()
def _reached(quantizer: Quantizer, level: int, dims: int) -> tuple[int, int]:
    """The outermost codes that the quantizer gives: PACT, for one, leaves out the lowest."""
    arguments = quantizer.arguments(level)
    low, high = quantizer.codes(level)
    shape = [1] * dims
    if quantizer.ch_axis is not None:
        shape[quantizer.ch_axis] = -1
    scale = arguments["scale"].reshape(shape)
    zero = quantizer.effective_zero_point(level)
    offset = 0 if zero is None else zero.reshape(shape)
    far = 4 * (high - low) * scale
    ends = [fake_quant(quantizer.transform(x, level), **arguments) for x in (-far, far)]
    codes = [(end / scale).round() + offset for end in ends]
    return int(codes[0].min()), int(codes[1].max())


def usable_storages(target: Target, opset: int) -> list[Storage]:
    """The types that a file for a target may have, up to an opset."""
    return [
        storage
        for storage in STORAGES
        if storage.opset <= opset and storage.bits >= target.least_bits
    ]


def _storage(
    name: str, low: int, high: int, zero_point: Array, storages: Sequence[Storage]
) -> Storage:
    least, most = min(low, int(zero_point.min())), max(high, int(zero_point.max()))
    for storage in storages:
        if storage.low <= least and most <= storage.high:
            return storage
    raise ValueError(
        f"{name}: ONNX stores codes and zero point in one integer type of at most 8 bits, but the "
        f"codes are in [{low}, {high}] and the zero points in "
        f"[{zero_point.min()}, {zero_point.max()}]"
    )


def _with_codes(grid: Grid, quantizer: Quantizer, weight: Tensor) -> Grid:
    with torch.no_grad():
        values = quantizer(weight).numpy()
    codes = np.rint(grid.steps(values)).astype(np.int64) + grid.along(grid.zero_point)
    inside = (codes >= grid.low) & (codes <= grid.high)
    if not (inside & (grid.dequantize(codes) == values)).all():
        raise ValueError(
            f"{grid.name}: ONNX cannot express a {type(quantizer).__name__} whose values are not "
            "(code - zero point) * scale"
        )
    return dataclasses.replace(grid, codes=codes)
