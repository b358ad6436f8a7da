"""prepare_qat: from a float model to a QAT model, without tracing."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, TypeVar

import torch
from torch import nn

from hqod_ops.quant.config import (
    FLOAT_BITS,
    LayerPlan,
    Patterns,
    QATConfig,
    get_config,
    plan_layers,
)
from hqod_ops.quant.layers import TWINS, QATLayer
from hqod_ops.quant.lsq import LSQ
from hqod_ops.quant.quantizer import Quantizer

_Model = TypeVar("_Model", bound=nn.Module)


def prepare_qat(
    model: _Model,
    config: QATConfig | str = "hqod_w4a4",
    *,
    first: Patterns | None = None,
    prediction: Patterns | None = None,
) -> _Model:
    """Turn a float model into a QAT model, in place.

    Every ``Conv2d``, ``ConvTranspose2d`` and ``Linear`` becomes its twin (:class:`QATLayer`), which
    fake-quantizes its weight and its input; nothing is traced, so any control flow works. Batch
    normalisation is left as it is, and trains. Next, run :func:`calibrate`; until then, the model
    raises an error when it is called.

    The first convolution, with the image as its input, and the prediction layers get
    ``config.edge_bits`` bits. They are those of ``first`` and ``prediction`` here or in config;
    else those that the model declares in its attributes ``qat_first`` and ``qat_prediction`` (names
    or globs); else those known of torchvision's RetinaNet, FCOS and Faster R-CNN.

    A layer called several times in one forward pass, such as a head shared by FPN levels, gets one
    input scale per call. Its calls are counted from the start of the forward pass of *this* model,
    so prepare the model that the training loop calls.

    Args:
        model (nn.Module): a float model, with its weights.
        config (QATConfig or str): a configuration, or the preset ``"hqod_w4a4"``,
            ``"hqod_w2a2"`` or ``"w8a8"``. Default: ``"hqod_w4a4"``
        first (str or sequence of str, optional), prediction (str or sequence of str, optional): in
            place of those of config. Default: None

    Returns:
        nn.Module: the same object. Parameters keep their objects and names, so optimizers made
        earlier stay valid, but lack the scales.

    Raises:
        ValueError: unknown preset, a pattern that fits no layer (naming the closest), edge layers
            not known, or a model that is already prepared or has no layer to quantize.
        TypeError: config is neither a QATConfig nor a str.

    Source: the placement of quantizers of the HQOD code (arXiv:2408.02561).

    Example:
        >>> from torch import nn
        >>> from hqod_ops.quant import prepare_qat
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> type(prepare_qat(model, "hqod_w2a2", first="0", prediction="2")[0]).__name__
        'QATConv2d'
    """
    config = get_config(config)
    config = dataclasses.replace(
        config,
        first=config.first if first is None else first,
        prediction=config.prediction if prediction is None else prediction,
    )
    layers = _layers(model)
    plans = plan_layers(model, {name: type(layer) for name, layer in layers.items()}, config)
    if not plans:
        raise ValueError(f"model: expected a layer to quantize, {type(model).__name__} has none")
    quantizers = []
    for name, plan in plans.items():
        layer = _convert(layers[name], name, plan)
        if layer.input_quantizer is not None:
            quantizers.append(layer.input_quantizer)
    # A plain list, not registered as submodules; deepcopy maps its entries to their copies.
    model.__dict__["_hqod_input_quantizers"] = quantizers
    model.register_forward_pre_hook(_start_forward)
    return model


def _start_forward(model: nn.Module, args: Any) -> None:
    """Forward pre-hook of a prepared model. It finds its quantizers on the model it is given, so
    that in a copy of the model it resets the copy's."""
    for quantizer in model.__dict__["_hqod_input_quantizers"]:
        quantizer.reset_level()


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that have a twin, by name."""
    layers: dict[str, nn.Module] = {}
    odd: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, (QATLayer, Quantizer)):
            raise ValueError(
                "model: expected a float model, "
                f"{name or type(model).__name__!r} is prepared already"
            )
        if type(module) in TWINS:
            layers[name] = module
        elif isinstance(module, tuple(TWINS)):
            odd.append(f"{name} ({type(module).__name__})")
    if odd:
        warnings.warn(
            f"layers of a subclass of Conv2d, ConvTranspose2d or Linear stay in float: "
            f"{', '.join(odd)}",
            stacklevel=3,
        )
    return layers


def _convert(layer: nn.Module, name: str, plan: LayerPlan) -> QATLayer:
    twin = TWINS[type(layer)]
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    place: dict[str, Any] = {"device": weight.device, "dtype": dtype}
    weight_quantizer = input_quantizer = None
    if plan.weight_bits != FLOAT_BITS:
        axis = twin.weight_ch_axis if plan.per_channel else None
        weight_quantizer = LSQ(
            plan.weight_bits,
            signed=True,
            ch_axis=axis,
            channels=1 if axis is None else weight.shape[axis],
            observer=plan.weight_init,
            scale_mode=plan.scale_mode,
            **place,
        )
        weight_quantizer.label = f"{name}.weight_quantizer".lstrip(".")
    if plan.act_bits != FLOAT_BITS:
        input_quantizer = LSQ(
            plan.act_bits, observer=plan.act_init, scale_mode=plan.scale_mode, **place
        )
        input_quantizer.label = f"{name}.input_quantizer".lstrip(".")
    return twin.from_float(
        layer, weight_quantizer=weight_quantizer, input_quantizer=input_quantizer
    )
