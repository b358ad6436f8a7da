"""Batch normalisation in a QAT model: trained as it is, frozen, or folded into the convolutions."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hqod_ops.quant.batches import call, evaluating
from hqod_ops.quant.nn.layers import TWINS

_Model = TypeVar("_Model", bound=nn.Module)


class _FrozenStatistics(nn.Module):
    """Batch normalisation that is always in eval mode."""

    def train(self, mode: bool = True) -> Any:
        return super().train(False)


class FrozenBatchNorm1d(_FrozenStatistics, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` with fixed running statistics."""


class FrozenBatchNorm2d(_FrozenStatistics, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with fixed running statistics."""


class FrozenSyncBatchNorm(_FrozenStatistics, nn.SyncBatchNorm):
    """``nn.SyncBatchNorm`` with fixed running statistics."""


_FROZEN: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: FrozenBatchNorm1d,
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.SyncBatchNorm: FrozenSyncBatchNorm,
}


def freeze_batch_norm(model: _Model, *, affine: bool = False) -> _Model:
    """Fix the running statistics of every batch normalisation, in place.

    They are used and not updated, in train mode too, whatever ``model.train()`` is told.

    Args:
        model (nn.Module): its ``BatchNorm1d``, ``BatchNorm2d`` and ``SyncBatchNorm`` are changed,
            with the same parameters and names.
        affine (bool): fix their weight and bias too. Default: False, these train

    Returns:
        nn.Module: the same object.

    Raises:
        ValueError: a batch normalisation has no running statistics.

    Example:
        >>> from torch import nn
        >>> from hqod_ops.quant import freeze_batch_norm
        >>> model = freeze_batch_norm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
        >>> type(model.train()[1]).__name__
        'FrozenBatchNorm2d'
    """
    found = {name: m for name, m in model.named_modules() if type(m) in _FROZEN}
    for name, module in found.items():
        if getattr(module, "running_mean", None) is None:
            raise ValueError(f"{name}: expected running statistics to freeze, it has none")
    for module in found.values():
        module.__class__ = _FROZEN[type(module)]
        module.train(False)
        if affine:
            for parameter in module.parameters():
                parameter.requires_grad_(False)
    return model


def fold_batch_norm(
    model: _Model, batch: Any, *, forward: Callable[[_Model, Any], object] | None = None
) -> _Model:
    """Fold batch normalisations into the convolutions and linear layers before them, in place.

    ``w' = w g / sqrt(var + eps)`` and ``b' = (b - mean) g / sqrt(var + eps) + beta``, with the
    running statistics. Which layer is before which is seen in one run of the model, so that any
    control flow works. A batch normalisation is folded where all its inputs are outputs of one
    layer which nothing else reads; it becomes an ``nn.Identity``, and the layer gets a bias if it
    had none. The others stay, with a warning that names them. Fold a float model, before
    :func:`hqod_ops.quant.prepare_qat`.

    Args:
        model (nn.Module): a float model with its trained statistics.
        batch: one batch for it; what of it the model is called with: see
            :func:`hqod_ops.quant.calibrate`.
        forward (callable, optional): ``forward(model, batch)`` runs it. Default: None

    Returns:
        nn.Module: the same object; in eval mode it computes what it did.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from hqod_ops.quant import fold_batch_norm
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> fold_batch_norm(model, torch.rand(1, 3, 8, 8))
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        )
    """
    norms = {name: m for name, m in model.named_modules() if _can_fold(m)}
    pairs = _pairs(model, list(norms.values()), batch, forward)
    for module in norms.values():
        if module in pairs:
            _fold(pairs[module], module)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child in pairs:
                setattr(parent, name, nn.Identity())
    left = [name for name, module in norms.items() if module not in pairs]
    if left:
        warnings.warn(
            "batch normalisations without one layer of their own before them stay: "
            + ", ".join(left),
            stacklevel=2,
        )
    return model


def _can_fold(module: nn.Module) -> bool:
    frozen = type(module).__name__ == "FrozenBatchNorm2d"  # torchvision's, which holds buffers
    return (isinstance(module, nn.modules.batchnorm._BatchNorm) or frozen) and (
        getattr(module, "running_mean", None) is not None
    )


def _pairs(
    model: _Model,
    norms: list[nn.Module],
    batch: Any,
    forward: Callable[[_Model, Any], object] | None,
) -> dict[nn.Module, nn.Module]:
    """The layer to fold each batch normalisation into."""
    layers = [m for m in model.modules() if type(m) in TWINS]
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    watch = _Watch()
    with torch.no_grad(), evaluating(model), watch.hooks(layers, norms), watch:
        watch.read(call(model, batch, forward))
    return {
        norm: sources[0]
        for norm, sources in watch.sources.items()
        if sources[0] is not None
        and all(source is sources[0] for source in sources)
        and watch.readers[sources[0]] == {norm}
        and all(owners[id(p)] == 1 for p in sources[0].parameters(recurse=False))
    }


class _Watch(TorchFunctionMode):
    """Watches where the outputs of layers go."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: dict[nn.Module, list[Any]] = {}
        """The layers whose outputs a batch normalisation was called with; None for another one."""
        self.readers: dict[nn.Module, set[Any]] = {}
        """What read a layer's outputs: batch normalisations, or None for anything else."""
        # The outputs are held, so that no later tensor gets the id of one of them.
        self._outputs: dict[int, tuple[nn.Module, Tensor]] = {}
        self._inside: nn.Module | None = None

    @contextmanager
    def hooks(self, layers: list[nn.Module], norms: list[nn.Module]) -> Iterator[None]:
        handles = [m.register_forward_hook(self._after_layer) for m in layers]
        for module in norms:
            handles.append(module.register_forward_pre_hook(self._before_norm))
            handles.append(module.register_forward_hook(self._after_norm))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._outputs.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # Looking at a shape is no use of the values.
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            self.read((args, kwargs), self._inside)
        return result

    def read(self, values: Any, reader: nn.Module | None = None) -> None:
        """Note that something, or a batch normalisation, reads these values."""
        for leaf in tree_leaves(values):
            found = self._outputs.get(id(leaf)) if isinstance(leaf, Tensor) else None
            if found is not None:
                self.readers[found[0]].add(reader)

    def _after_layer(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._outputs[id(output)] = module, output
        self.readers.setdefault(module, set())

    def _before_norm(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found = self._outputs.get(id(args[0]))
        self.sources.setdefault(module, []).append(None if found is None else found[0])
        self._inside = module

    def _after_norm(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inside = None


@torch.no_grad()
def _fold(layer: Any, norm: Any) -> None:
    factor = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight
    shift = -norm.running_mean * factor
    if norm.bias is not None:
        shift = shift + norm.bias
    axis = TWINS[type(layer)].weight_ch_axis
    groups = layer.groups if axis == 1 else 1  # of a transposed convolution, which counts within
    shape = [1] * layer.weight.dim()
    shape[axis] = -1
    weights = layer.weight.chunk(groups)
    factors = [part.reshape(shape) for part in factor.chunk(groups)]
    layer.weight.copy_(torch.cat([w * f for w, f in zip(weights, factors, strict=True)]))
    if layer.bias is None:
        layer.bias = nn.Parameter(shift.to(layer.weight))
    else:
        layer.bias.copy_(layer.bias * factor + shift)
