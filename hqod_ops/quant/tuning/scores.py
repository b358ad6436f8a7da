"""Scores that keep their meaning: logits brought back to those of the float model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hqod_ops.quant.batches import call, check_run, evaluating
from hqod_ops.quant.nn.layers import QATLayer
from hqod_ops.quant.patterns import Patterns
from hqod_ops.quant.tuning.pairs import Followers, channel_axis, check_same, hooked
from hqod_ops.quant.tuning.predictions import prediction_layers, select
from hqod_ops.quant.tuning.running import check_unwrapped, limited, require_batches, together
from hqod_ops.quant.tuning.soft import can_learn

_Model = TypeVar("_Model", bound=nn.Module)

PRIOR = 100.0
"""A class's scale is drawn towards 1 as if by so many places where the float model is certain."""


@torch.no_grad()
def calibrate_scores(
    model: _Model,
    float_model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: Patterns | None = None,
    steps: int | None = None,
    forward: Callable[[Any, Any], object] | None = None,
) -> _Model:
    """Fit a scale and an offset of every class's logits to the float model's, and fold them in.

    ``z' = a z + b``, by least squares against the float model's logits z_f, every place weighted
    by ``sigmoid(z_f)``: scores count where there may be an object. With few such places a is drawn
    towards 1. They go into weight and bias of the prediction layer, with the scales of the weight,
    so that its codes stay; or of the batch normalisation that reads its output. Exports hold them.
    Where a weight has one scale for all channels, or powers of two, b alone is fitted.

    In a distributed run every process calls it, before the model is wrapped, with batches of its
    own or with none, and all get the same result, to the bit.

    Args:
        model (nn.Module): a calibrated model from :func:`hqod_ops.quant.prepare_qat`.
        float_model (nn.Module): the model as it was before.
        batches (iterable): of unlabelled images, as :func:`hqod_ops.quant.calibrate` takes them.
        layers (str or sequence of str, optional): names or globs of the layers that make logits.
            Default: None, the prediction layers that are known (see
            :func:`hqod_ops.quant.prepare_qat`)
        steps (int, optional): so many batches at most. Default: None, all
        forward (callable, optional): ``forward(model, batch)`` runs one batch. Default: None

    Returns:
        nn.Module: the same object.

    Raises:
        ValueError: no prediction layer is known, or a name fits none; float_model is another model;
            there was no batch; steps is less than 1.
        RuntimeError: it failed in another process.

    Source: Platt scaling (Platt, 1999), against a model's logits in place of labels.

    Example:
        >>> import copy, torch
        >>> from torch import nn
        >>> from hqod_ops.quant import calibrate, prepare_qat
        >>> from hqod_ops.quant.tuning import calibrate_scores
        >>> float_model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
        >>> batches = [torch.rand(8, 3, 8, 8)]
        >>> model = prepare_qat(copy.deepcopy(float_model), "hqod_w2a2", first="0", prediction="2")
        >>> model = calibrate(model, batches, progress=False)
        >>> def shift():
        ...     scores = [m(batches[0]).sigmoid().mean().item() for m in (model, float_model)]
        ...     return abs(scores[0] - scores[1])
        >>> before = shift()
        >>> model = calibrate_scores(model, float_model, batches, layers="2")
        >>> shift() < 0.1 * before
        True
    """
    check_run(model, batches, forward, steps=steps, float_model=float_model)
    check_unwrapped(model)
    names = prediction_layers(model) if layers is None else select("layers", model, layers)
    if not names:
        raise ValueError(
            f"layers: the prediction layers of a {type(model).__name__} are not known; name them"
        )
    kind = nn.modules.batchnorm._BatchNorm
    norms = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    places = {name: model.get_submodule(name) for name in names} | norms
    check_same(model, float_model, places)
    watch = _Logits({name: channel_axis(module) for name, module in places.items()}, set(names))

    def look() -> _Logits:
        with evaluating(model), evaluating(float_model):
            originals = {name: float_model.get_submodule(name) for name in places}
            for batch in limited(batches, steps):
                watch.start()
                with hooked(originals, before=watch.follow, after=watch.expect):
                    call(float_model, batch, forward)
                with hooked(places, after=watch.compare):
                    call(model, batch, forward)
                watch.batches += 1
        return watch

    everyone = together(look, "calibration of scores")
    require_batches(sum(part.batches for part in everyone))
    found = list(dict.fromkeys(name for part in everyone for name in part.sums))
    for name in found:
        sums = torch.stack([part.sums[name] for part in everyone if name in part.sums]).sum(0)
        _fold(places[name], sums)
    return model


