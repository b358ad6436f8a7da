"""Every quantizer and observer as a row of a table, for the suites that test them all.

A quantizer's value and gradients are worked out by hand: formulas in float64, without autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Values = dict[str, Tensor]
"""The values of a quantizer by name, in a shape that broadcasts against x."""


@dataclass(frozen=True)
class Result:
    """What a quantizer should do: y, dx, and the terms of which a value's gradient is the sum."""

    y: Tensor
    dx: Tensor
    terms: Values = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """One call: input, upstream gradient, range of the codes, and LSQ's gradient scale."""

    x: Tensor
    dy: Tensor
    low: int
    high: int
    g: float

    def inside(self, code: Tensor) -> Tensor:
        return (code >= self.low) & (code <= self.high)


def lsq(call: Call, values: Values) -> Result:
    s = values["scale"].abs()
    ratio = call.x / s
    code = ratio.round()
    inside, k = call.inside(code), code.clamp(call.low, call.high)
    slope = torch.where(inside, k - ratio, k) * values["scale"].sign()
    return Result(k * s, call.dy * inside, {"scale": call.g * slope * call.dy})


def lsq_plus(call: Call, values: Values) -> Result:
    s, b = values["scale"].abs(), values["offset"]
    z = (-b / s).clamp(call.low, call.high)
    whole = z.round()
    code = (call.x / s).round() + whole
    inside, k = call.inside(code), code.clamp(call.low, call.high)
    slope = torch.where(inside, k - whole - call.x / s, k - whole - b / s) * values["scale"].sign()
    terms = {"scale": call.g * slope * call.dy, "offset": call.g * call.dy * ~inside}
    return Result((k - whole) * s, call.dy * inside, terms)


def tqt(call: Call, values: Values) -> Result:
    t = values["log2_threshold"]
    s = 2.0 ** t.ceil() / (call.high + 1)
    ratio = call.x / s
    code = ratio.round()
    inside, k = call.inside(code), code.clamp(call.low, call.high)
    slope = s * math.log(2) * torch.where(inside, k - ratio, k)
    return Result(k * s, call.dy * inside, {"log2_threshold": call.g * slope * call.dy})


def minmax(call: Call, values: Values) -> Result:
    s, z = values["scale"], values.get("zero_point", torch.zeros(()))
    code = (call.x / s).round() + z
    return Result((code.clamp(call.low, call.high) - z) * s, call.dy * call.inside(code))


def pact(call: Call, values: Values) -> Result:
    a = values["alpha"].abs()
    s, bottom = a / call.high, -a if call.low < 0 else torch.zeros(())
    y = (torch.minimum(torch.maximum(call.x, bottom), a) / s).round() * s
    above, below = call.x >= a, call.x <= bottom if call.low < 0 else call.x < 0
    slope = 1.0 * above - (1.0 * below if call.low < 0 else 0.0)
    return Result(y, call.dy * ~(above | below), {"alpha": slope * call.dy})


def dorefa(call: Call, values: Values) -> Result:
    s, t = values["scale"], call.x.tanh()
    m = t.abs().max() + 1e-5
    code = (t / m / s).round()
    dv = call.dy * call.inside(code)
    dt = dv / m
    # The maximum moves with the one value it is taken from.
    dt = dt - (dv * t / m**2).sum() * t.sign() * (t.abs() == t.abs().max())
    return Result(code.clamp(call.low, call.high) * s, dt * (1 - t**2))


def dsq(call: Call, values: Values) -> Result:
    s, a = values["scale"].abs(), values["alpha"]
    ratio = call.x / s
    inside, v = call.inside(ratio), ratio.clamp(call.low, call.high)
    k, u = (2 / a - 1).log(), v - v.floor() - 0.5
    tanh, sech2 = (k * u).tanh(), 1 / (k * u).cosh() ** 2
    phi = v.floor() + 0.5 + tanh / (2 * (1 - a))
    slope = inside * k * sech2 / (2 * (1 - a))
    by_alpha = sech2 * u * (-2 / (a * (2 - a))) / (2 * (1 - a)) + tanh / (2 * (1 - a) ** 2)
    terms = {
        "scale": call.g * (phi - ratio * slope) * call.dy,
        "alpha": call.g * s * by_alpha * call.dy,
    }
    return Result(ratio.round().clamp(call.low, call.high) * s, call.dy * slope, terms)


@dataclass(frozen=True)
class Case:
    """A quantizer with options, its formula, and what is particular to it."""

    name: str
    """In QUANTIZERS."""
    formula: Callable[[Call, Values], Result]
    options: dict[str, Any] = field(default_factory=dict)
    symmetric: bool = True
    signs: tuple[bool, ...] = (True, False)
    per_channel: bool = True
    squeezed: bool = False
    """Whether it rounds what its transform makes of the tensor as a whole."""
    start: float = 1.5
    """A scale from which training lessens the error of 4 bits on normal data."""

    @property
    def id(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.options.items())])


CASES = [
    Case("lsq", lsq),
    Case("lsq_plus", lsq_plus, symmetric=False),
    Case("tqt", tqt),
    Case("tqt_frozen", minmax),
    # Its range learns from what it clips: it starts too small.
    Case("pact", pact, per_channel=False, start=0.04),
    Case("dorefa", dorefa, signs=(True,), squeezed=True),
    Case("dsq", dsq),
    Case("minmax", minmax),
    Case("minmax", minmax, {"symmetric": False}, symmetric=False),
]


@dataclass(frozen=True)
class ObserverCase:
    """An observer, and what is particular to it."""

    name: str
    """In OBSERVERS."""
    asymmetric: bool = True
    averages: bool = False
    """Whether it averages over batches, so that their order counts."""


OBSERVER_CASES = [
    ObserverCase("minmax"),
    ObserverCase("ema_minmax", averages=True),
    ObserverCase("percentile"),
    ObserverCase("mse"),
    ObserverCase("ema_mse", averages=True),
    ObserverCase("lsq", asymmetric=False),
    ObserverCase("power_of_two", asymmetric=False),
    ObserverCase("power_of_two_range", asymmetric=False),
]
