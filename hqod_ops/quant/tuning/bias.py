"""Bias correction: the mean error that quantization leaves in every channel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hqod_ops.quant.batches import call, check_run, evaluating
from hqod_ops.quant.tuning.moments import Moments, channel_moments, merged
from hqod_ops.quant.tuning.pairs import (
    Followers,
    channel_axis,
    check_same,
    hooked,
    quantized_layers,
)
from hqod_ops.quant.tuning.running import check_unwrapped, limited, require_batches, together

_Model = TypeVar("_Model", bound=nn.Module)


@torch.no_grad()
def correct_bias(
    model: _Model,
    float_model: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int | None = None,
    forward: Callable[[Any, Any], object] | None = None,
) -> _Model:
    """Add the mean error of every layer's output, channel by channel, to its bias.

    ``b' = b + mean(y_float - y)``, over all batches and processes and, of a layer shared by
    several levels, over the values of all its calls. A layer whose output goes into a batch
    normalisation is corrected behind that, in the bias of the batch normalisation, so that the
    order of this and :func:`reestimate_batch_norm` does not matter. Other layers without a bias get
    one, which state dicts and exports then hold: make an optimizer afterwards.

    Every layer sees inputs that are corrected already: in one pass over the batches the mean error
    within a batch is taken away behind each layer.

    In a distributed run every process calls it, before the model is wrapped, with batches of its
    own or with none, and all get the same biases, to the bit.

    Args:
        model (nn.Module): a calibrated model from :func:`hqod_ops.quant.prepare_qat`.
        float_model (nn.Module): the model as it was before.
        batches (iterable): of unlabelled images, as :func:`hqod_ops.quant.calibrate` takes them.
        steps (int, optional): so many batches at most. Default: None, all
        forward (callable, optional): ``forward(model, batch)`` runs one batch. Default: None

    Returns:
        nn.Module: the same object.

    Raises:
        ValueError: the model is not prepared, or wrapped in ``DistributedDataParallel``; the float
            model is another one (naming the first layer that differs), or calls a layer another
            number of times; there was no batch; steps is less than 1.
        TypeError: float_model is no module.
        RuntimeError: a quantizer was never calibrated, or it failed in another process.

    Source: data-free quantization (arXiv:1906.04721), section 4.2, with data, as in its appendix D.

    Example:
        >>> import copy, torch
        >>> from torch import nn
        >>> from hqod_ops.quant import calibrate, prepare_qat
        >>> from hqod_ops.quant.tuning import correct_bias
        >>> float_model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False))
        >>> batches = [torch.rand(4, 3, 8, 8)]
        >>> model = prepare_qat(copy.deepcopy(float_model), "hqod_w2a2", first=(), prediction=())
        >>> model = correct_bias(calibrate(model, batches, progress=False), float_model, batches)
        >>> error = float_model(batches[0]) - model(batches[0])
        >>> bool(error.mean(dim=(0, 2, 3)).abs().max() < 1e-6)
        True
    """
    check_run(model, batches, forward, steps=steps, float_model=float_model)
    check_unwrapped(model)
    places: dict[str, nn.Module] = {
        **quantized_layers(model),
        **{
            n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
        },
    }
    check_same(model, float_model, places)
    watch = _Watch({name: channel_axis(module) for name, module in places.items()})
    originals = {name: float_model.get_submodule(name) for name in places}

    def look() -> _Watch:
        with evaluating(model), evaluating(float_model):
            for batch in limited(batches, steps):
                watch.start()
                with hooked(originals, before=watch.follow, after=watch.expect):
                    call(float_model, batch, forward)
                with hooked(places, after=watch.correct):
                    call(model, batch, forward)
                watch.finish()
        return watch

    everyone = together(look, "bias correction")
    require_batches(sum(part.batches for part in everyone))
    for name, module in places.items():
        error = merged(part.errors[name] for part in everyone if name in part.errors)
        if error.count and bool(error.mean.any()):
            _shift(module, error.mean)
    return model


@dataclass
class _Watch:
    """The mean errors, and the float model's means in the current batch."""

    axes: dict[str, int]
    errors: dict[str, Moments] = field(default_factory=dict)
    batches: int = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"axes": self.axes, "errors": self.errors, "batches": self.batches}

    def start(self) -> None:
        self._followers = Followers()
        self._means: dict[str, list[Tensor]] = {}
        self._calls: dict[str, int] = {}

    def follow(self, name: str, args: tuple[Tensor, ...]) -> None:
        self._followers.read(name, args[0])

    def expect(self, name: str, args: Any, y: Tensor) -> None:
        self._means.setdefault(name, []).append(channel_moments(y, self.axes[name])[1])
        self._followers.made(name, y)

    def correct(self, name: str, args: Any, y: Tensor) -> Tensor | None:
        place = self._calls.get(name, 0)
        self._calls[name] = place + 1
        means = self._means.get(name, [])
        if place >= len(means):
            raise ValueError(
                f"float_model: expected the model that was prepared, but it calls {name!r} "
                f"{len(means)} times, not more"
            )
        # What a batch normalisation reads is corrected behind it.
        if name in self._followers.after or not y.numel():
            return None
        axis = self.axes[name]
        count, mean, _ = channel_moments(y, axis)
        error = means[place] - mean
        self.errors.setdefault(name, Moments()).add(count, error, torch.zeros_like(error))
        shape = [1] * y.dim()
        shape[axis] = -1
        return y + error.to(y.dtype).view(shape)

    def finish(self) -> None:
        self.batches += 1


def _shift(module: Any, shift: Tensor) -> None:
    """Add to the output of a layer or of a batch normalisation."""
    if module.bias is not None:
        module.bias.add_(shift.to(module.bias))
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        if module.running_mean is not None and module.running_var is not None:
            deviation = (module.running_var + module.eps).sqrt()
            module.running_mean.sub_(shift.to(deviation) * deviation)
    else:
        bias = nn.Parameter(shift.to(module.weight))
        module.bias = bias.requires_grad_(module.weight.requires_grad)
