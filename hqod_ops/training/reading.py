"""Settings from TOML, JSON and ``--set``, by msgspec, with errors that name the setting."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from hqod_ops.quant.config import FLOAT_BITS, PRESETS
from hqod_ops.training import ConfigError
from hqod_ops.training.settings import RunConfig

_MOVED = {"scale_lr": "schedule", "scale_decay": "schedule", "calibration_images": "data"}
"""Settings that stood in ``[quant]`` before, and their tables."""


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """The settings of a run from plain data.

    Args:
        values (mapping): settings by name, tables as mappings; what is missing keeps its default.
            Names and values of earlier versions are understood (:func:`current`).

    Raises:
        ConfigError: a setting is unknown, of the wrong type or out of its range.

    Example:
        >>> from hqod_ops.training.reading import from_dict
        >>> from_dict({"quant": {"bits": 4, "act_quantizer": "lsq_plus"}}).quant.act_bits
        4
    """
    # The defaults are those of a run, in which nothing is quantized, not those of QATConfig.
    values = merge(to_dict(RunConfig()), current(values))
    _check_names(RunConfig, values, "")
    try:
        return msgspec.convert(values, RunConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(_one_line(str(error), values)) from None


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain data from the settings of a run.

    Example:
        >>> from hqod_ops.training.reading import to_dict
        >>> from hqod_ops.training.settings import RunConfig
        >>> to_dict(RunConfig())["schedule"]["optimizer"]
        'adamw'
    """
    return dict(msgspec.to_builtins(config))


def read(path: str | Path) -> dict[str, Any]:
    """Settings from a TOML or JSON file, as plain data.

    Raises:
        ConfigError: the file cannot be read or is broken.
    """
    path = Path(path)
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from None
    decode = msgspec.json.decode if path.suffix == ".json" else msgspec.toml.decode
    try:
        data = decode(text)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a table of settings, got {type(data).__name__}")
    return current(data)


def current(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain settings in today's words: how earlier versions and short forms are understood.

    In ``[quant]``, ``preset`` stands for all fields of a preset, ``bits`` for ``weight_bits`` and
    ``act_bits``, where 0 was float; and ``"float"`` for the number of bits that means float.

    Example:
        >>> from hqod_ops.training.reading import current
        >>> current({"quant": {"bits": 0, "scale_lr": 1.0}})
        {'schedule': {'scale_lr': 1.0}, 'quant': {'weight_bits': 32, 'act_bits': 32}}
    """
    values = dict(values)
    if not isinstance(values.get("quant"), Mapping):
        return values
    quant = _in_numbers(values["quant"])
    if isinstance(quant.get("overrides"), list | tuple):
        quant["overrides"] = [
            _in_numbers(rule) if isinstance(rule, Mapping) else rule for rule in quant["overrides"]
        ]
    short = "bits" in quant
    if short:
        bits = quant.pop("bits") or FLOAT_BITS
        quant = {"weight_bits": bits, "act_bits": bits, **quant}
    preset = quant.pop("preset", None)
    if preset is not None:
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ConfigError(_unknown("quant.preset", "preset", preset, PRESETS))
        quant = {**msgspec.to_builtins(PRESETS[preset]), **quant}
    words = quant.get("weight_quantizer", "lsq"), quant.get("weight_init")
    if short and words == ("lsq", "minmax"):
        # Was written where LSQ's own was meant, which is the same.
        quant["weight_init"] = None
    values["quant"] = quant
    for name, table in _MOVED.items():
        if name in quant:
            values = merge({table: {name: quant.pop(name)}}, values)
    return values


def _in_numbers(table: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: FLOAT_BITS if name.endswith("bits") and value == "float" else value
        for name, value in table.items()
    }


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with changes put over them, table by table.

    Example:
        >>> from hqod_ops.training.reading import merge
        >>> merge({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}})
        {'a': {'x': 1, 'y': 3}}
    """
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def setting(name: str, value: Any) -> dict[str, Any]:
    """Plain data from a dotted name and its value.

    Example:
        >>> from hqod_ops.training.reading import setting
        >>> setting("schedule.lr", 1e-3)
        {'schedule': {'lr': 0.001}}
    """
    for part in reversed(name.split(".")):
        value = {part: value}
    return current(value)


def assignment(text: str) -> dict[str, Any]:
    """Plain data from ``table.setting=value``; the value is TOML, or else a string.

    Raises:
        ConfigError: there is no "=".

    Example:
        >>> from hqod_ops.training.reading import assignment
        >>> assignment("schedule.lr=1e-3"), assignment("loss.variant=geometric")
        ({'schedule': {'lr': 0.001}}, {'loss': {'variant': 'geometric'}})
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"--set: expected table.setting=value, got {text!r}")
    try:
        parsed: Any = msgspec.toml.decode(f"value = {value}")["value"]
    except msgspec.DecodeError:
        parsed = value
    return setting(name, parsed)


def _tables(hint: Any) -> type | None:
    """The settings class of a field's annotation, if it holds tables."""
    kinds = (hint, *typing.get_args(hint))
    return next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)  # type: ignore[return-value]


