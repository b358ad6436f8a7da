"""Batch normalisations whose running statistics are those of the quantized model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hqod_ops.quant.batches import call, check_run, evaluating
from hqod_ops.quant.tuning.moments import Moments, channel_moments, merged
from hqod_ops.quant.tuning.pairs import check_same, hooked
from hqod_ops.quant.tuning.running import limited, network, require_batches, together

_Model = TypeVar("_Model", bound=nn.Module)


@torch.no_grad()
def reestimate_batch_norm(
    model: _Model,
    batches: Iterable[Any],
    *,
    float_model: nn.Module | None = None,
    steps: int | None = None,
    forward: Callable[[Any, Any], object] | None = None,
) -> _Model:
    """Set the running statistics of every batch normalisation to those of the quantized model.

    Quantizing weights and inputs changes mean and variance of every layer's output, and running
    statistics from before are wrong by that. They become, over all values that a batch
    normalisation is given in all batches, in all processes,

    ``mean = sum(x) / n``, ``var = (sum(x^2) / n - mean^2) n / (n - 1)``

    While they are collected, every batch normalisation normalises by its batch, so that one pass is
    enough, and everything else is in eval mode; modes and momentum stay as they were. Those that
    were frozen (:func:`hqod_ops.quant.freeze_batch_norm`) and those that no batch reached are left
    as they are. Those of a :class:`hqod_ops.quant.LevelBatchNorm2d` have a level each.

    Statistics of a few hundred images are not those of the training set, and that alone can cost
    more than 8 bits do. With the float model they are such that what a batch normalisation puts out
    has the mean and variance that the float model's has on the same images: the chance of which
    images these are cancels. With ``m_f, v_f`` the running statistics of the float model,
    ``mean_f, var_f`` those of these images in it, and e the norm's eps:

    ``var' + e = (var + e) (v_f + e) / (var_f + e)``,
    ``mean' = mean - (mean_f - m_f) sqrt((var' + e) / (v_f + e))``

    In a distributed run every process calls it, with batches of its own or with none, and all get
    the same statistics, to the bit.

    Args:
        model (nn.Module): calibrated, or float.
        batches (iterable): of unlabelled images, as :func:`hqod_ops.quant.calibrate` takes them. A
            batch should hold several images: its own statistics normalise it.
        float_model (nn.Module, optional): the model as it was before
            :func:`hqod_ops.quant.prepare_qat`. Default: None
        steps (int, optional): so many batches at most. Default: None, all
        forward (callable, optional): ``forward(model, batch)`` runs one batch. Default: None

    Returns:
        nn.Module: the same object; with a warning where it has no batch normalisation to estimate.

    Raises:
        ValueError: there was no batch in any process, steps is less than 1, a batch normalisation
            met values that are not finite (naming it), or float_model is another model.
        RuntimeError: it failed in another process.

    Source: precise batch normalisation (arXiv:2105.07576), section 3; for quantized networks
    arXiv:1906.03193.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from hqod_ops.quant.tuning import reestimate_batch_norm
        >>> model = nn.Sequential(nn.BatchNorm2d(1)).eval()
        >>> batch = torch.tensor([[[[1.0, 3.0]]], [[[5.0, 7.0]]]])
        >>> reestimate_batch_norm(model, [batch])[0].running_mean
        tensor([4.])
    """
    check_run(model, batches, forward, steps=steps, float_model=float_model)
    inner = network(model)
    norms = estimated_norms(inner)
    if not norms:
        warnings.warn(
            "reestimate_batch_norm: the model has no batch normalisation whose statistics are not "
            "frozen; nothing was done",
            stacklevel=2,
        )
        return model
    if float_model is not None:
        check_same(inner, float_model, norms)
    batches = limited(batches, steps)
    own = {name: Moments() for name in norms}
    others = {name: Moments() for name in norms}

    def look() -> tuple[int, dict[str, Moments], dict[str, Moments]]:
        seen = 0
        with evaluating(inner), ExitStack() as stack:
            reference = None
            if float_model is not None:
                stack.enter_context(evaluating(float_model))
                reference = _Reference(float_model, norms, others)
            stack.enter_context(batch_statistics(norms, own, reference))
            for batch in batches:
                if reference is not None:
                    reference.run(batch, forward)
                call(inner, batch, forward)
                seen += 1
        return seen, own, others

    everyone = together(look, "re-estimation")
    seen = require_batches(sum(part[0] for part in everyone))
    total = {name: merged(part[1][name] for part in everyone) for name in norms}
    for name, moments in total.items():
        if moments.count and not bool(moments.var.isfinite().all()):
            raise ValueError(f"{name}: expected finite inputs, their mean or variance is not")
    for name, moments in total.items():
        if moments.count > 1:
            mean, var = moments.mean, moments.var * (moments.count / (moments.count - 1))
            if float_model is not None:
                reference = merged(part[2][name] for part in everyone)
                mean, var = _matched(mean, var, reference, float_model.get_submodule(name))
            _set(norms[name], mean, var, seen)
    return model


def _set(norm: Any, mean: Tensor, var: Tensor, batches: int) -> None:
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.fill_(batches)


def _matched(mean: Tensor, var: Tensor, seen: Moments, norm: Any) -> tuple[Tensor, Tensor]:
    """The statistics that give these values the mean and variance of the float model's."""
    trained = norm.running_var.cpu().double() + norm.eps
    scaled = (var + norm.eps) * trained / (seen.var + norm.eps)
    shift = (seen.mean - norm.running_mean.cpu().double()) * (scaled / trained).sqrt()
    return mean - shift, (scaled - norm.eps).clamp(min=0)


