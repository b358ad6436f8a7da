"""What to quantize, and how: the configuration, its rules and presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from hqod_ops import checks
from hqod_ops.quant.nn.saved import SAVES
from hqod_ops.quant.nn.twins import TWINS
from hqod_ops.quant.observers import MAX_BITS, MIN_BITS, OBSERVERS
from hqod_ops.quant.patterns import Patterns
from hqod_ops.quant.quantizers.lsq import SCALE_MODES
from hqod_ops.quant.quantizers.registry import QUANTIZERS, check_quantizer, default_observer
from hqod_ops.tables import text_table

FLOAT_BITS = 32
"""This number of bits means: not quantized."""

BATCH_NORM_MODES = ("train", "freeze", "fold")
PLACEMENTS = ("inputs", "producers")

Options = Mapping[str, Any]
_LayerType = type[nn.Module]
TYPE_NAMES = {kind.__name__: kind for kind in TWINS}


def _set_bits(settings: Rule | QATConfig, name: str) -> None:
    """Check a number of bits, and write ``"float"`` as :data:`FLOAT_BITS`."""
    bits = getattr(settings, name)
    if bits == "float":
        bits = FLOAT_BITS
        object.__setattr__(settings, name, bits)
    if bits is None or checks.integer(name, bits) == FLOAT_BITS:
        return
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(
            f"{name}: expected a value in [{MIN_BITS}, {MAX_BITS}], or {FLOAT_BITS} for not "
            f"quantized, got {bits}"
        )


def _check_choice(name: str, value: str | None, allowed: Iterable[str]) -> None:
    if value is not None and (not isinstance(value, str) or value not in allowed):
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def _check_settings(settings: Rule | QATConfig) -> None:
    """What rules and configurations have in common, each setting by itself."""
    for name in ("weight_bits", "act_bits"):
        _set_bits(settings, name)
    for name in ("weight_init", "act_init"):
        _check_choice(name, getattr(settings, name), OBSERVERS)
    _check_choice("scale_mode", settings.scale_mode, SCALE_MODES)
    for name in ("weight_quantizer", "act_quantizer"):
        _check_choice(name, getattr(settings, name), QUANTIZERS)
    for name in ("per_channel", "foreach", "skip"):
        if (value := getattr(settings, name, None)) is not None:
            checks.flag(name, value)
    for name in ("weight_options", "act_options"):
        value = getattr(settings, name)
        if value is not None and not isinstance(value, Mapping):
            raise TypeError(f"{name}: expected a mapping of options, got {value!r}")


@dataclass(frozen=True)
class Rule:
    """Settings of some layers, other than those of the whole model.

    It applies to the layers that fit ``pattern`` and ``type``; at least one of them is needed. What
    is None stays as it is, but for the options of a quantizer that the rule changes: those start
    from the defaults of the new one.

    Args:
        pattern (str, optional): full name of a layer, or a glob such as ``"head.*.conv?"`` where
            ``*`` also crosses dots.
        type (str, optional): ``"Conv2d"``, ``"ConvTranspose2d"`` or ``"Linear"``.
        weight_bits (int, optional), act_bits (int, optional): 2 to 8, or 32 or ``"float"`` for not
            quantized.
        per_channel (bool, optional), weight_init (str, optional), act_init (str, optional): see
            :class:`QATConfig`.
        skip (bool, optional): leave the layer as it is, in float.
        weight_quantizer (str, optional), act_quantizer (str, optional),
            weight_options (mapping, optional), act_options (mapping, optional),
            scale_mode (str, optional): see :class:`QATConfig`.

    Raises:
        ValueError: neither pattern nor type, bits outside 2..8, an unknown choice.
        TypeError: pattern is not a str, or bits not an int.

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
    weight_quantizer: str | None = None
    act_quantizer: str | None = None
    weight_options: Options | None = field(default=None, hash=False)
    act_options: Options | None = field(default=None, hash=False)
    scale_mode: str | None = None

    def __post_init__(self) -> None:
        if self.pattern is None and self.type is None:
            raise ValueError("Rule: expected a pattern, a type or both, got neither")
        if not isinstance(self.pattern, str | None):
            raise TypeError(
                f"pattern: expected one name or glob, got {self.pattern!r}; for several, several "
                "rules"
            )
        if self.pattern == "":
            raise ValueError("pattern: expected a name or a glob such as '*', got ''")
        _check_choice("type", self.type, TYPE_NAMES)
        _check_settings(self)

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
    ``overrides`` apply, the later over the earlier. ``print`` shows it as a table; what it means
    for each layer of a model is shown by :func:`hqod_ops.quant.plan_qat`.

    Args:
        weight_bits (int), act_bits (int): bits of weights and of layer inputs, 2 to 8, or 32 for
            not quantized, which may be written ``"float"``. Default: 4, 4
        edge_bits (int): bits of the first convolution (and so of the image) and of the prediction
            layers; where weights or inputs are not quantized elsewhere, theirs are not either.
            Default: 8
        first (str or sequence of str, optional), prediction (str or sequence of str, optional):
            names or globs of these layers; ``()`` for none. Default: None, ask the model (see
            :func:`hqod_ops.quant.prepare_qat`)
        overrides (sequence of Rule): exceptions. Default: none
        per_channel (bool): one weight scale per output channel, not one per tensor. Default: False
        weight_init (str, optional): initial weight scale, ``"minmax"`` or ``"lsq"``
            (2 mean|w| / sqrt(qmax), the official choice for 2 bits), or another of
            :data:`hqod_ops.quant.OBSERVERS`. Default: None, the quantizer's own (TQT's power of
            two), else ``"minmax"``
        act_init (str, optional): initial scale of the inputs, of the same choices. Default: None,
            the quantizer's own, else ``"ema_mse"``
        scale_mode (str): see :class:`hqod_ops.quant.LSQ`; for the quantizers that have it.
            Default: ``"abs"``
        weight_quantizer (str), act_quantizer (str): of :data:`hqod_ops.quant.QUANTIZERS`.
            Default: ``"lsq"``
        weight_options (mapping), act_options (mapping): further arguments of these quantizers, such
            as ``{"grad_scale": 1.0}`` of LSQ; ``{"signed": True}`` keeps inputs from unsigned
            codes. Default: none
        batch_norm (str): ``"train"``, as the official code; ``"freeze"``, the running statistics
            stay as they are (:func:`hqod_ops.quant.freeze_batch_norm`); ``"fold"``, into the
            convolutions (:func:`hqod_ops.quant.fold_batch_norm`). Default: ``"train"``
        foreach (bool): quantize all weights of the model in one call at the start of its forward
            pass, with identical results. Default: False
        placement (str): where activations are quantized: ``"inputs"``, at the input of every layer,
            or ``"producers"``, where they are made, once for all readers
            (:func:`hqod_ops.quant.place_on_producers`). Default: ``"inputs"``
        save (str): what layers keep of their quantized inputs and weights for the backward pass:
            ``"float"``, the tensors, or ``"codes"``, nothing: the codes are made again, to the same
            bits, from what the quantizers keep anyway. Default: ``"float"``

    Raises:
        ValueError: bits outside 2..8, an unknown choice, a quantizer that does not fit its role,
            per-channel scales, or its options.
        TypeError: bits are not an int, or overrides is not a sequence of Rule.

    Source: the placement and presets of the HQOD code (arXiv:2408.02561).

    Example:
        >>> from hqod_ops.quant import QATConfig, Rule
        >>> config = QATConfig(2, 2, weight_init="lsq", overrides=[Rule("neck.*", act_bits=4)])
        >>> config.overrides[0].act_bits
        4
        >>> print(config)
        layers      weight                 input
        ----------  ---------------------  -------------------------
        all         2 bits, lsq, init lsq  2 bits, lsq, init ema_mse
        first       8 bits                 8 bits
        prediction  8 bits                 8 bits
        neck.*                             4 bits
        batch norm: train; weights quantized one by one
    """

    weight_bits: int = 4
    act_bits: int = 4
    edge_bits: int = 8
    first: Patterns | None = None
    prediction: Patterns | None = None
    overrides: Sequence[Rule] = ()
    per_channel: bool = False
    weight_init: str | None = None
    act_init: str | None = None
    scale_mode: str = "abs"
    weight_quantizer: str = "lsq"
    act_quantizer: str = "lsq"
    weight_options: Options = field(default_factory=dict, hash=False)
    act_options: Options = field(default_factory=dict, hash=False)
    batch_norm: str = "train"
    foreach: bool = False
    placement: str = "inputs"
    save: str = "float"

    def __post_init__(self) -> None:
        _check_settings(self)
        _set_bits(self, "edge_bits")
        _check_choice("batch_norm", self.batch_norm, BATCH_NORM_MODES)
        _check_choice("placement", self.placement, PLACEMENTS)
        _check_choice("save", self.save, SAVES)
        if self.weight_bits != FLOAT_BITS:
            check_quantizer("weight", self.weight_quantizer, self.weight_options, self.per_channel)
        if self.act_bits != FLOAT_BITS:
            check_quantizer("act", self.act_quantizer, self.act_options)
        for name in ("first", "prediction"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, checks.names(name, value))
        rules = self.overrides
        if not isinstance(rules, Iterable) or not all(isinstance(r, Rule) for r in rules):
            raise TypeError(f"overrides: expected a sequence of Rule, got {self.overrides!r}")
        object.__setattr__(self, "overrides", tuple(self.overrides))

    def edge(self, kind: str) -> int:
        """Bits of the edge layers' weights (``"weight"``) or inputs (``"act"``)."""
        bits: int = getattr(self, f"{kind}_bits")
        return bits if bits == FLOAT_BITS else self.edge_bits

    def __str__(self) -> str:
        rows = [["all", *(_describe(self, kind) for kind in ("weight", "act"))]]
        edge = [_bits(self.edge(kind)) for kind in ("weight", "act")]
        for name in ("first", "prediction"):
            patterns = getattr(self, name)
            if patterns != ():
                rows.append([name if patterns is None else " ".join(patterns), *edge])
        for rule in self.overrides:
            where = " ".join(part for part in (rule.pattern, rule.type) if part is not None)
            cells = [_describe(rule, kind) for kind in ("weight", "act")]
            rows.append([where, *(["float", "float"] if rule.skip else cells)])
        together = "together" if self.foreach else "one by one"
        place = "; inputs where they are made" if self.placement == "producers" else ""
        saved = "; saved as codes" if self.save == "codes" else ""
        return (
            text_table(["layers", "weight", "input"], rows)
            + f"\nbatch norm: {self.batch_norm}; weights quantized {together}{place}{saved}"
        )


