"""What a configuration means for the layers of a model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from hqod_ops import checks
from hqod_ops.quant.config.edge_layers import edge_patterns, no_such_layer
from hqod_ops.quant.config.qat_config import (
    FLOAT_BITS,
    Options,
    QATConfig,
    Rule,
    changed,
    get_config,
)
from hqod_ops.quant.nn.layers import float_class
from hqod_ops.quant.nn.twins import find_layers, layer_kind
from hqod_ops.quant.patterns import Patterns
from hqod_ops.quant.quantizers.registry import check_quantizer, default_observer
from hqod_ops.tables import bits_text, text_table


@dataclass(frozen=True)
class LayerPlan:
    """The settings of one layer, after all rules; see :class:`hqod_ops.quant.QATConfig`."""

    type: str
    weight_bits: int
    act_bits: int
    per_channel: bool
    weight_init: str
    act_init: str
    weight_quantizer: str
    act_quantizer: str
    weight_options: Options
    act_options: Options
    scale_mode: str

    @property
    def quantized(self) -> bool:
        """Whether weight or input is quantized."""
        return (self.weight_bits, self.act_bits) != (FLOAT_BITS, FLOAT_BITS)


class Plan(Mapping[str, LayerPlan]):
    """The settings of every layer that can be quantized, by name; ``print`` shows a table."""

    def __init__(self, layers: Mapping[str, LayerPlan]) -> None:
        self._layers = dict(layers)

    def __getitem__(self, name: str) -> LayerPlan:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __str__(self) -> str:
        head = ["layer", "type", "w bits", "weight", "a bits", "input"]
        rows = [
            [
                name,
                plan.type,
                bits_text(plan.weight_bits),
                _quantizer_text(plan, "weight"),
                bits_text(plan.act_bits),
                _quantizer_text(plan, "act"),
            ]
            for name, plan in self.items()
        ]
        return text_table(head, rows, right=["w bits", "a bits"])

    __repr__ = __str__


def _quantizer_text(plan: LayerPlan, kind: str) -> str:
    if getattr(plan, f"{kind}_bits") == FLOAT_BITS:
        return ""
    words = [getattr(plan, f"{kind}_quantizer"), getattr(plan, f"{kind}_init")]
    words += [f"{name}={value}" for name, value in getattr(plan, f"{kind}_options").items()]
    if kind == "weight" and plan.per_channel:
        words.append("per channel")
    return ", ".join(words)


_SETTINGS = tuple(f.name for f in dataclasses.fields(LayerPlan) if f.name != "type")


def plan_qat(
    model: nn.Module,
    config: QATConfig | str = "hqod_w4a4",
    *,
    first: Patterns | None = None,
    prediction: Patterns | None = None,
) -> Plan:
    """What :func:`hqod_ops.quant.prepare_qat` would do with a model, which stays as it is.

    Args:
        model (nn.Module): a float model.
        config (QATConfig or str), first (str or sequence of str, optional),
            prediction (str or sequence of str, optional): see :func:`hqod_ops.quant.prepare_qat`.

    Returns:
        Plan: the settings of every layer by name, those that stay in float with 32 bits; printed as
        a table.

    Raises:
        ValueError, TypeError: as :func:`hqod_ops.quant.prepare_qat`; but where that does not know
        the edge layers, the plan is made without any, with a warning that names candidates.

    Example:
        >>> from torch import nn
        >>> from hqod_ops.quant import plan_qat
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> print(plan_qat(model, "hqod_w2a2", first="0", prediction=()))
        layer  type    w bits  weight    a bits  input
        -----  ------  ------  --------  ------  ------------
        0      Conv2d       8  lsq, lsq       8  lsq, ema_mse
        2      Conv2d       2  lsq, lsq       2  lsq, ema_mse
    """
    config = changed(get_config(config), first=first, prediction=prediction)
    return plan_layers(model, float_layers(model), config, guess=True)


def plan_layers(
    model: nn.Module, layers: Mapping[str, nn.Module], config: QATConfig, *, guess: bool = False
) -> Plan:
    """The settings of every layer.

    Args:
        model (nn.Module): asked for its edge layers where config does not name them.
        layers (mapping of str to nn.Module): the layers that have a twin, in order.
        config (QATConfig): first, prediction and overrides are checked against the layers.
        guess (bool): warn where edge layers are not known, and plan without. Default: False

    Raises:
        ValueError: a pattern fits no layer, the edge layers are not known, there is nothing to
            quantize, or a quantizer does not fit what it is to do in a layer.
    """
    edge_layers, problems = edge_patterns(model, layers, config)
    if problems and not guess:
        raise ValueError("; ".join(problems))
    for problem in problems:
        warnings.warn(f"{problem}; planned without", stacklevel=3)
    for argument, pattern in [
        *edge_layers,
        *(("overrides", rule.pattern) for rule in config.overrides if rule.pattern is not None),
    ]:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise ValueError(no_such_layer(argument, pattern, layers))
    rules = [
        *(
            Rule(pattern, weight_bits=config.edge("weight"), act_bits=config.edge("act"))
            for _, pattern in edge_layers
        ),
        *config.overrides,
    ]
    first = [pattern for argument, pattern in edge_layers if argument == "first"]
    plan = Plan(
        {
            name: _plan_layer(name, layer, config, rules, any(fnmatchcase(name, p) for p in first))
            for name, layer in layers.items()
        }
    )
    if not any(layer.quantized for layer in plan.values()):
        raise ValueError(f"model: expected a layer to quantize, {type(model).__name__} has none")
    return plan


def _plan_layer(
    name: str, layer: nn.Module, config: QATConfig, rules: list[Rule], image: bool
) -> LayerPlan:
    settings = {key: getattr(config, key) for key in _SETTINGS}
    skip = False
    for rule in rules:
        if rule.fits(name, layer_kind(layer)):
            _apply(settings, rule)
            skip = skip if rule.skip is None else rule.skip
    if skip:
        settings["weight_bits"] = settings["act_bits"] = FLOAT_BITS
    for part in ("weight", "act"):
        if settings[f"{part}_init"] is None:
            quantizer = settings[f"{part}_quantizer"]
            settings[f"{part}_init"] = default_observer(part, quantizer, image)
    plan = LayerPlan(type=float_class(layer).__name__, **settings)
    try:
        if plan.weight_bits != FLOAT_BITS:
            check_quantizer("weight", plan.weight_quantizer, plan.weight_options, plan.per_channel)
        if plan.act_bits != FLOAT_BITS:
            check_quantizer("act", plan.act_quantizer, plan.act_options)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return plan


def _apply(settings: dict[str, Any], rule: Rule) -> None:
    """Change the settings of a layer by a rule."""
    for kind in ("weight", "act"):
        quantizer = f"{kind}_quantizer"
        if getattr(rule, quantizer) not in (None, settings[quantizer]):
            settings[f"{kind}_options"] = {}  # those so far are another quantizer's
    changes = {key: getattr(rule, key) for key in _SETTINGS}
    settings.update({key: value for key, value in changes.items() if value is not None})


def float_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a float model that have a twin, by name.

    Raises:
        ValueError: the model is prepared already.
        TypeError: it is no module.
    """
    checks.module("model", model)
    return find_layers(model)
