"""All weights of a model quantized together, once a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hqod_ops.functional import fake_quant_foreach
from hqod_ops.quant.nn.layers import QATLayer
from hqod_ops.quant.nn.shared_weight import SharedWeight
from hqod_ops.quant.quantizers.base import Quantizer
from hqod_ops.quant.quantizers.learned_scale import fold, folds, positive
from hqod_ops.quant.quantizers.lsq import LSQ


class WeightPool:
    """Quantizes the weights of a prepared model at the start of its forward pass.

    Args:
        layers (sequence of QATLayer): those with a quantizer of the weight.
    """

    def __init__(self, layers: Sequence[QATLayer]) -> None:
        self._layers = tuple(layers)
        for layer in self._layers:
            layer.shared_weight = SharedWeight()

    def open(self) -> None:
        """Quantize; the layers' calls take the results until :meth:`close`."""
        together: dict[_Kind, list[_Entry]] = {}
        for layer in self._layers:
            quantizer = layer.weight_quantizer
            assert quantizer is not None and layer.shared_weight is not None
            layer.shared_weight.close()
            if not quantizer.calibrated or not quantizer.enabled:
                continue  # the layer, if it is reached, raises the error or takes its own weight
            if quantizer.plain:
                kind, entry = _entry(layer, quantizer)
                together.setdefault(kind, []).append(entry)
            else:
                layer.shared_weight.open(quantizer(layer.weight))
        for kind, entries in together.items():
            _open_together(kind, entries)

    def close(self) -> None:
        """Layers quantize their weights by themselves again."""
        for layer in self._layers:
            assert layer.shared_weight is not None
            layer.shared_weight.close()


class _Kind(NamedTuple):
    """What the weights of one call have in common."""

    dtype: torch.dtype
    device: torch.device
    ch_axis: int | None
    grad_scale: float | str | None
    shifted: bool
    scale_mode: str | None
    """How LSQ's parameters become scales, all in one; None where the scales are at hand."""
    folds: bool
    """Whether the scales are LSQ's parameters themselves, which are to be folded first."""


class _Entry(NamedTuple):
    """A weight of such a call."""

    layer: QATLayer
    x: Tensor
    scale: Tensor
    zero_point: Tensor | None
    codes: tuple[int, int]


def _entry(layer: QATLayer, quantizer: Quantizer) -> tuple[_Kind, _Entry]:
    if type(quantizer) is LSQ:
        x, scale = layer.weight, quantizer.get_parameter("scale")
        folded = folds(quantizer, quantizer.scale_mode)
        mode = None if folded else quantizer.scale_mode
        kind = _Kind(
            x.dtype, x.device, quantizer.ch_axis, quantizer.grad_scale, False, mode, folded
        )
        return kind, _Entry(layer, x, scale, None, quantizer.codes())
    x, arguments = quantizer.transform(layer.weight), quantizer.arguments()
    zero_point, axis = arguments.get("zero_point"), arguments["ch_axis"]
    shifted, grad_scale = zero_point is not None, arguments.get("grad_scale")
    kind = _Kind(x.dtype, x.device, axis, grad_scale, shifted, None, False)
    codes = arguments["quant_min"], arguments["quant_max"]
    return kind, _Entry(layer, x, arguments["scale"], zero_point, codes)


def _open_together(kind: _Kind, entries: Sequence[_Entry]) -> None:
    if kind.folds:
        fold([entry.scale for entry in entries])
    tensors = [entry.x for entry in entries] + [entry.scale for entry in entries]
    tensors += [entry.zero_point for entry in entries if entry.zero_point is not None]
    used = [[False] for _ in entries]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        tensors = list(_Needed.apply(used, *tensors))  # type: ignore[no-untyped-call]
    count = len(entries)
    xs, scales, zero_points = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
    if kind.scale_mode is not None:
        together = positive(torch.cat(scales), kind.scale_mode)
        scales = list(together.split([len(scale) for scale in scales]))
    values = fake_quant_foreach(
        xs,
        scales,
        zero_points if kind.shifted else None,
        quant_min=[entry.codes[0] for entry in entries],
        quant_max=[entry.codes[1] for entry in entries],
        ch_axis=kind.ch_axis,
        grad_scale=kind.grad_scale,
    )
    for entry, value, flag in zip(entries, values, used, strict=True):
        assert entry.layer.shared_weight is not None
        entry.layer.shared_weight.open(value.to(entry.layer.weight.dtype), flag)


class _Needed(torch.autograd.Function):
    """The tensors as they are; those without use get no gradient, where the op would give zeros.

    A layer that control flow has left out must look so to the optimizer.
    """

    @staticmethod
    def forward(ctx: Any, used: list[list[bool]], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.used = used * (len(tensors) // len(used))
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(g if used[0] else None for g, used in zip(grads, ctx.used, strict=True))