@dataclass
class _Logits:
    """Weighted sums of the logits of both models, per channel: 1, q, f, q q, q f."""

    axes: dict[str, int]
    names: set[str]
    sums: dict[str, Tensor] = field(default_factory=dict)
    batches: int = 0

    def __getstate__(self) -> dict[str, Any]:
        kept = ("axes", "names", "sums", "batches")
        return {name: getattr(self, name) for name in kept}

    def start(self) -> None:
        self._followers = Followers()
        self._wanted: dict[str, list[Tensor]] = {}

    def follow(self, name: str, args: tuple[Tensor, ...]) -> None:
        self._followers.read(name, args[0])

    def expect(self, name: str, args: Any, y: Tensor) -> None:
        self._followers.made(name, y)
        if name in self._places():
            self._wanted.setdefault(name, []).append(y)

    def _places(self) -> set[str]:
        """Prediction layers, and the batch normalisations that read their outputs."""
        after = self._followers.after
        return self.names.union(*(after.get(name, set()) for name in self.names))

    def compare(self, name: str, args: Any, y: Tensor) -> None:
        if name in self._followers.after or not self._wanted.get(name):
            return
        wanted = self._wanted[name].pop(0)
        axis = self.axes[name]
        q, f = (x.movedim(axis, 0).flatten(1).double() for x in (y, wanted))
        weight = f.sigmoid()
        parts = (torch.ones_like(q), q, f, q * q, q * f)
        sums = torch.stack([(weight * part).sum(1) for part in parts]).cpu()
        self.sums[name] = self.sums[name] + sums if name in self.sums else sums


def _fold(module: Any, sums: Tensor) -> None:
    """Fit scale and offset, and put them into a layer or a batch normalisation."""
    count, q, f, qq, qf = sums
    count = count.clamp(min=1e-12)
    mean_q, mean_f = q / count, f / count
    variance = qq / count - mean_q.square()
    prior = PRIOR / count * variance.mean()
    scale = (qf / count - mean_q * mean_f + prior) / (variance + prior).clamp(min=1e-12)
    scale = scale.clamp(0.5, 2.0)
    if not _scale(module, scale):
        scale = torch.ones_like(scale)
    offset = (mean_f - scale * mean_q).to(module.weight.dtype)
    if module.bias is None:
        module.bias = nn.Parameter(torch.zeros_like(offset).to(module.weight.device))
    module.bias.mul_(scale.to(module.bias)).add_(offset.to(module.bias))


def _scale(module: Any, scale: Tensor) -> bool:
    """Multiply the channels of a module's output but for the bias; False if that cannot be."""
    weight = module.weight
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        if weight is None:
            return False
        weight.mul_(scale.to(weight))
        return True
    if isinstance(module, nn.ConvTranspose2d):
        return False
    quantizer = module.weight_quantizer if isinstance(module, QATLayer) else None
    if quantizer is not None:
        if quantizer.ch_axis is None or not can_learn(module):
            return False
        rounded = module.quantized_weight().clone()
        old, zero = quantizer.effective_scale().clone(), quantizer.effective_zero_point()
        new = old * scale.to(old)
        signed = quantizer.codes()[0] < 0
        quantizer.set_scale(new, signed, zero)
        if not torch.allclose(quantizer.effective_scale(), new):
            quantizer.set_scale(old, signed, zero)
            return False
    factor = scale.to(weight).view(-1, *[1] * (weight.dim() - 1))
    weight.mul_(factor)
    if quantizer is not None:
        # Where a weight is halfway between two codes the product may be rounded the other way.
        step = quantizer.effective_scale().view_as(factor)
        other = (module.quantized_weight() - rounded * factor).abs() > 0.5 * step
        weight.copy_(torch.where(other, rounded * factor, weight))
    return True
