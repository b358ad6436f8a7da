"""What a run is made of: typed settings from TOML or JSON, with errors that name the setting."""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hqod_ops.quant.config.toml import _tomllib


class ConfigError(ValueError):
    """A setting, a path or a file of the user's is wrong; the message is one clear line."""


@dataclass(frozen=True)
class ModelConfig:
    """The network (:class:`hqod_ops.detection.models.ATSSNetwork`) and its anchors."""

    stem: int = 16
    """Channels of the first convolution."""
    widths: tuple[int, ...] = (16, 32, 64)
    """Channels of the stages, of strides 4, 8, 16, ..."""
    depths: tuple[int, ...] = (1, 1, 1)
    """Basic blocks of the stages."""
    levels: int = 2
    """Pyramid levels, one for each of the last stages."""
    channels: int = 32
    """Channels of the pyramid and the head."""
    head_depth: int = 2
    """Convolutions in each tower of the head."""
    groups: int = 8
    """Groups of the head's normalisation."""
    anchor_scale: float = 3.0
    """Side of an anchor, in strides of its level."""

    def __post_init__(self) -> None:
        counts = ("stem", "widths", "depths", "levels", "channels", "groups")
        _in_range("model.", self, **dict.fromkeys(counts, (1, _MOST)))
        # Below 0.25 an anchor of stride 4 rounds to nothing.
        _in_range("model.", self, head_depth=(0, _MOST), anchor_scale=(0.25, _MOST))


@dataclass(frozen=True)
class LossConfig:
    """The loss (:func:`hqod_ops.detection.models.losses.atss_losses`)."""

    hqod: bool = False
    """Add the terms of HQOD."""
    hiou_weight: float = 1.0
    """Factor of HIoU."""
    tcorr_weight: float = 1.0
    """Factor of TCorr."""
    variant: str = "official"
    """Of TCorr: "official" or "geometric"."""
    normaliser: str = "official"
    """What the HQOD terms are divided by: "official" (sum of centerness targets) or "num_pos"."""
    box_weight: float = 2.0
    """Factor of the GIoU loss."""
    focal_alpha: float = 0.25
    """Weight of the foreground in the focal loss."""
    focal_gamma: float = 2.0
    """Focus of the focal loss."""
    topk: int = 9
    """Candidates per level and object."""

    def __post_init__(self) -> None:
        factors = ("hiou_weight", "tcorr_weight", "box_weight", "focal_gamma")
        _in_range("loss.", self, **dict.fromkeys(factors, (0, _MOST)))
        _in_range("loss.", self, focal_alpha=(0, 1), topk=(1, _MOST))
        _one_of("loss.variant", self.variant, ("official", "geometric"))
        _one_of("loss.normaliser", self.normaliser, ("official", "num_pos"))


@dataclass(frozen=True)
class TestConfig:
    """From raw predictions to detections."""

    __test__ = False

    score_threshold: float = 0.05
    """Least class score of a candidate."""
    candidates: int = 300
    """Candidates an image before suppression."""
    nms_iou: float = 0.5
    """Overlap above which the weaker of two boxes of a class is dropped."""
    max_detections: int = 100
    """Detections an image."""

    def __post_init__(self) -> None:
        _in_range("test.", self, score_threshold=(0, 1), nms_iou=(0, 1))
        _in_range("test.", self, candidates=(1, _MOST), max_detections=(1, _MOST))


@dataclass(frozen=True)
class QuantConfig:
    """Quantization-aware training."""

    bits: int = 0
    """Bits of weights and activations; 0 trains in floating point."""
    edge_bits: int = 8
    """Bits of the first convolution and the prediction layers."""
    weight_init: str = "minmax"
    """First scale of the weights: "minmax" or "lsq" (2 * mean|w| / sqrt(quant_max))."""
    calibration_images: int = 256
    """Training images, drawn at random, that set the first activation scales."""
    scale_lr: float = 0.1
    """Learning rate of the scales, relative to that of the weights."""
    scale_decay: float = 0.0
    """Weight decay of the scales; the published recipes give them that of the weights."""

    def __post_init__(self) -> None:
        if self.bits != 0 and not 2 <= self.bits <= 8:
            raise ConfigError(f"quant.bits: expected 0 (off) or 2 to 8, got {self.bits}")
        _in_range("quant.", self, edge_bits=(2, 8), calibration_images=(1, _MOST))
        _in_range("quant.", self, scale_lr=(0, _MOST), scale_decay=(0, _MOST))
        _one_of("quant.weight_init", self.weight_init, ("minmax", "lsq"))


@dataclass(frozen=True)
class DataConfig:
    """Where images come from."""

    source: str = "digits"
    """ "digits", or the directory of a COCO or Pascal VOC data set."""
    train_split: str = "train"
    """Split to train on."""
    test_split: str = ""
    """Split to test on; "" is "test" of the digits and "val" of other data."""
    size: int = 96
    """Side of the square that images are brought to; 0 keeps their size."""
    short_side: int = 0
    """With size 0: length of the shorter side of images from files; 0 keeps it."""
    max_side: int = 0
    """With short_side: limit of the longer side; 0 for none."""
    flip: bool = True
    """Mirror every second training image, where the data set allows it."""
    train_images: int = 8000
    """Scenes to train on (digits)."""
    test_images: int = 500
    """Scenes to test on (digits)."""
    max_objects: int = 5
    """Most objects a scene (digits)."""
    clutter: float = 4.0
    """Mean number of strokes, blobs and pieces of digits a scene (digits)."""
    seed: int = 0
    """Of the scenes (digits); runs of different seeds share their data."""
    workers: int = 0
    """Processes that load images; 0 loads in the training process."""

    def __post_init__(self) -> None:
        _in_range("data.", self, **dict.fromkeys(("train_images", "test_images"), (1, _MOST)))
        sides = ("size", "short_side", "max_side", "workers")
        _in_range("data.", self, **dict.fromkeys(sides, (0, _MOST)))