def _bits(bits: int) -> str:
    return "float" if bits == FLOAT_BITS else f"{bits} bits"


def _describe(settings: Rule | QATConfig, kind: str) -> str:
    """The settings of weights or inputs in words; what a rule leaves alone is left out."""
    bits = getattr(settings, f"{kind}_bits")
    if bits == FLOAT_BITS:
        return _bits(bits)
    init = getattr(settings, f"{kind}_init")
    if init is None and isinstance(settings, QATConfig):
        init = default_observer(kind, getattr(settings, f"{kind}_quantizer"))
    options = getattr(settings, f"{kind}_options") or {}
    words = [
        None if bits is None else _bits(bits),
        getattr(settings, f"{kind}_quantizer"),
        None if init is None else f"init {init}",
        *(f"{name} {value}" for name, value in options.items()),
    ]
    if kind == "weight" and settings.per_channel is not None:
        words.append("per channel" if settings.per_channel else None)
    return ", ".join(word for word in words if word is not None)


PRESETS: dict[str, QATConfig] = {
    "hqod_w4a4": QATConfig(4, 4),
    "hqod_w2a2": QATConfig(2, 2, weight_init="lsq"),
    "hqod_w2a2_minmax": QATConfig(2, 2),
    "tqt_w4a4": QATConfig(4, 4, weight_quantizer="tqt_frozen", act_quantizer="tqt_frozen"),
    "tqt_w2a2": QATConfig(2, 2, weight_quantizer="tqt_frozen", act_quantizer="tqt_frozen"),
    "w8a8": QATConfig(8, 8),
}
"""As the HQOD code has them: ``hqod_w4a4``, ``hqod_w2a2`` (the weights start from LSQ's scale, for
ATSS, RetinaNet-R50 and YOLOX) and ``hqod_w2a2_minmax`` (from their range, for RetinaNet-R18);
``tqt_w4a4`` and ``tqt_w2a2`` (powers of two that are not trained, for ATSS; rounding half to even
everywhere). ``w8a8`` has 8 bits everywhere."""


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


def changed(config: QATConfig, **changes: Any) -> QATConfig:
    """The configuration with the changes that are not None."""
    return dataclasses.replace(
        config, **{name: value for name, value in changes.items() if value is not None}
    )
