"""A table of what is quantized, how well it fits, and how large it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from hqod_ops import checks
from hqod_ops.quant.batches import call, evaluating
from hqod_ops.quant.config.qat_config import FLOAT_BITS
from hqod_ops.quant.nn.derived import current, sources
from hqod_ops.quant.nn.layers import QATLayer
from hqod_ops.quant.quantizers.base import Quantizer
from hqod_ops.tables import bits_text, text_table

__all__ = ["LayerSummary", "Summary", "summary"]

_Model = TypeVar("_Model", bound=nn.Module)


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
        weight_zero (float, optional): share of the weights with the value 0.
        act_clipped (tuple of float), act_zero (tuple of float): the same of the inputs in a batch,
            one a level; empty without a batch.
        weight_quantizer (str), act_quantizer (str): class names; empty if not quantized.
        absorbed (str): the activation that the input's quantizer takes in, ``"relu"`` or
            ``"relu6"``, see :func:`hqod_ops.quant.place_on_producers`; empty if none.
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
    act_clipped: tuple[float, ...] = ()
    act_zero: tuple[float, ...] = ()
    weight_quantizer: str = ""
    act_quantizer: str = ""
    absorbed: str = ""


class Summary(Sequence[LayerSummary]):
    """The rows of :func:`summary`; ``print`` shows them as a table.

    Attributes:
        size_mb (float): size in MB (10^6 bytes) of the model with weights at their bits, a scale of
            4 bytes for each weight and input scale, and the rest as it is.
        float_size_mb (float): that of the float model.
    """

    def __init__(
        self, rows: Sequence[LayerSummary], size_mb: float = 0.0, float_size_mb: float = 0.0
    ) -> None:
        self._rows = tuple(rows)
        self.size_mb, self.float_size_mb = size_mb, float_size_mb

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
        head = ["layer", "type", "w bits", "w scale", "clipped", "zero", "a bits", "a scale"]
        right = ["w bits", "clipped", "zero", "a bits"]
        if any(row.act_clipped for row in self):
            head += ["a clipped", "a zero"]
        rows = [_cells(row)[: len(head)] for row in self]
        if any(row.absorbed for row in self):
            head.append("absorbs")
            rows = [[*cells, row.absorbed] for cells, row in zip(rows, self, strict=True)]
        table = text_table(head, rows, right)
        if not self.float_size_mb:
            return table
        return f"{table}\n{self.size_mb:.3g} MB, in float {self.float_size_mb:.3g} MB"

    __repr__ = __str__


def _cells(row: LayerSummary) -> list[str]:
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
    return [
        row.name,
        row.type,
        bits_text(row.weight_bits),
        "not calibrated" if missing else weight_scale,
        "" if row.weight_clipped is None else f"{row.weight_clipped:.1%}",
        "" if row.weight_zero is None else f"{row.weight_zero:.1%}",
        bits_text(row.act_bits),
        "not calibrated" if not acts and row.act_bits != FLOAT_BITS else acts,
        " ".join(f"{share:.1%}" for share in row.act_clipped),
        " ".join(f"{share:.1%}" for share in row.act_zero),
    ]


@torch.no_grad()
def summary(
    model: _Model,
    batch: Any = None,
    *,
    forward: Callable[[_Model, Any], object] | None = None,
) -> Summary:
    """The quantized layers of a model: bits, scales, shares of clipped and of zero values, size.

    In the printed table a signed input scale has a ``±``; there is one a level.

    Args:
        model (nn.Module): a model from :func:`prepare_qat`.
        batch (optional): one batch, such as :func:`calibrate` takes them, for the shares of the
            inputs; the model runs in eval mode. Default: None, weights alone
        forward (callable, optional): ``forward(model, batch)`` runs the batch. Default: None

    Returns:
        Summary: a sequence of :class:`LayerSummary` with the sizes, printed as a table.

    Raises:
        RuntimeError: a batch is given, and a quantizer that it reaches was never calibrated.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from hqod_ops.quant import calibrate, prepare_qat, summary
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[0.0, 0.5], [-1.0, 0.9]]))
        >>> batch = torch.tensor([[1.0, 3.0], [0.0, 2.0]])
        >>> _ = calibrate(prepare_qat(model, "w8a8"), [batch], progress=False)
        >>> print(summary(model, batch))
        layer  type    w bits  w scale  clipped   zero  a bits  a scale  a clipped  a zero
        -----  ------  ------  -------  -------  -----  ------  -------  ---------  ------
        0      Linear       8  0.00784     0.0%  25.0%       8  0.0118   0.0%       25.0%
        1.2e-05 MB, in float 1.6e-05 MB
    """
    checks.module("model", model)
    checks.function("forward", forward)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QATLayer)}
    found = (m.input_quantizer for m in layers.values() if m.input_quantizer is not None)
    inputs = list(dict.fromkeys(found))  # several layers may share one
    shares: dict[Quantizer, list[_Share]] = {}
    if batch is not None or forward is not None:
        with evaluating(model), _counting(inputs, shares):
            call(model, batch, forward)
    rows = [_row(name, layer, shares) for name, layer in layers.items()]
    return Summary(rows, *_sizes(model, list(layers.values())))


class _Share:
    """Counts of clipped and of zero values."""

    def __init__(self) -> None:
        self._clipped: list[Tensor] = []
        self._zero: list[Tensor] = []
        self._elements = 0

    def add(self, quantizer: Quantizer, x: Tensor, level: int) -> None:
        """Count the elements of x."""
        arguments = quantizer.arguments(level)
        x = quantizer.transform(quantizer.activate(x), level)
        scale, zero_point = arguments["scale"], quantizer.effective_zero_point(level)
        shape = [1] * x.dim()
        if quantizer.ch_axis is not None:
            shape[quantizer.ch_axis] = -1
        code = (x / scale.reshape(shape)).round()
        zero = torch.zeros((), device=x.device)
        if zero_point is not None:
            zero = zero_point.reshape(shape)
            code = code + zero
        low, high = arguments["quant_min"], arguments["quant_max"]
        self._clipped.append(((code < low) | (code > high)).sum())
        self._zero.append((code.clamp(low, high) == zero).sum())
        self._elements += x.numel()

    def shares(self) -> tuple[float, float]:
        """Shares of clipped and of zero values."""
        count = max(self._elements, 1)
        return sum(n.item() for n in self._clipped) / count, sum(
            n.item() for n in self._zero
        ) / count


@contextmanager
def _counting(
    quantizers: Sequence[Quantizer], shares: dict[Quantizer, list[_Share]]
) -> Iterator[None]:
    """Count the inputs of quantizers; the levels are called one after the other."""

    def before(quantizer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(quantizer, Quantizer)
        if quantizer.calibrated:
            level = calls.get(quantizer, 0) % quantizer.levels
            calls[quantizer] = level + 1
            found = shares.setdefault(quantizer, [_Share() for _ in range(quantizer.levels)])
            found[level].add(quantizer, args[0], level)

    calls: dict[Quantizer, int] = {}
    handles = [quantizer.register_forward_pre_hook(before) for quantizer in quantizers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _row(name: str, layer: QATLayer, shares: dict[Quantizer, list[_Share]]) -> LayerSummary:
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    clipped = zero = None
    if weights is not None and weights.calibrated:
        share = _Share()
        share.add(weights, current(layer), 0)
        clipped, zero = share.shares()
    act_levels = range(inputs.levels) if inputs is not None and inputs.calibrated else range(0)
    act_shares = [s.shares() for s in shares.get(inputs, [])] if inputs is not None else []
    return LayerSummary(
        name=name,
        type=layer.float_type.__name__,
        weight_bits=FLOAT_BITS if weights is None or weights.left_out else weights.bits,
        act_bits=FLOAT_BITS if inputs is None or inputs.left_out else inputs.bits,
        act_signed=tuple(inputs.codes(level)[0] < 0 for level in act_levels) if inputs else (),
        weight_scales=(
            tuple(weights.effective_scale().tolist()) if weights and weights.calibrated else ()
        ),
        act_scales=(
            tuple(inputs.effective_scale(level).item() for level in act_levels) if inputs else ()
        ),
        weight_clipped=clipped,
        weight_zero=zero,
        act_clipped=tuple(share for share, _ in act_shares),
        act_zero=tuple(share for _, share in act_shares),
        weight_quantizer="" if weights is None else type(weights).__name__,
        act_quantizer="" if inputs is None else type(inputs).__name__,
        absorbed="" if inputs is None else inputs.activation or "",
    )


def _sizes(model: nn.Module, layers: Sequence[QATLayer]) -> tuple[float, float]:
    """Size in MB with the weights at their bits, and in float."""
    quantizers = [m for m in model.modules() if isinstance(m, Quantizer)]
    inside = {id(t) for q in quantizers for t in (*q.parameters(), *q.buffers())}
    weights: dict[Any, tuple[Tensor, int]] = {}  # a derived one in place of what it is made from
    for layer in layers:
        made_from = sources(layer)
        inside.update(map(id, made_from))
        quantizer = layer.weight_quantizer
        bits = FLOAT_BITS if quantizer is None or quantizer.left_out else quantizer.bits
        if made_from or bits != FLOAT_BITS:
            key = (
                (getattr(layer, "part", ""), *map(id, made_from)) if made_from else id(layer.weight)
            )
            weights[key] = current(layer), bits
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in inside}
    for key in weights:
        tensors.pop(key, None)
    rest = sum(t.numel() * t.element_size() for t in tensors.values())
    full = rest + sum(w.numel() * w.element_size() for w, _ in weights.values())
    packed = rest + sum(
        w.numel() * w.element_size() if bits == FLOAT_BITS else -(-w.numel() * bits // 8)
        for w, bits in weights.values()
    )
    scales = sum(getattr(q, q.values[0]).numel() for q in quantizers)
    return (packed + 4 * scales) / 1e6, full / 1e6
