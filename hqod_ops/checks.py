"""Checks of arguments, in front of every op: they name the argument, what was expected, what came.

None of them reads a value, so none costs a device synchronisation. Tensors of one dtype and device
pass at a glance; what may be wrong is looked for one by one behind that, for the message. The
native kernels repeat them for callers of ``torch.ops.hqod`` (``csrc/checks.h``), but can only raise
RuntimeError.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
VARIANTS = {"official": 0, "geometric": 1}


def floating(name: str, x: Tensor) -> None:
    """A tensor of a floating point dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{name}: expected a floating point dtype (float32, float64, bfloat16, float16), "
            f"got {x.dtype}"
        )


def alike(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """x must have the dtype and the device of other."""
    if x.dtype != other.dtype:
        raise TypeError(f"{name}: expected the dtype of {other_name}, {other.dtype}, got {x.dtype}")
    if x.device != other.device:
        raise ValueError(
            f"{name}: expected the device of {other_name}, {other.device}, got {x.device}"
        )


def _matches(x: object, other: Tensor) -> bool:
    """Whether x is a tensor with the dtype and the device of other."""
    return isinstance(x, Tensor) and x.dtype == other.dtype and x.device == other.device


def box_pair(name1: str, boxes1: Tensor, name2: str, boxes2: Tensor) -> torch.Size:
    """Two sets of boxes [..., 4] of one shape, dtype and device; returns the leading shape."""
    floating(name1, boxes1)
    shape = boxes1.shape
    if _matches(boxes2, boxes1) and boxes2.shape == shape and shape and shape[-1] == 4:
        return shape[:-1]
    floating(name2, boxes2)
    if shape != boxes2.shape:
        raise ValueError(
            f"{name1} and {name2}: expected one shape, got {tuple(shape)} and {tuple(boxes2.shape)}"
        )
    if not shape or shape[-1] != 4:
        raise ValueError(f"{name1}: expected shape [..., 4], got {tuple(shape)}")
    alike(name2, boxes2, name1, boxes1)
    return shape[:-1]


def per_sample(name: str, x: Tensor, shape: torch.Size, other_name: str, other: Tensor) -> None:
    """One value a sample, with the dtype and the device of other."""
    if _matches(x, other) and x.shape == shape:
        return
    floating(name, x)
    if x.shape != shape:
        raise ValueError(
            f"{name}: expected shape {tuple(shape)}, one value a sample of {other_name}, "
            f"got {tuple(x.shape)}"
        )
    alike(name, x, other_name, other)


def sample_weight(weight: Tensor | None, shape: torch.Size, other_name: str, other: Tensor) -> None:
    """An optional weight a sample; float32 is allowed beside half precision."""
    if weight is None or (_matches(weight, other) and weight.shape == shape):
        return
    floating("weight", weight)
    if weight.shape != shape:
        raise ValueError(
            f"weight: expected shape {tuple(shape)}, one value a sample of {other_name}, "
            f"got {tuple(weight.shape)}"
        )
    if weight.dtype != other.dtype and not (
        weight.dtype == torch.float32 and other.dtype in (torch.bfloat16, torch.float16)
    ):
        raise TypeError(
            f"weight: expected the dtype of {other_name}, {other.dtype}, got {weight.dtype}"
        )
    if weight.device != other.device:
        raise ValueError(
            f"weight: expected the device of {other_name}, {other.device}, got {weight.device}"
        )


def choice(name: str, value: object, allowed: dict[str, int]) -> int:
    """The code of a named option."""
    try:
        return allowed[value]  # type: ignore[index]
    except (KeyError, TypeError):
        options = ", ".join(repr(option) for option in allowed)
        raise ValueError(f"Invalid {name} {value!r}: expected one of {options}") from None


def activation(value: str | None) -> None:
    if value is not None and value not in ("relu", "relu6"):
        raise ValueError(f'Invalid activation {value!r}: expected "relu", "relu6" or None')


def channel_axis(x: Tensor, ch_axis: int) -> int:
    """ch_axis counted from the front."""
    ch_axis = integer("ch_axis", ch_axis)
    if not -x.dim() <= ch_axis < x.dim():
        raise IndexError(
            f"ch_axis: expected a value in [{-x.dim()}, {x.dim() - 1}] "
            f"for x of shape {tuple(x.shape)}, got {ch_axis}"
        )
    return ch_axis % x.dim()


def integer(name: str, value: object) -> int:
    """A whole number, of Python's or NumPy's; a bool is none."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"{name}: expected an int, got the {type(value).__name__} {value!r}"
        ) from None


def number(name: str, value: object) -> None:
    """An option that is a number: it has no gradient, so it cannot be learned."""
    if isinstance(value, (float, int)) and not isinstance(value, bool):
        return
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(
            f"{name}: expected a number, got a tensor that requires grad, which would get none"
        )
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: expected a number, got the {type(value).__name__} {value!r}")


def at_least(name: str, value: Any, low: float) -> None:
    """A number that is finite and not below a limit."""
    number(name, value)
    if not low <= float(value) < float("inf"):
        raise ValueError(f"{name}: expected a finite number of at least {low:g}, got {value}")


def count(name: str, value: Any, low: int = 1) -> int:
    """A whole number that is not below a limit."""
    whole = integer(name, value)
    if whole < low:
        raise ValueError(f"{name}: expected at least {low}, got {whole}")
    return whole


def module(name: str, value: object) -> None:
    """A model."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name}: expected an nn.Module, got {_said(value)}")