class _Reference:
    """The moments that the float model's batch normalisations are given, call by call."""

    def __init__(
        self, model: nn.Module, names: Iterable[str], found: Mapping[str, Moments]
    ) -> None:
        self._model, self._found = model, found
        self._norms = {name: model.get_submodule(name) for name in names}
        self._seen: dict[str, list[tuple[int, Tensor, Tensor]]] = {}

    def run(self, batch: Any, forward: Callable[[Any, Any], object] | None) -> None:
        """A batch through the float model."""
        self._seen = {name: [] for name in self._norms}
        with hooked(self._norms, before=self._before):
            call(self._model, batch, forward)

    def _before(self, name: str, args: tuple[Tensor, ...]) -> None:
        self._seen[name].append(channel_moments(args[0]))

    def take(self, name: str, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """What the next call of a batch normalisation is to subtract and to divide by."""
        if not self._seen[name]:
            raise ValueError(
                "float_model: expected the model that was prepared, but it calls "
                f"{name!r} less often"
            )
        count, other_mean, other_var = self._seen[name].pop(0)
        self._found[name].add(count, other_mean, other_var)
        seen = Moments()
        seen.add(1, other_mean, other_var)
        found = _matched(mean.cpu().double(), var.cpu().double(), seen, self._norms[name])
        return found[0].to(mean), found[1].to(var)


def estimated_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The batch normalisations with running statistics that are not frozen, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and getattr(module, "running_mean", None) is not None
        and not _frozen(module)
    }


def _frozen(norm: nn.Module) -> bool:
    """Whether it stays in eval mode when it is told to train."""
    training = norm.training
    frozen = not norm.train(True).training
    norm.training = training
    return frozen


@contextmanager
def batch_statistics(
    norms: Mapping[str, nn.Module],
    found: Mapping[str, Moments] | None = None,
    reference: _Reference | None = None,
) -> Iterator[None]:
    """Let batch normalisations in eval mode normalise by their batch.

    Args:
        norms (mapping of str to nn.Module): by name; of modules that have several, one suffices.
        found (mapping of str to Moments, optional): collects what they were given. Default: None
        reference (optional): the float model, which has run the same batch. Default: None
    """

    def hook(name: str) -> Callable[[Any, tuple[Tensor, ...], Tensor], Tensor]:
        def after(norm: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = args[0]
            if x.numel() <= x.shape[1]:  # one value a channel has no variance
                return output
            count, mean, var = channel_moments(x)
            if found is not None:
                found[name].add(count, mean, var)
            if reference is not None:
                mean, var = reference.take(name, mean, var)
            return F.batch_norm(x, mean, var, norm.weight, norm.bias, False, 0.0, norm.eps)

        return after

    handles = [norm.register_forward_hook(hook(name)) for name, norm in norms.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
