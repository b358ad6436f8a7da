"""All weights of a model quantized together, once a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hqod_ops.functional import fake_quant_foreach
from hqod_ops.quant.nn.derived import is_derived
from hqod_ops.quant.nn.layers import QATLayer
from hqod_ops.quant.nn.shared_weight import SharedWeight
from hqod_ops.quant.quantizers.base import ForeachForm
from hqod_ops.quant.quantizers.learned_scale import positive, write_back


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
        together: dict[object, tuple[list[QATLayer], list[ForeachForm]]] = {}
        for layer in self._layers:
            quantizer = layer.weight_quantizer
            assert quantizer is not None and layer.shared_weight is not None
            layer.shared_weight.close()
            if not quantizer.calibrated or not quantizer.enabled or is_derived(layer):
                continue  # the layer, if it is reached, raises the error or takes its own weight
            form = quantizer.foreach_form(layer.weight)
            if form is None:
                layer.shared_weight.open(quantizer(layer.weight))
            else:
                layers, forms = together.setdefault(form.kind, ([], []))
                layers.append(layer)
                forms.append(form)
        for layers, forms in together.values():
            _open_together(layers, forms)

    def close(self) -> None:
        """Layers quantize their weights by themselves again."""
        for layer in self._layers:
            assert layer.shared_weight is not None
            layer.shared_weight.close()


def _open_together(layers: Sequence[QATLayer], forms: Sequence[ForeachForm]) -> None:
    """Quantize weights of one kind in one call."""
    first, count = forms[0], len(forms)
    if first.written_back:
        write_back([form.scale for form in forms])
    tensors = [form.x for form in forms] + [form.scale for form in forms]
    tensors += [form.zero_point for form in forms if form.zero_point is not None]
    used = [[False] for _ in forms]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        tensors = list(_Needed.apply(used, *tensors))  # type: ignore[no-untyped-call]
    xs, scales, zero_points = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
    if first.scale_mode is not None:
        together = positive(torch.cat(scales), first.scale_mode)
        scales = list(together.split([len(scale) for scale in scales]))
    values = fake_quant_foreach(
        xs,
        scales,
        zero_points or None,
        quant_min=[form.codes[0] for form in forms],
        quant_max=[form.codes[1] for form in forms],
        ch_axis=first.ch_axis,
        grad_scale=first.grad_scale,
    )
    for layer, value, flag in zip(layers, values, used, strict=True):
        assert layer.shared_weight is not None
        layer.shared_weight.open(value.to(layer.weight.dtype), flag)


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
