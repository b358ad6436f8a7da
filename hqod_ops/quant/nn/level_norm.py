"""AQD's batch normalisation for shared heads: convolutions for all levels, a norm for each.

Source: AQD (arXiv:2007.06919), the multi-level batch normalisation; nothing else of AQD.
"""

from __future__ import annotations

import copy
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import Tensor, nn

from hqod_ops import checks
from hqod_ops.quant.patterns import Patterns
from hqod_ops.quant.quantizers.calls import CountsCalls, in_backward
from hqod_ops.quant.runtime import track_calls

_Model = TypeVar("_Model", bound=nn.Module)


class LevelBatchNorm2d(CountsCalls):
    """A batch normalisation for each level that a shared head is called on.

    The levels of a feature pyramid differ in their statistics; one batch normalisation for all of
    them would fit none. The calls of a forward pass use the ``levels`` in turn, from the start of
    the forward pass of a model prepared by :func:`hqod_ops.quant.prepare_qat` or
    :func:`use_level_batch_norm`; without these, from the call after that of the last level. When
    activation checkpointing repeats a call, its level is that of the call whose input had the same
    shape.

    It goes wherever a norm layer does, so that a float model can be trained with it first:
    ``RetinaNetHead(..., norm_layer=partial(LevelBatchNorm2d, levels=5))``.

    Args:
        num_features (int): number of channels.
        levels (int): number of levels.
        eps (float), momentum (float, optional): see ``nn.BatchNorm2d``. Default: 1e-5, 0.1

    Raises:
        ValueError: levels is less than 1.

    Example:
        >>> import torch
        >>> from hqod_ops.quant import LevelBatchNorm2d
        >>> norm = LevelBatchNorm2d(4, levels=2)
        >>> small = [norm(torch.randn(2, 4, size, size)).shape[-1] for size in (8, 4)]
        >>> small, len(norm.norms)
        ([8, 4], 2)
    """

    def __init__(
        self, num_features: int, levels: int, eps: float = 1e-5, momentum: float | None = 0.1
    ) -> None:
        super().__init__()
        if levels < 1:
            raise ValueError(f"levels: expected at least 1, got {levels}")
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(num_features, eps, momentum) for _ in range(levels)
        )

    def forward(self, x: Tensor) -> Tensor:
        levels = len(self.norms)
        if len(self._calls) == levels and not in_backward():
            self.reset_level()
        level = self._calls.next_level(x.shape, levels, type(self).__name__)
        output: Tensor = self.norms[level](x)
        return output


def use_level_batch_norm(model: _Model, pattern: Patterns, levels: int) -> _Model:
    """Replace norm layers of a float model by :class:`LevelBatchNorm2d`, in place.

    Args:
        model (nn.Module): the model that the training loop calls; its forward pass starts the count
            of levels.
        pattern (str or sequence of str): names or globs of ``BatchNorm2d`` and ``GroupNorm``
            layers; every level starts as a copy of a batch normalisation, or with the weight and
            bias of a group normalisation.
        levels (int): number of levels.

    Returns:
        nn.Module: the same object.

    Raises:
        ValueError: a pattern fits no such layer, or levels is less than 1.

    Example:
        >>> from torch import nn
        >>> from hqod_ops.quant import use_level_batch_norm
        >>> head = nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.ReLU())
        >>> len(use_level_batch_norm(head, "1", levels=5)[1].norms)
        5
    """
    checks.module("model", model)
    checks.count("levels", levels)
    norms = {n: m for n, m in model.named_modules() if type(m) in (nn.BatchNorm2d, nn.GroupNorm)}
    patterns = checks.names("pattern", pattern)
    for entry in patterns:
        if not any(fnmatchcase(name, entry) for name in norms):
            raise ValueError(
                f"pattern: no BatchNorm2d or GroupNorm fits {entry!r}; "
                f"there are {', '.join(map(repr, norms)) or 'none'}"
            )
    for name, norm in norms.items():
        if any(fnmatchcase(name, entry) for entry in patterns):
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, _per_level(norm, levels))
    track_calls(model)
    return model


def _per_level(norm: nn.Module, levels: int) -> LevelBatchNorm2d:
    features = norm.num_features if isinstance(norm, nn.BatchNorm2d) else norm.num_channels
    assert isinstance(features, int)
    made = LevelBatchNorm2d(features, levels)
    for level in range(levels):
        if isinstance(norm, nn.BatchNorm2d):
            made.norms[level] = copy.deepcopy(norm)
        else:
            made.norms[level].load_state_dict(norm.state_dict(), strict=False)
    # A group normalisation has no statistics to bring a device and a dtype along.
    return made.to(next(norm.parameters(), torch.empty(0)))