def _check_names(kind: type, values: Mapping[str, Any], prefix: str) -> None:
    """Raise for a setting that there is none of; msgspec would leave it out."""
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        if name not in hints:
            raise ConfigError(_unknown(f"{prefix}{name}", "setting", name, hints))
        inner = _tables(hints[name])
        if inner is None:
            continue
        if isinstance(value, Mapping):
            _check_names(inner, value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            for index, entry in enumerate(value):
                if isinstance(entry, Mapping):
                    _check_names(inner, entry, f"{prefix}{name}[{index}].")


def _unknown(where: str, what: str, name: Any, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {close[0]!r}? there are" if close else "expected one of"
    return f"{where}: no such {what}; {hint} {', '.join(sorted(known))}"


def _one_line(message: str, values: Mapping[str, Any]) -> str:
    """msgspec's error in our words: the setting by its name, and the value that came."""
    message, _, path = message.rpartition(" - at `$")
    path = path.strip("`.")
    if re.match(r"[a-z_]+: ", message):  # from the checks of QATConfig
        return f"{path}.{message}"
    if not message.startswith(("Expected `", "Invalid enum", "Number")):
        return f"{path}: {message}"
    kind: Any = RunConfig
    value: Any = values
    for part in re.findall(r"[^.\[\]]+", path):
        value = value[int(part)] if isinstance(value, list | tuple) else value[part]
        kind = typing.get_type_hints(kind)[part] if dataclasses.is_dataclass(kind) else kind
    words = list(_words(kind))
    if message.startswith("Invalid enum") or (words and "| str`" in message):
        also = "int or " if typing.get_origin(kind) is not typing.Literal else "one of "
        wanted = f"expected {also}{', '.join(map(repr, words))}"
    else:
        wanted = message.split(", got `")[0].replace("`", "").replace(" | null", "")
        wanted = wanted.replace("Expected array", "expected a list")
        wanted = wanted.replace("Expected object", "expected a table")
        wanted = wanted.replace(f"<= {sys.float_info.max}", "< inf")
        wanted = wanted[0].lower() + wanted[1:]
    return f"{path}: {wanted}, got {value!r}"


def _words(kind: Any) -> Iterator[str]:
    """The strings that a setting may be, where it is one of a few, or a number instead."""
    if typing.get_origin(kind) is typing.Literal:
        yield from typing.get_args(kind)
    elif typing.get_origin(kind) in (typing.Union, types.UnionType):
        for part in typing.get_args(kind):
            yield from _words(part)


def describe() -> str:
    """Every setting with its default and its meaning, as ``hqod settings`` prints them."""
    return "\n".join(_described(RunConfig, RunConfig(), ""))


def _described(kind: Any, defaults: object, prefix: str) -> Iterator[str]:
    meanings, tables = _meanings(kind), []
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        value = getattr(defaults, field.name)
        inner = _tables(hints[field.name])
        if inner is not None:
            tables.append((inner, value, f"{prefix}{field.name}"))
            if dataclasses.is_dataclass(value):
                continue
        meaning = meanings.get(field.name, "")
        shown = f"{prefix}{field.name}"
        if value is not None:
            shown += f" = {json.dumps(value)}"
            meaning = meaning.partition(" Default: ")[0]
        yield shown
        yield textwrap.indent(textwrap.fill(meaning, 92), "    ")
    for inner, value, name in tables:
        one = dataclasses.is_dataclass(value)
        summary = (inspect.getdoc(inner) or "").partition("\n")[0]
        yield f"\n[{name}]  {summary}" if one else f"\n[[{name}]]  {summary}"
        yield from _described(inner, value if one else inner, f"{name}." if one else "")


def _meanings(kind: type) -> dict[str, str]:
    """What the docstring of a settings class says of each of them, under ``Args:``."""
    section = (inspect.getdoc(kind) or "").partition("Args:\n")[2]
    section = re.split(r"^\S", section, maxsplit=1, flags=re.MULTILINE)[0]
    meanings = {}
    for entry in re.split(r"^ {4}(?=\S)", section, flags=re.MULTILINE)[1:]:
        names, _, text = " ".join(entry.split()).partition("): ")
        text = re.sub(r":\w+:`([^`]+)`", r"\1", text).replace("``", "")
        meanings.update(dict.fromkeys(re.findall(r"(\w+) \(", names), text))
    return meanings