@dataclass(frozen=True)
class ScheduleConfig:
    """How long and how fast to train: AdamW or SGD under a one-cycle or step schedule."""

    epochs: int = 5
    """Passes over the training images."""
    batch_size: int = 8
    """Images a step."""
    optimizer: str = "adamw"
    """ "adamw" or "sgd" (momentum 0.9)."""
    lr: float = 4e-3
    """Highest learning rate."""
    weight_decay: float = 1e-2
    """Of weights; norms, biases and factors have none."""
    policy: str = "onecycle"
    """ "onecycle" (up, then down along a cosine) or "step" (warm-up epoch, then / 10 at steps)."""
    warmup: float = 0.1
    """Part of a one-cycle run in which the rate rises; first rate of a step run, relative to lr."""
    steps: tuple[int, ...] = ()
    """Epochs after which a step schedule divides the rate by 10."""
    clip: float = 10.0
    """Largest L2 norm of the gradient; 0 for none."""

    def __post_init__(self) -> None:
        _one_of("schedule.optimizer", self.optimizer, ("adamw", "sgd"))
        _one_of("schedule.policy", self.policy, ("onecycle", "step"))
        _in_range("schedule.", self, epochs=(1, _MOST), batch_size=(1, _MOST), warmup=(0, 1))
        rest = ("lr", "weight_decay", "steps", "clip")
        _in_range("schedule.", self, **dict.fromkeys(rest, (0, _MOST)))


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run depends on."""

    name: str = "run"
    """Directory of the run, below the directory of all runs."""
    seed: int = 0
    """Of weights and order."""
    init: str = ""
    """Checkpoint to start from: weights of a float model with the same network."""
    device: str = "auto"
    """ "auto", "cpu", "cuda", "cuda:1", ..."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    test: TestConfig = field(default_factory=TestConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        _in_range("", self, seed=(0, 2**32 - 1))


_MOST = sys.float_info.max
"""The upper end of a range that has none: neither infinity nor NaN is in it."""


def _in_range(prefix: str, settings: object, **ranges: tuple[float, float]) -> None:
    """Check settings, of a list each entry, against the lowest and highest value allowed."""
    for name, (low, high) in ranges.items():
        values = getattr(settings, name)
        for value in values if isinstance(values, tuple) else (values,):
            if not low <= value <= high:
                wanted = f"at least {low}" if high == _MOST else f"a value in [{low}, {high}]"
                raise ConfigError(f"{prefix}{name}: expected {wanted}, got {value}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        options = ", ".join(repr(option) for option in allowed)
        raise ConfigError(f"{name}: expected one of {options}, got {value!r}")


def _convert(name: str, kind: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name}: expected a table, got {value!r}")
        return from_dict(typing.cast("type[Any]", kind), value, f"{name}.")
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple) or not all(type(v) is int for v in value):
            raise ConfigError(f"{name}: expected a list of integers, got {value!r}")
        return tuple(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{name}: expected {kind.__name__}, got {value!r}")
    return value


_Config = typing.TypeVar("_Config")


def from_dict(kind: type[_Config], values: Mapping[str, Any], prefix: str = "") -> _Config:
    """A settings object from plain data.

    Args:
        kind (type): one of the settings classes.
        values (mapping): settings by name, tables as mappings; what is missing keeps its default.
        prefix (str): put before names in errors. Default: ""

    Raises:
        ConfigError: a setting is unknown or has the wrong type.

    Example:
        >>> from hqod_ops.training.settings import RunConfig, from_dict
        >>> from_dict(RunConfig, {"quant": {"bits": 4}}).quant.bits
        4
    """
    kinds = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(kinds))
    if unknown:
        raise ConfigError(
            f"{prefix}{unknown[0]}: no such setting; expected one of {', '.join(sorted(kinds))}"
        )
    return kind(**{k: _convert(prefix + k, kinds[k], v) for k, v in values.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """Plain data from a settings object.

    Example:
        >>> from hqod_ops.training.settings import QuantConfig, to_dict
        >>> to_dict(QuantConfig(bits=2))["bits"]
        2
    """
    return dataclasses.asdict(config)


def read(path: str | Path) -> dict[str, Any]:
    """Settings from a TOML or JSON file, as plain data.

    Raises:
        ConfigError: the file cannot be read or is broken.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from None
    try:
        data = json.loads(text) if path.suffix == ".json" else _tomllib().loads(text)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a table of settings, got {type(data).__name__}")
    return data


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with changes put over them, table by table.

    Example:
        >>> from hqod_ops.training.settings import merge
        >>> merge({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}})
        {'a': {'x': 1, 'y': 3}}
    """
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def assignment(text: str) -> dict[str, Any]:
    """Plain data from ``table.setting=value``; the value is TOML, or else a string.

    Raises:
        ConfigError: there is no "=".

    Example:
        >>> from hqod_ops.training.settings import assignment
        >>> assignment("schedule.lr=1e-3"), assignment("loss.variant=geometric")
        ({'schedule': {'lr': 0.001}}, {'loss': {'variant': 'geometric'}})
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"--set: expected table.setting=value, got {text!r}")
    try:
        parsed: Any = _tomllib().loads(f"value = {value}")["value"]
    except ValueError:
        parsed = value
    for part in reversed(name.split(".")):
        parsed = {part: parsed}
    return typing.cast("dict[str, Any]", parsed)
