"""What to quantize, and how: configuration, presets, and what they mean for a model's layers."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from hqod_ops.quant.layers import TWINS
from hqod_ops.quant.lsq import SCALE_MODES
from hqod_ops.quant.observers import MAX_BITS, MIN_BITS, OBSERVERS

FLOAT_BITS = 32
"""This number of bits means: not quantized."""

Patterns = str | Sequence[str]
_LayerType = type[nn.Module]
TYPE_NAMES = {kind.__name__: kind for kind in TWINS}


def _check_bits(name: str, bits: int | None) -> None:
    if bits is not None and bits != FLOAT_BITS and not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(
            f"{name}: expected a value in [{MIN_BITS}, {MAX_BITS}], or {FLOAT_BITS} for not "
            f"quantized, got {bits}"
        )


def _check_choice(name: str, value: str | None, allowed: Iterable[str]) -> None:
    if value is not None and value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def _as_tuple(patterns: Patterns) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


@dataclass(frozen=True)
class Rule:
    """Settings of some layers, other than those of the whole model.

    It applies to the layers that fit ``pattern`` and ``type``; at least one of them is needed. What
    is None stays as it is.

    Args:
        pattern (str, optional): full name of a layer, or a glob such as ``"head.*.conv?"`` where
            ``*`` also crosses dots.
        type (str, optional): ``"Conv2d"``, ``"ConvTranspose2d"`` or ``"Linear"``.
        weight_bits (int, optional), act_bits (int, optional): 2 to 8, or 32 for not quantized.
        per_channel (bool, optional), weight_init (str, optional), act_init (str, optional): see
            :class:`QATConfig`.
        skip (bool, optional): leave the layer as it is, in float.

    Raises:
        ValueError: neither pattern nor type, bits outside 2..8, an unknown choice.

    Example:
        >>> from hqod_ops.quant import Rule
        >>> Rule("head.*", weight_bits=8, act_bits=8).weight_bits
        8
    """

    pattern: str | None = None
    type: str | None = None
    weight_bits: int | None = None
    act_bits: int | None = None
    per_channel: bool | None = None
    weight_init: str | None = None
    act_init: str | None = None
    skip: bool | None = None

    def __post_init__(self) -> None:
        if self.pattern is None and self.type is None:
            raise ValueError("Rule: expected a pattern, a type or both, got neither")
        _check_choice("type", self.type, TYPE_NAMES)
        _check_bits("weight_bits", self.weight_bits)
        _check_bits("act_bits", self.act_bits)
        _check_choice("weight_init", self.weight_init, OBSERVERS)
        _check_choice("act_init", self.act_init, OBSERVERS)

    def fits(self, name: str, kind: _LayerType) -> bool:
        """Whether the rule applies to a layer of this name and class."""
        return (self.pattern is None or fnmatchcase(name, self.pattern)) and (
            self.type is None or TYPE_NAMES[self.type] is kind
        )


@dataclass(frozen=True)
class QATConfig:
    """How a model is quantized.

    All convolutions and linear layers get ``weight_bits`` and ``act_bits``; those named by
    ``first`` and ``prediction`` get ``edge_bits`` for both, weight and input; then the rules of
    ``overrides`` apply, the later over the earlier.

    Args:
        weight_bits (int), act_bits (int): bits of weights and of layer inputs, 2 to 8, or 32 for
            not quantized. Default: 4, 4
        edge_bits (int): bits of the first convolution (and so of the image) and of the prediction
            layers. Default: 8
        first (str or sequence of str, optional), prediction (str or sequence of str, optional):
            names or globs of these layers; ``()`` for none. Default: None, ask the model (see
            :func:`hqod_ops.quant.prepare_qat`)
        overrides (sequence of Rule): exceptions. Default: none
        per_channel (bool): one weight scale per output channel, not one per tensor. Default: False
        weight_init (str): initial weight scale, ``"minmax"`` or ``"lsq"`` (2 mean|w| / sqrt(qmax),
            the official choice for 2 bits), also ``"ema_mse"``. Default: ``"minmax"``
        act_init (str): initial scale of the inputs, of the same choices. Default: ``"ema_mse"``
        scale_mode (str): see :class:`hqod_ops.quant.LSQ`. Default: ``"abs"``

    Raises:
        ValueError: bits outside 2..8, or an unknown choice.

    Source: the placement and presets of the HQOD code (arXiv:2408.02561).

    Example:
        >>> from hqod_ops.quant import QATConfig, Rule
        >>> config = QATConfig(2, 2, weight_init="lsq", overrides=[Rule("neck.*", act_bits=4)])
        >>> config.overrides[0].act_bits
        4
    """

    weight_bits: int = 4
    act_bits: int = 4
    edge_bits: int = 8
    first: Patterns | None = None
    prediction: Patterns | None = None
    overrides: Sequence[Rule] = ()
    per_channel: bool = False
    weight_init: str = "minmax"
    act_init: str = "ema_mse"
    scale_mode: str = "abs"

    def __post_init__(self) -> None:
        for name in ("weight_bits", "act_bits", "edge_bits"):
            _check_bits(name, getattr(self, name))
        _check_choice("weight_init", self.weight_init, OBSERVERS)
        _check_choice("act_init", self.act_init, OBSERVERS)
        _check_choice("scale_mode", self.scale_mode, SCALE_MODES)
        for name in ("first", "prediction"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _as_tuple(value))
        object.__setattr__(self, "overrides", tuple(self.overrides))


PRESETS: dict[str, QATConfig] = {
    "hqod_w4a4": QATConfig(4, 4),
    "hqod_w2a2": QATConfig(2, 2, weight_init="lsq"),
    "w8a8": QATConfig(8, 8),
}
"""``hqod_w4a4`` and ``hqod_w2a2`` as the HQOD code has them for ATSS (at 2 bits with LSQ's weight
initialisation); ``w8a8`` has 8 bits everywhere."""


@dataclass(frozen=True)
class LayerPlan:
    """The settings of one layer, after all rules."""

    weight_bits: int
    act_bits: int
    per_channel: bool
    weight_init: str
    act_init: str
    scale_mode: str


_SETTINGS = ("weight_bits", "act_bits", "per_channel", "weight_init", "act_init")

# Prediction layers of torchvision's detectors, by class name; their first convolution is the first
# one registered.
_TORCHVISION_PREDICTION = {
    "RetinaNet": ("head.classification_head.cls_logits", "head.regression_head.bbox_reg"),
    "FCOS": (
        "head.classification_head.cls_logits",
        "head.regression_head.bbox_reg",
        "head.regression_head.bbox_ctrness",
    ),
    "FasterRCNN": (
        "rpn.head.cls_logits",
        "rpn.head.bbox_pred",
        "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred",
    ),
}


def get_config(config: QATConfig | str) -> QATConfig:
    """A configuration, or the preset of that name.

    Raises:
        ValueError: there is no such preset.
        TypeError: config is neither.
    """
    if isinstance(config, QATConfig):
        return config
    if not isinstance(config, str):
        raise TypeError(
            f"config: expected a QATConfig or a preset's name, got {type(config).__name__}"
        )
    if config not in PRESETS:
        raise ValueError(
            f"config: expected one of the presets {', '.join(PRESETS)}, got {config!r}"
        )
    return PRESETS[config]


def plan_layers(
    model: nn.Module, layers: dict[str, type[nn.Module]], config: QATConfig
) -> dict[str, LayerPlan]:
    """The settings of every layer that is to be quantized.

    Args:
        model (nn.Module): asked for its edge layers where config does not name them.
        layers (dict of str to class): the layers that have a twin, in order, with their classes.
        config (QATConfig): first, prediction and overrides are checked against the layers.

    Returns:
        dict of str to LayerPlan: a skipped layer is missing.

    Raises:
        ValueError: a pattern fits no layer, or the edge layers are not known.
    """
    edges = _edge_patterns(model, layers, config)
    for argument, pattern in [
        *edges,
        *(("overrides", rule.pattern) for rule in config.overrides if rule.pattern is not None),
    ]:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise ValueError(_no_such_layer(argument, pattern, layers))
    rules = [
        *(
            Rule(pattern, weight_bits=config.edge_bits, act_bits=config.edge_bits)
            for _, pattern in edges
        ),
        *config.overrides,
    ]
    plans: dict[str, LayerPlan] = {}
    for name, kind in layers.items():
        plan = LayerPlan(
            scale_mode=config.scale_mode, **{key: getattr(config, key) for key in _SETTINGS}
        )
        skip = False
        for rule in rules:
            if rule.fits(name, kind):
                changes = {key: getattr(rule, key) for key in _SETTINGS}
                plan = dataclasses.replace(
                    plan, **{key: value for key, value in changes.items() if value is not None}
                )
                skip = skip if rule.skip is None else rule.skip
        if not skip and (plan.weight_bits, plan.act_bits) != (FLOAT_BITS, FLOAT_BITS):
            plans[name] = plan
    return plans


def _edge_patterns(
    model: nn.Module, layers: dict[str, type[nn.Module]], config: QATConfig
) -> list[tuple[str, str]]:
    """(argument, pattern) of the first and the prediction layers."""
    if config.edge_bits == config.weight_bits == config.act_bits:
        known: dict[str, tuple[str, ...]] = {"first": (), "prediction": ()}
    else:
        known = _known_edges(model, layers)
    edges: list[tuple[str, str]] = []
    for argument in ("first", "prediction"):
        patterns = getattr(config, argument)
        if patterns is None:
            patterns = known.get(argument)
        if patterns is None:
            raise ValueError(
                f"{argument}: the layers with {config.edge_bits} bits are not known for a "
                f"{type(model).__name__}; name them, or give () for none"
            )
        edges += [(argument, pattern) for pattern in patterns]
    return edges


def _known_edges(
    model: nn.Module, layers: dict[str, type[nn.Module]]
) -> dict[str, tuple[str, ...]]:
    """The edge layers that a model declares, or those of torchvision's detectors."""
    known = {
        key: _as_tuple(getattr(model, attribute))
        for key, attribute in (("first", "qat_first"), ("prediction", "qat_prediction"))
        if hasattr(model, attribute)
    }
    for kind in type(model).__mro__:
        if kind.__module__.startswith("torchvision.") and kind.__name__ in _TORCHVISION_PREDICTION:
            known.setdefault("prediction", _TORCHVISION_PREDICTION[kind.__name__])
            known.setdefault("first", tuple(layers)[:1])
            break
    return known


def _no_such_layer(argument: str, pattern: str, layers: dict[str, type[nn.Module]]) -> str:
    inside = [name for name in layers if name.startswith(f"{pattern}.")]
    if inside:
        hint = f"it names a container: did you mean {pattern + '.*'!r}?"
    else:
        close = difflib.get_close_matches(pattern, layers, n=3, cutoff=0.0)
        hint = f"the closest are {', '.join(map(repr, close))}" if close else "the model has none"
    return f"{argument}: no convolution or linear layer fits the pattern {pattern!r}; {hint}"
