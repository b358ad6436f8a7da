"""Batch normalisation with fixed running statistics."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from hqod_ops import checks

_Model = TypeVar("_Model", bound=nn.Module)


class FrozenStatistics(nn.Module):
    """Batch normalisation that is always in eval mode."""

    def train(self, mode: bool = True) -> Any:
        return super().train(False)


class FrozenBatchNorm1d(FrozenStatistics, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` with fixed running statistics."""


class FrozenBatchNorm2d(FrozenStatistics, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with fixed running statistics."""


class FrozenSyncBatchNorm(FrozenStatistics, nn.SyncBatchNorm):
    """``nn.SyncBatchNorm`` with fixed running statistics."""


_FROZEN: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: FrozenBatchNorm1d,
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.SyncBatchNorm: FrozenSyncBatchNorm,
}


def freeze_batch_norm(model: _Model, *, affine: bool = False) -> _Model:
    """Fix the running statistics of every batch normalisation, in place.

    They are used and not updated, in train mode too, whatever ``model.train()`` is told. Where the
    batch normalisations are converted to ``nn.SyncBatchNorm`` afterwards, a model prepared with
    ``batch_norm="freeze"`` follows; freeze another one after the conversion.

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
    checks.module("model", model)
    checks.flag("affine", affine)
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
