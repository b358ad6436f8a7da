"""Configurations as TOML files."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hqod_ops.quant.config.qat_config import QATConfig, Rule, get_config

_Settings = TypeVar("_Settings", QATConfig, Rule)


def to_toml(config: QATConfig) -> str:
    """A configuration as TOML; :func:`from_toml` gives an equal one back.

    Settings at their defaults are written too, but for those that are None.

    Args:
        config (QATConfig): options of quantizers must be numbers, strings, bools or lists of them.

    Returns:
        str: one table ``[[overrides]]`` a rule.

    Raises:
        TypeError: an option has no form in TOML.

    Example:
        >>> from hqod_ops.quant import QATConfig, Rule
        >>> from hqod_ops.quant.config.toml import to_toml
        >>> text = to_toml(QATConfig(2, 2, first="stem", overrides=[Rule("neck.*", act_bits=4)]))
        >>> print("first" + text.partition("first")[2].partition("per_channel")[0])
        first = ["stem"]
        <BLANKLINE>
    """
    lines = _lines(config)
    for rule in config.overrides:
        lines += ["", "[[overrides]]", *_lines(rule)]
    return "\n".join(lines) + "\n"


def from_toml(text: str) -> QATConfig:
    """A configuration from TOML.

    The keys are the fields of :class:`hqod_ops.quant.QATConfig` and, in tables ``[[overrides]]``,
    those of :class:`hqod_ops.quant.Rule`; what is missing has its default. ``preset = "NAME"``
    starts from a preset instead.

    Args:
        text (str): TOML.

    Returns:
        QATConfig

    Raises:
        ValueError: broken TOML, an unknown key, a value of another type or out of range.
        ImportError: Python 3.10 without tomli.

    Example:
        >>> from hqod_ops.quant.config.toml import from_toml
        >>> config = from_toml('''
        ... preset = "hqod_w2a2"
        ... per_channel = true
        ...
        ... [[overrides]]
        ... pattern = "neck.*"
        ... act_bits = 4
        ... ''')
        >>> config.weight_init, config.per_channel, config.overrides[0].act_bits
        ('lsq', True, 4)
    """
    values = dict(_tomllib().loads(text))
    start = values.pop("preset", None)
    if start is not None and not isinstance(start, str):
        raise ValueError(f"preset: expected a string, got {start!r}")
    tables = values.pop("overrides", None)
    if tables is not None:
        if not isinstance(tables, list) or not all(isinstance(t, Mapping) for t in tables):
            raise ValueError("overrides: expected tables [[overrides]]")
        values["overrides"] = [
            Rule(**_checked(Rule, table, f"overrides[{index}]."))
            for index, table in enumerate(tables)
        ]
    checked = _checked(QATConfig, values, "")
    return dataclasses.replace(QATConfig() if start is None else get_config(start), **checked)


def load_config(path: str | Path) -> QATConfig:
    """A configuration from a TOML file; see :func:`from_toml`.

    Args:
        path (str or Path): the file.

    Returns:
        QATConfig

    Raises:
        ValueError: as :func:`from_toml`, naming the file.
        OSError: it cannot be read.
        ImportError: Python 3.10 without tomli.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        return from_toml(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def save_config(config: QATConfig, path: str | Path) -> None:
    """Write a configuration as a TOML file; see :func:`to_toml`.

    Args:
        config (QATConfig): what to write.
        path (str or Path): the file.

    Raises:
        TypeError: an option has no form in TOML.
        OSError: the file cannot be written.
    """
    Path(path).write_text(to_toml(config), encoding="utf-8")


def _lines(settings: QATConfig | Rule) -> list[str]:
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    return [
        f"{name} = {_value(name, value)}"
        for name, value in values.items()
        if value is not None and name != "overrides"
    ]


def _value(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value)  # TOML's basic strings have the escapes of JSON
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # inf, -inf and nan, as in TOML
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        entries = (f"{json.dumps(key)} = {_value(name, v)}" for key, v in value.items())
        return f"{{ {', '.join(entries)} }}" if value else "{}"
    if isinstance(value, Sequence):
        return f"[{', '.join(_value(name, entry) for entry in value)}]"
    raise TypeError(f"{name}: expected a value that TOML has, got {type(value).__name__}")


def _checked(kind: type[_Settings], values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The values, if each is that of a field and of its type."""
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        if name not in hints:
            raise ValueError(
                f"{prefix}{name}: no such setting; expected one of {', '.join(sorted(hints))}"
            )
        allowed = _plain_types(hints[name])
        if name.endswith("_bits") and value == "float":
            continue
        if type(value) not in allowed:
            wanted = " or ".join(kind.__name__ for kind in allowed)
            raise ValueError(f"{prefix}{name}: expected {wanted}, got {value!r}")
        if isinstance(value, list) and not all(type(v) in (str, Rule) for v in value):
            raise ValueError(f"{prefix}{name}: expected strings, got {value!r}")
    return dict(values)


def _plain_types(hint: Any) -> list[type]:
    """The types that TOML has for an annotation: of its unions, all; for a sequence, a list."""
    if typing.get_origin(hint) in (list, Sequence):
        return [list]
    if typing.get_origin(hint) is Mapping:
        return [dict]
    inner = typing.get_args(hint)
    if inner:
        return [kind for part in inner for kind in _plain_types(part)]
    return [] if hint is type(None) else [hint]


def _tomllib() -> Any:
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib
    try:
        return importlib.import_module("tomli")
    except ImportError as error:
        raise ImportError(
            'tomli is needed here on Python 3.10: pip install "hqod_ops[detection]"'
        ) from error
