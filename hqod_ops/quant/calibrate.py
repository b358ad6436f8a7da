"""calibrate: the first scales, from weights and data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hqod_ops.quant.layers import QATLayer
from hqod_ops.quant.quantizer import Quantizer, reset_levels

_Model = TypeVar("_Model", bound=nn.Module)


@torch.no_grad()
def calibrate(
    model: _Model,
    batches: Iterable[Any],
    *,
    forward: Callable[[_Model, Any], object] | None = None,
    progress: bool = True,
) -> _Model:
    """Set every scale of a prepared model, from its weights and from the inputs of its layers.

    The model runs over the batches in eval mode, with fake quantization off; then scales, signs of
    the inputs and numbers of levels are set, whatever they were before. The scales of the weights
    are set here too, so load a float checkpoint before.

    Batches should be training images, 256 in the official code, on the device of the model. In a
    distributed run, calibrate in one process and load its state_dict in the others, before wrapping
    the model.

    Args:
        model (nn.Module): a model from :func:`prepare_qat`.
        batches (iterable): of batches. Without a ``forward``, each is passed to the model as it is,
            of a tuple or list the first entry, a list of images (Tensor[C, H, W]) as a whole.
        forward (callable, optional): ``forward(model, batch)`` runs one batch. Default: None
        progress (bool): show a bar, if rich is installed. Default: True

    Returns:
        nn.Module: the same object, in the training or eval mode it had.

    Raises:
        ValueError: the model is not prepared, there was no batch, a layer was never reached (naming
            it), or its input held NaN. The scales are then as they were.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from hqod_ops.quant import calibrate, prepare_qat
        >>> model = prepare_qat(nn.Sequential(nn.Conv2d(3, 8, 3)), "w8a8")
        >>> model = calibrate(model, [torch.rand(1, 3, 8, 8)], progress=False)
        >>> model[0].input_quantizer.codes()
        (0, 255)
    """
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, QATLayer)
    }
    if not layers:
        raise ValueError("model: expected a model from prepare_qat, it has no quantized layer")
    weights = _quantizers(layers, "weight_quantizer")
    inputs = _quantizers(layers, "input_quantizer")
    weight_scales = {name: _weight_scale(q, layers[name].weight) for name, q in weights.items()}
    training = {module: module.training for module in model.modules()}
    enabled = {quantizer: quantizer.enabled for quantizer in weights.values()}
    try:
        model.eval()
        for quantizer in weights.values():
            quantizer.enabled = False
        for quantizer in inputs.values():
            quantizer.start_observing()
        if inputs:
            _run(model, batches, forward, progress)
        input_scales = {name: _input_scale(name, q) for name, q in inputs.items()}
    finally:
        for quantizer in inputs.values():
            quantizer.stop_observing()
        for quantizer, flag in enabled.items():
            quantizer.enabled = flag
        for module, mode in training.items():
            module.training = mode
    for name, quantizer in weights.items():
        quantizer.set_scale(*weight_scales[name])
    for name, quantizer in inputs.items():
        quantizer.set_scale(*input_scales[name])
    return model


def _quantizers(layers: dict[str, QATLayer], kind: str) -> dict[str, Quantizer]:
    found = {name: getattr(layer, kind) for name, layer in layers.items()}
    return {name: quantizer for name, quantizer in found.items() if quantizer is not None}


def _weight_scale(quantizer: Quantizer, weight: Tensor) -> tuple[Tensor, list[bool]]:
    quantizer.start_observing()
    try:
        quantizer(weight)
        observed = quantizer.observed_scale()
    finally:
        quantizer.stop_observing()
    if observed is None:
        raise ValueError(f"{quantizer.label}: expected a weight, got an empty tensor")
    return observed


def _input_scale(name: str, quantizer: Quantizer) -> tuple[Tensor, list[bool]]:
    observed = quantizer.observed_scale()
    if observed is None:
        raise ValueError(
            f"{name}: no data reached this layer in calibration; give a forward that runs it, or "
            f"leave it out with Rule({name!r}, skip=True)"
        )
    return observed


def _run(
    model: _Model,
    batches: Iterable[Any],
    forward: Callable[[_Model, Any], object] | None,
    progress: bool,
) -> None:
    count = 0
    for batch in _progress(batches) if progress else batches:
        reset_levels(model)
        if forward is None:
            model(_inputs(batch))
        else:
            forward(model, batch)
        count += 1
    if not count:
        raise ValueError("batches: expected at least one batch, got none")


def _inputs(batch: Any) -> Any:
    """What of a batch the model is called with."""
    if not isinstance(batch, (tuple, list)) or not batch:
        return batch
    images = all(isinstance(entry, Tensor) and entry.dim() == 3 for entry in batch)
    return batch if images and isinstance(batch, list) else batch[0]


def _progress(batches: Iterable[Any]) -> Iterable[Any]:
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return batches
    return track(
        batches, "calibrate", console=Console(stderr=True), transient=True, show_speed=False
    )