def function(name: str, value: object) -> None:
    """An optional function, or what can be called like one."""
    if value is not None and not callable(value):
        raise TypeError(f"{name}: expected a callable or None, got {_said(value)}")


def batches(name: str, value: object) -> None:
    """Something to take batches from, one after the other."""
    one = isinstance(value, (Tensor, str, bytes, Mapping, nn.Module))
    if one or not (isinstance(value, Iterable) or hasattr(value, "__getitem__")):
        hint = "; for one batch give a list of it" if isinstance(value, (Tensor, Mapping)) else ""
        raise TypeError(f"{name}: expected an iterable of batches, got {_said(value)}{hint}")


def names(name: str, value: Any) -> tuple[str, ...]:
    """One name or several, none of them empty."""
    several = (value,) if isinstance(value, str) else value
    if not isinstance(several, Iterable) or isinstance(several, (Tensor, bytes, Mapping)):
        raise TypeError(f"{name}: expected a name or a sequence of names, got {_said(value)}")
    several = tuple(several)
    for entry in several:
        if not isinstance(entry, str):
            raise TypeError(f"{name}: expected names (str), got {_said(entry)} among them")
        if not entry:
            raise ValueError(f"{name}: expected a name or a glob such as '*', got ''")
    return several


def file_path(name: str, value: Any) -> None:
    """The path of a file to write."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name}: expected a str or a path, got {_said(value)}")
    if os.path.isdir(value) or os.fspath(value) in ("", b""):
        raise ValueError(f"{name}: expected the path of a file, got {os.fspath(value)!r}")


def _said(value: object) -> str:
    """A value in an error: a short one as it is, of others the class."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    kind = type(value).__name__
    short = isinstance(value, (bool, int, float, str)) and len(repr(value)) < 60
    return f"the {kind} {value!r}" if short else f"a {kind}"


def flag(name: str, value: object) -> None:
    if value is not True and value is not False:
        raise TypeError(f"{name}: expected a bool, got the {type(value).__name__} {value!r}")


def grad_scale(value: float | str | None) -> None:
    if isinstance(value, str):
        if value != "lsq":
            raise ValueError(f'Invalid grad_scale {value!r}: expected a float, "lsq" or None')
    elif value is not None:
        number("grad_scale", value)


def average(avg_factor: float | Tensor | None, reduction: str) -> None:
    """What a mean divides by: one value, and only for a mean."""
    if avg_factor is None:
        return
    if reduction != "mean":
        raise ValueError(f'avg_factor: expected reduction="mean" with it, got {reduction!r}')
    if not isinstance(avg_factor, Tensor):
        number("avg_factor", avg_factor)
    elif avg_factor.dim() != 0:
        raise ValueError(
            f"avg_factor: expected a float or a tensor of shape (), "
            f"got one of shape {tuple(avg_factor.shape)}"
        )


def quant_range(quant_min: int, quant_max: int) -> None:
    """A range of codes that float32 holds exactly."""
    if not (-(2**24) <= quant_min < quant_max <= 2**24):
        raise ValueError(
            "quant_min and quant_max: expected -2**24 <= quant_min < quant_max <= 2**24, "
            f"got {quant_min} and {quant_max}"
        )


def quant_params(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, ch_axis: int | None
) -> int | None:
    """x with its scale and zero point: one value, or one a channel; returns the axis of these."""
    floating("x", x)
    expected = 1
    if ch_axis is not None:
        ch_axis = channel_axis(x, ch_axis)
        expected = x.shape[ch_axis]
    fits = zero_point is None or (_matches(zero_point, x) and zero_point.numel() == expected)
    if fits and _matches(scale, x) and scale.numel() == expected:
        return ch_axis
    floating("scale", scale)
    for name, param in (("scale", scale), ("zero_point", zero_point)):
        if param is None:
            continue
        if not isinstance(param, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(param).__name__}")
        if param.numel() != expected:
            what = "1 value (ch_axis is None)" if ch_axis is None else f"C = {expected} values"
            raise ValueError(
                f"{name}: expected {what} for x of shape {tuple(x.shape)} and ch_axis {ch_axis}, "
                f"got {param.numel()}"
            )
        if param.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {param.device}")
    if scale.dtype != x.dtype and not (
        scale.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)
    ):
        raise TypeError(
            f"scale: expected the dtype of x, {x.dtype}, or float32 with a half x, "
            f"got {scale.dtype}"
        )
    if zero_point is not None and zero_point.dtype != scale.dtype:
        raise TypeError(
            f"zero_point: expected the dtype of scale, {scale.dtype}, or an integer dtype, "
            f"got {zero_point.dtype}"
        )
    return ch_axis


def one_each(name: str, values: Sequence[object], xs: Sequence[Tensor]) -> None:
    """A list that goes with xs."""
    if len(values) != len(xs):
        raise ValueError(
            f"{name}: expected one entry for each of the {len(xs)} xs, got {len(values)}"
        )
