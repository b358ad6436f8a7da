"""Batch normalisations folded into the layers before them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from hqod_ops import checks
from hqod_ops.quant.batches import call, evaluating
from hqod_ops.quant.dataflow.run import run_dataflow
from hqod_ops.quant.nn.derived import current, rewrite
from hqod_ops.quant.nn.layers import float_class
from hqod_ops.quant.nn.twins import TWINS

_Model = TypeVar("_Model", bound=nn.Module)


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
    checks.module("model", model)
    checks.function("forward", forward)
    norms = {name: m for name, m in model.named_modules() if _can_fold(m)}
    pairs = _pairs(model, list(norms.values()), batch, forward)
    problems = {norm: _fold(layer, norm) for norm, layer in pairs.items()}
    pairs = {norm: layer for norm, layer in pairs.items() if problems[norm] is None}
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child in pairs:
                setattr(parent, name, nn.Identity())
    for name, module in norms.items():
        if problems.get(module) is not None:
            warnings.warn(
                f"{name}: the batch normalisation stays: of the layer before, {problems[module]}",
                stacklevel=2,
            )
    left = [name for name, module in norms.items() if module not in problems]
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
    layers = [m for m in model.modules() if float_class(m) in TWINS]
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    with torch.no_grad(), evaluating(model):
        flow = run_dataflow(model, {*layers, *norms}, lambda: call(model, batch, forward))
    readers: dict[nn.Module | str, set[nn.Module | None]] = {}
    for site, found in flow.readers.items():
        readers.setdefault(site.what, set()).update(found)
    return {
        norm: layer
        for norm in norms
        for layer in layers
        if {read.site and read.site.what for read in flow.reads.get(norm, ())} == {layer}
        and readers[layer] == {norm}
        and all(owners[id(p)] == 1 for p in layer.parameters())
    }


@torch.inference_mode(False)
@torch.no_grad()
def _fold(layer: Any, norm: Any) -> str | None:
    """Fold a batch normalisation into a layer, or say why that cannot be."""
    factor = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * current(norm, "weight")
    shift = -norm.running_mean * factor
    if norm.bias is not None:
        shift = shift + current(norm, "bias")
    axis = TWINS[float_class(layer)].weight_ch_axis
    groups = layer.groups if axis == 1 else 1  # of a transposed convolution, which counts within
    weight = current(layer)
    shape = [1] * weight.dim()
    shape[axis] = -1
    weights = weight.chunk(groups)
    factors = [part.reshape(shape) for part in factor.chunk(groups)]
    folded = torch.cat([w * f for w, f in zip(weights, factors, strict=True)])
    problem = rewrite(layer, "weight", folded)
    if problem is not None:
        return problem
    if layer.bias is None:
        layer.bias = nn.Parameter(shift.to(weight))
        return None
    problem = rewrite(layer, "bias", current(layer, "bias") * factor + shift)
    if problem is not None:
        rewrite(layer, "weight", weight)
    return problem
