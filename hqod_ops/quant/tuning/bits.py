"""Bits for every layer: the least noise that a budget allows."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hqod_ops.extras import requirer
from hqod_ops.quant.config import QATConfig, Rule
from hqod_ops.quant.tuning.sensitivity import BASE, Sensitivity

METHODS = ("auto", "greedy", "milp")


@dataclass(frozen=True)
class _Choice:
    """One width for one layer: what it costs in bits, and in noise or in the metric."""

    bits: int
    size: float
    harm: float


_Options = dict[str, list[_Choice]]
"""By layer, from the fewest bits to the most."""


def search_bits(
    sensitivity: Sensitivity,
    *,
    average_bits: float | None = None,
    size_mb: float | None = None,
    max_drop: float | None = None,
    config: QATConfig = BASE,
    method: str = "auto",
) -> QATConfig:
    """The widths of weights that harm least within a budget, as a configuration with rules.

    Costs are taken to add up over layers: with the noise n_lb of layer l at b bits alone,
    ``sum_l n_lb`` is minimised with ``sum_l w_l b_l <= budget`` over its w_l weights. With max_drop
    the size is minimised with ``sum_l drop_lb <= max_drop``.

    By integer programming (``scipy.optimize.milp``), which finds the best, or greedily: from the
    most bits, one layer after the other loses bits, the one that is harmed least by bit saved.

    Args:
        sensitivity (Sensitivity): of :func:`sensitivity`, with weights.
        average_bits (float, optional): bits of a weight on average, edge layers included.
        size_mb (float, optional): size of the model, see :class:`hqod_ops.quant.summary.Summary`.
        max_drop (float, optional): how far the metric of the sensitivity may fall. Exactly one of
            the three.
        config (QATConfig): everything else, bits of inputs among it. Default: 8 bits for inputs,
            per channel, with scales of the least squared error
        method (str): ``"milp"``, ``"greedy"``, or ``"auto"``: the first if scipy is installed.
            Default: ``"auto"``

    Returns:
        QATConfig: config with a rule for every layer after its own.

    Raises:
        ValueError: not one budget, a budget that cannot be met (naming the least that can),
            max_drop without a metric, or an unknown method.
        ImportError: ``method="milp"`` without scipy.

    Example:
        >>> from hqod_ops.quant.tuning import LayerSensitivity, Sensitivity, search_bits
        >>> noise = {"a": {2: 0.5, 4: 0.1}, "b": {2: 0.02, 4: 0.01}}
        >>> rows = [
        ...     LayerSensitivity(name, "weight", bits, value)
        ...     for name, cells in noise.items() for bits, value in cells.items()
        ... ]
        >>> found = search_bits(Sensitivity(tuple(rows), {"a": 10, "b": 10}), average_bits=3)
        >>> [(rule.pattern, rule.weight_bits) for rule in found.overrides]
        [('a', 4), ('b', 2)]
    """
    budgets = {"average_bits": average_bits, "size_mb": size_mb, "max_drop": max_drop}
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"expected exactly one of {', '.join(budgets)}, got {', '.join(given) or 'none'}"
        )
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    (name, budget), by_drop = next(iter(given.items())), max_drop is not None
    options = _options(sensitivity, by_drop)
    total = sum(sensitivity.weights[layer] for layer in options)
    if by_drop:
        least = sum(min(choice.harm for choice in row) for row in options.values())
        limit, smallest = budget, least
    else:
        smallest = sum(row[0].size for row in options.values())
        if size_mb is not None:
            limit = (size_mb - sensitivity.other_mb) * 8e6
            least = smallest / 8e6 + sensitivity.other_mb
        else:
            limit, least = budget * total, smallest / total
    if limit < smallest * (1 - 1e-12) - 1e-12:
        raise ValueError(f"{name}: cannot be met, the least that can is {least:.4g}, got {budget}")
    exact = method == "milp" or (method == "auto" and importlib.util.find_spec("scipy") is not None)
    solve = _milp if exact else _greedy
    chosen = solve(options, limit, by_drop)
    rules = [Rule(layer, weight_bits=bits) for layer, bits in chosen.items()]
    return dataclasses.replace(config, overrides=(*config.overrides, *rules))


def average(config: QATConfig, weights: Mapping[str, int]) -> float:
    """Bits of a weight on average, where rules name every layer, the last of them counting.

    Example:
        >>> from hqod_ops.quant import QATConfig, Rule
        >>> rules = [Rule("a", weight_bits=2), Rule("b", weight_bits=4)]
        >>> average(QATConfig(overrides=rules), {"a": 1, "b": 3})
        3.5
    """
    bits = {rule.pattern: rule.weight_bits for rule in config.overrides if rule.weight_bits}
    return sum((bits[n] or 0) * count for n, count in weights.items()) / sum(weights.values())


def _options(found: Sensitivity, by_drop: bool) -> _Options:
    table = found.of("weight")
    if not table:
        raise ValueError("sensitivity: expected that of weights, it has none")
    options: _Options = {}
    for name, cells in table.items():
        row = []
        for bits, cell in sorted(cells.items()):
            if by_drop and cell.drop is None:
                raise ValueError("max_drop: the sensitivity was measured without a metric")
            harm = cell.drop if by_drop and cell.drop is not None else cell.noise
            row.append(_Choice(bits, float(found.weights[name] * bits), harm))
        options[name] = row
    return options


def _greedy(options: _Options, limit: float, by_drop: bool) -> dict[str, int]:
    place = {name: len(row) - 1 for name, row in options.items()}
    if by_drop:  # a width may do better than a greater one by chance
        place = {n: min(range(len(r)), key=lambda i: r[i].harm) for n, r in options.items()}

    def now(what: str) -> float:
        return sum(float(getattr(options[n][i], what)) for n, i in place.items())

    while True:
        moves = []
        for name, index in place.items():
            for lower in range(index):
                saved = options[name][index].size - options[name][lower].size
                harm = options[name][lower].harm - options[name][index].harm
                if not by_drop or now("harm") + harm <= limit:
                    moves.append((harm / saved if saved else harm, name, lower))
        if not moves or (not by_drop and now("size") <= limit):
            return {name: options[name][index].bits for name, index in place.items()}
        _, name, lower = min(moves)
        place[name] = lower


def _milp(options: _Options, limit: float, by_drop: bool) -> dict[str, int]:
    optimize = requirer("detection")("scipy.optimize")
    flat = [(name, choice) for name, row in options.items() for choice in row]
    sizes = np.array([choice.size for _, choice in flat])
    harms = np.array([choice.harm for _, choice in flat])
    one_each = np.array([[float(name == layer) for layer, _ in flat] for name in options])
    goal, bound = (sizes, harms) if by_drop else (harms, sizes)
    scale = max(float(np.abs(bound).max()), 1e-12)
    result = optimize.milp(
        goal / max(float(np.abs(goal).max()), 1e-300),
        integrality=np.ones(len(flat)),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(bound[None] / scale, -np.inf, limit / scale + 1e-9),
        ],
    )
    if result.x is None:
        raise RuntimeError(f"integer programming failed: {result.message}")
    taken: Sequence[float] = result.x
    return {name: c.bits for (name, c), x in zip(flat, taken, strict=True) if x > 0.5}
