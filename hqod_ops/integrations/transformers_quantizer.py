"""Quantized models that Transformers saves and loads as it does any other.

Importing this module makes the method ``"hqod"`` known to Transformers, so it must be imported
where ``from_pretrained`` is to read such a model.
"""

from __future__ import annotations

from typing import Any, TypeVar

from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hqod_ops.quant import QATConfig, QATLayer, prepare_qat
from hqod_ops.quant.config.qat_config import get_config
from hqod_ops.quant.config.toml import from_toml, to_toml
from hqod_ops.quant.quantizers.base import Quantizer

METHOD = "hqod"

_Model = TypeVar("_Model", bound=nn.Module)


@register_quantization_config(METHOD)
class HQODConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What ``config.json`` says of the quantizers: the arguments of ``prepare_qat``, as TOML."""

    def __init__(self, toml: str, **others: Any) -> None:
        self.quant_method = METHOD
        self.toml = toml


@register_quantizer(METHOD)
class HQODQuantizer(HfQuantizer):  # type: ignore[misc]
    """Prepares a model before its weights and scales are read."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **others: Any) -> nn.Module:
        prepare_qat(model, from_toml(self.quantization_config.toml))
        # How many scales an input quantizer has was found by calibration: the files tell.
        names = _quantizer_keys(model)
        state: dict[str, Tensor] = {}
        for path in others.get("checkpoint_files") or ():
            with safe_open(path, framework="pt") as file:
                state |= {name: file.get_tensor(name) for name in names & set(file.keys())}
        model.load_state_dict(state, strict=False)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **others: Any) -> nn.Module:
        # Transformers sets parameters one by one; a quantizer takes more from its state.
        names, state = _quantizer_keys(model), model.state_dict()
        model.load_state_dict({name: state[name].clone() for name in names}, strict=False)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _quantizer_keys(model: nn.Module) -> set[str]:
    return {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, Quantizer)
        for key in module.state_dict()
    }


def declare_quantizers(model: _Model, config: QATConfig | str) -> _Model:
    """Let ``save_pretrained`` write what ``from_pretrained`` needs to find the quantizers again.

    Args:
        model (PreTrainedModel): a model that was given to :func:`hqod_ops.quant.prepare_qat`.
        config (QATConfig or str): with this configuration.

    Returns:
        PreTrainedModel: the same object. ``Trainer`` and its checkpoints work as they do for any
        other model. What it saves is opened by ``from_pretrained`` where this module was imported.

    Raises:
        ValueError: the model has no quantizers.

    Example:
        >>> from hqod_ops.quant import prepare_qat
        >>> from hqod_ops.integrations.transformers_quantizer import declare_quantizers
        >>> model = prepare_qat(model, "hqod_w4a4")  # doctest: +SKIP
        >>> model = declare_quantizers(model, "hqod_w4a4")  # doctest: +SKIP
        >>> model.save_pretrained("detr-w4a4")  # doctest: +SKIP
    """
    if not any(isinstance(module, QATLayer) for module in model.modules()):
        raise ValueError(f"model: expected quantizers, but this {type(model).__name__} has none")
    described = HQODConfig(to_toml(get_config(config)))
    pretrained: Any = model
    pretrained.hf_quantizer = HQODQuantizer(described)
    pretrained.config.quantization_config = described
    pretrained.is_quantized = True
    pretrained.quantization_method = METHOD
    return model
