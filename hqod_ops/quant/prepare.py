"""prepare_qat: from a float model to a QAT model, without tracing."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from hqod_ops import checks
from hqod_ops.quant.adapters import find_adapter
from hqod_ops.quant.config.plan import LayerPlan, float_layers, plan_layers
from hqod_ops.quant.config.qat_config import FLOAT_BITS, QATConfig, changed, get_config
from hqod_ops.quant.dataflow.attach import ExpectedModules
from hqod_ops.quant.dataflow.fold import fold_batch_norm
from hqod_ops.quant.dataflow.producers import place_on_producers
from hqod_ops.quant.nn.batch_norm import freeze_batch_norm
from hqod_ops.quant.nn.layers import QATLayer
from hqod_ops.quant.nn.twins import attach_attention, twin_class, without_fast_path
from hqod_ops.quant.nn.weight_pool import WeightPool
from hqod_ops.quant.patterns import Patterns
from hqod_ops.quant.quantizers.base import Quantizer
from hqod_ops.quant.quantizers.registry import make_quantizer
from hqod_ops.quant.runtime import track_calls

_Model = TypeVar("_Model", bound=nn.Module)


def prepare_qat(
    model: _Model,
    config: QATConfig | str = "hqod_w4a4",
    *,
    first: Patterns | None = None,
    prediction: Patterns | None = None,
    foreach: bool | None = None,
    save: str | None = None,
    example: Any = None,
) -> _Model:
    """Turn a float model into a QAT model, in place.

    Every ``Conv2d``, ``ConvTranspose2d`` and ``Linear`` becomes its twin (:class:`QATLayer`), which
    fake-quantizes its weight and its input; nothing is traced, so any control flow works. So do the
    four projections of ``MultiheadAttention`` (``in_proj_q``, ``in_proj_k``, ``in_proj_v`` and
    ``out_proj``), and layers of a subclass whose forward gives the weight to ``F.conv2d`` and the
    like once, where these are quantized; other subclasses stay in float, with a warning. Layers of
    fixed whole numbers, such as YOLO's ``dfl.conv``, are no layers to train and stay. Batch
    normalisation is left as it is, and trains, unless ``config.batch_norm`` says otherwise. Next,
    run :func:`calibrate`; until then, the model raises an error when it is called.
    :func:`plan_qat` shows what will be done. With ``config.placement="producers"`` inputs are
    quantized where they are made, as :func:`place_on_producers` does it; :func:`placement` reports.

    The first convolution, with the image as its input, and the prediction layers get
    ``config.edge_bits`` bits. They are those of ``first`` and ``prediction`` here or in config;
    else those that the model declares in its attributes ``qat_first`` and ``qat_prediction`` (names
    or globs), or parts of it; else those known of torchvision's RetinaNet, FCOS, SSD, SSDLite and
    Faster, Mask and Keypoint R-CNN.

    A layer called several times in one forward pass, such as a head shared by FPN levels, gets one
    input scale per call. Its calls are counted from the start of the forward pass of *this* model,
    so prepare the model that the training loop calls.

    With ``foreach`` the weights are quantized in as few calls of
    :func:`hqod_ops.fake_quant_foreach` as there are kinds of quantizers, once at the start of the
    forward pass of this model, also that of a layer that is called several times. Results and
    gradients are the same, but for the order in which the gradients of such a layer are summed up.
    It saves the fixed cost of a call a layer, so it helps where there are many small layers; the
    quantized weights and their gradients are all held at once. Under ``torch.compile`` a layer that
    control flow leaves out gets a gradient of 0, not None.

    Args:
        model (nn.Module): a float model, with its weights.
        config (QATConfig or str): a configuration, or the preset ``"hqod_w4a4"``,
            ``"hqod_w2a2"``, ``"w8a8"`` or another of :data:`PRESETS`. Default: ``"hqod_w4a4"``
        first (str or sequence of str, optional), prediction (str or sequence of str, optional),
            foreach (bool, optional), save (str, optional): in place of those of config.
            Default: None
        example (optional): a batch, such as :func:`calibrate` takes them, for
            ``batch_norm="fold"``, which must see the model run, and ``placement="producers"``,
            which then sees what tracing would not reach. Default: None

    Returns:
        nn.Module: the same object. Parameters keep their objects and names, so optimizers made
        earlier stay valid, but lack the scales.

    Raises:
        ValueError: unknown preset, a pattern that fits no layer (naming the closest), edge layers
            not known, a quantizer that does not fit its role, its scheme or its options, folding
            without an example, or a model that is already prepared or has no layer to quantize. The
            model is then as it was.
        TypeError: config is neither a QATConfig nor a str, or model is no module.

    Source: the placement of quantizers of the HQOD code (arXiv:2408.02561).

    Example:
        >>> from torch import nn
        >>> from hqod_ops.quant import prepare_qat
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> type(prepare_qat(model, "hqod_w2a2", first="0", prediction="2")[0]).__name__
        'QATConv2d'
    """
    if foreach is not None:
        checks.flag("foreach", foreach)
    config = changed(
        get_config(config), first=first, prediction=prediction, foreach=foreach, save=save
    )
    layers = float_layers(model)
    plan = plan_layers(model, layers, config)
    # All quantizers first: an error must leave the model as it was.
    quantizers = {name: _quantizers(layers[name], name, p) for name, p in plan.items()}
    if config.batch_norm == "fold":
        if example is None:
            raise ValueError('example: expected a batch for batch_norm="fold", got None')
        fold_batch_norm(model, example)
    elif config.batch_norm == "freeze":
        freeze_batch_norm(model)
    for name, (weight_quantizer, input_quantizer) in quantizers.items():
        if plan[name].quantized:
            twin = twin_class(layers[name]).from_float(
                layers[name], weight_quantizer=weight_quantizer, input_quantizer=input_quantizer
            )
            twin.saved_as = config.save
    attach_attention(layers)
    without_fast_path(model)
    state = track_calls(model)
    state.expected = ExpectedModules(model)
    if config.foreach:
        weights = [m for m in model.modules() if isinstance(m, QATLayer) and m.weight_quantizer]
        state.weights = WeightPool(weights)
    if config.placement == "producers" and any(q is not None for _, q in quantizers.values()):
        place_on_producers(model, example=example)
    adapter = find_adapter(model)
    if adapter is not None:
        adapter.prepared(model)
    return model


@torch.inference_mode(False)
def _quantizers(
    layer: nn.Module, name: str, plan: LayerPlan
) -> tuple[Quantizer | None, Quantizer | None]:
    """The quantizers of a layer's weight and input."""
    twin = twin_class(layer)
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    place: dict[str, Any] = {
        "device": weight.device,
        "dtype": dtype,
        "scale_mode": plan.scale_mode,
    }
    weight_quantizer = input_quantizer = None
    try:
        if plan.weight_bits != FLOAT_BITS:
            axis = twin.weight_ch_axis if plan.per_channel else None
            weight_quantizer = make_quantizer(
                plan.weight_quantizer,
                plan.weight_bits,
                options=plan.weight_options,
                signed=True,
                ch_axis=axis,
                channels=1 if axis is None else weight.shape[axis],
                observer=plan.weight_init,
                **place,
            )
            weight_quantizer.label = f"{name}.weight_quantizer".lstrip(".")
        if plan.act_bits != FLOAT_BITS:
            input_quantizer = make_quantizer(
                plan.act_quantizer,
                plan.act_bits,
                options=plan.act_options,
                observer=plan.act_init,
                **place,
            )
            input_quantizer.label = f"{name}.input_quantizer".lstrip(".")
    except (ValueError, TypeError) as error:
        raise type(error)(f"{name}: {error}") from None
    return weight_quantizer, input_quantizer
