"""A table of what is quantized, and how well it fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import nn

from hqod_ops.quant.config import FLOAT_BITS
from hqod_ops.quant.layers import QATLayer
from hqod_ops.quant.quantizer import Quantizer


@dataclass(frozen=True)
class LayerSummary:
    """One quantized layer.

    Attributes:
        name (str), type (str): full name and float class of the layer.
        weight_bits (int), act_bits (int): bits of weight and input; 32 is not quantized.
        act_signed (tuple of bool): sign of the input's codes, one a level.
        weight_scales (tuple of float): one, or one a channel; empty before calibration.
        act_scales (tuple of float): one a level; empty before calibration.
        weight_clipped (float, optional): share of the weights outside of the codes' range.
        weight_zero (float, optional): share of the weights with code 0.
    """

    name: str
    type: str
    weight_bits: int
    act_bits: int
    act_signed: tuple[bool, ...] = ()
    weight_scales: tuple[float, ...] = ()
    act_scales: tuple[float, ...] = ()
    weight_clipped: float | None = None
    weight_zero: float | None = None


class Summary(Sequence[LayerSummary]):
    """The rows of :func:`summary`; ``print`` shows them as a table."""

    def __init__(self, rows: Sequence[LayerSummary]) -> None:
        self._rows = tuple(rows)

    @overload
    def __getitem__(self, index: int) -> LayerSummary: ...
    @overload
    def __getitem__(self, index: slice) -> Summary: ...
    def __getitem__(self, index: int | slice) -> LayerSummary | Summary:
        if isinstance(index, slice):
            return Summary(self._rows[index])
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[LayerSummary]:
        return iter(self._rows)

    def __str__(self) -> str:
        head = ("layer", "type", "w bits", "a bits", "w scale", "clipped", "zero", "a scale")
        cells = [head, *(_cells(row) for row in self._rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        left = (True, True, False, False, True, False, False, True)
        lines = [
            "  ".join(
                cell.ljust(width) if to_left else cell.rjust(width)
                for cell, width, to_left in zip(row, widths, left, strict=True)
            ).rstrip()
            for row in cells
        ]
        return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])

    __repr__ = __str__


def _cells(row: LayerSummary) -> tuple[str, ...]:
    def bits(value: int) -> str:
        return "float" if value == FLOAT_BITS else str(value)

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    weights = row.weight_scales
    if len(weights) > 1:
        weight_scale = f"{min(weights):.3g}..{max(weights):.3g}"
    else:
        weight_scale = " ".join(f"{scale:.3g}" for scale in weights)
    acts = " ".join(
        f"{'±' if signed else ''}{scale:.3g}"
        for scale, signed in zip(row.act_scales, row.act_signed, strict=True)
    )
    missing = not weights and row.weight_bits != FLOAT_BITS
    return (
        row.name,
        row.type,
        bits(row.weight_bits),
        bits(row.act_bits),
        "not calibrated" if missing else weight_scale,
        share(row.weight_clipped),
        share(row.weight_zero),
        "not calibrated" if not acts and row.act_bits != FLOAT_BITS else acts,
    )


@torch.no_grad()
def summary(model: nn.Module) -> Summary:
    """The quantized layers of a model: bits, scales, share of clipped and of zero weights.

    In the printed table a signed input scale has a ``±``; there is one a level.

    Args:
        model (nn.Module): a model from :func:`hqod_ops.quant.prepare_qat`.

    Returns:
        Summary: a sequence of :class:`LayerSummary`, printed as a table.

    Example:
        >>> from torch import nn
        >>> from hqod_ops.quant import prepare_qat, summary
        >>> summary(prepare_qat(nn.Sequential(nn.Linear(4, 2)), "w8a8"))[0].weight_bits
        8
    """
    return Summary([_row(name, m) for name, m in model.named_modules() if isinstance(m, QATLayer)])


def _row(name: str, layer: QATLayer) -> LayerSummary:
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    clipped, zero = _shares(layer, weights)
    act_levels = range(inputs.levels) if inputs is not None and inputs.calibrated else range(0)
    return LayerSummary(
        name=name,
        type=layer.float_type.__name__,
        weight_bits=FLOAT_BITS if weights is None else weights.bits,
        act_bits=FLOAT_BITS if inputs is None else inputs.bits,
        act_signed=tuple(inputs.codes(level)[0] < 0 for level in act_levels) if inputs else (),
        weight_scales=(
            tuple(weights.effective_scale().tolist()) if weights and weights.calibrated else ()
        ),
        act_scales=(
            tuple(inputs.effective_scale(level).item() for level in act_levels) if inputs else ()
        ),
        weight_clipped=clipped,
        weight_zero=zero,
    )


def _shares(layer: QATLayer, quantizer: Quantizer | None) -> tuple[float | None, float | None]:
    """Shares of clipped and of zero weights."""
    if quantizer is None or not quantizer.calibrated:
        return None, None
    scale = quantizer.effective_scale()
    if quantizer.ch_axis is not None:
        shape = [1] * layer.weight.dim()
        shape[quantizer.ch_axis] = -1
        scale = scale.reshape(shape)
    code = (layer.weight / scale).round()
    low, high = quantizer.codes()
    return ((code < low) | (code > high)).float().mean().item(), (code == 0).float().mean().item()
