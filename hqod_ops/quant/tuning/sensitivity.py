"""Sensitivity: what it costs to quantize one layer's weights or inputs alone."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hqod_ops import checks
from hqod_ops.extras import requirer
from hqod_ops.quant.batches import check_run, evaluating
from hqod_ops.quant.calibrate import calibrate
from hqod_ops.quant.config import QATConfig
from hqod_ops.quant.config.plan import float_layers
from hqod_ops.quant.nn.layers import QATLayer
from hqod_ops.quant.prepare import prepare_qat
from hqod_ops.quant.quantizers import Quantizer
from hqod_ops.quant.summary import summary
from hqod_ops.quant.tuning.batch_norm import (
    batch_statistics,
    estimated_norms,
    reestimate_batch_norm,
)
from hqod_ops.quant.tuning.running import require_batches, shown
from hqod_ops.quant.tuning.signal import decibel, noise_of, outputs_of
from hqod_ops.tables import text_table

KINDS = ("weight", "act")
BASE = QATConfig(8, 8, per_channel=True, weight_init="mse", act_init="mse")
"""What layers are quantized with where nothing else is said."""


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer's weights (``kind="weight"``) or inputs (``"act"``) alone at one width.

    Attributes:
        name (str), kind (str), bits (int): which.
        noise (float): squared error of the outputs over their variance, the mean over outputs.
        drop (float, optional): by how much the metric falls; None without one.
    """

    name: str
    kind: str
    bits: int
    noise: float
    drop: float | None = None

    @property
    def snr(self) -> float:
        """Signal-to-noise ratio of the outputs in dB."""
        return decibel(self.noise)


@dataclass(frozen=True)
class Sensitivity:
    """The result of :func:`sensitivity`; ``print`` shows it as a table.

    Attributes:
        rows (tuple of LayerSensitivity): for every layer, kind and width.
        weights (dict of str to int): number of weights of every layer.
        other_mb (float): size in MB of all that is not weights: biases, scales and the rest.
        metric (float, optional): of the float model; None without one.
    """

    rows: tuple[LayerSensitivity, ...]
    weights: dict[str, int]
    other_mb: float = 0.0
    metric: float | None = None

    def of(self, kind: str) -> dict[str, dict[int, LayerSensitivity]]:
        """The rows of one kind by layer and width."""
        found: dict[str, dict[int, LayerSensitivity]] = {}
        for row in self.rows:
            if row.kind == kind:
                found.setdefault(row.name, {})[row.bits] = row
        return found

    def __str__(self) -> str:
        tables = {kind: self.of(kind) for kind in KINDS}
        heads = [(kind, b) for kind, found in tables.items() for b in _widths(found)]
        names = [f"{kind[0].upper()}{bits}" for kind, bits in heads]
        drops = [f"{name} drop" for name in names] if self.metric is not None else []
        rows = []
        for name, count in self.weights.items():
            cells = [tables[kind].get(name, {}).get(bits) for kind, bits in heads]
            snrs = ["" if cell is None else f"{cell.snr:.1f}" for cell in cells]
            lost = [
                "" if cell is None or cell.drop is None else f"{cell.drop:.3g}" for cell in cells
            ]
            rows.append([name, str(count), *snrs, *(lost if drops else [])])
        numbers = ["weights", *names, *drops]
        return text_table(["layer", *numbers], rows, right=numbers)

    def save(self, path: str | Path) -> None:
        """Write it as JSON, which :meth:`load` reads."""
        Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Read what :meth:`save` wrote."""
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = tuple(LayerSensitivity(**row) for row in found.pop("rows"))
        return cls(rows=rows, **found)

    def plot(self, path: str | Path) -> None:
        """Draw the signal-to-noise ratios as bars, by matplotlib.

        Raises:
            ImportError: matplotlib is missing.
        """
        pyplot = requirer("detection")("matplotlib.pyplot", "matplotlib")
        tables = {kind: found for kind in KINDS if (found := self.of(kind))}
        height = 1.5 + 0.22 * len(self.weights)
        size = (6 * len(tables), height)
        figure, axes = pyplot.subplots(1, len(tables), figsize=size, squeeze=False)
        for axis, (kind, found) in zip(axes[0], tables.items(), strict=True):
            names = list(found)
            for bits in reversed(_widths(found)):
                snrs = [found[name][bits].snr if bits in found[name] else 0 for name in names]
                axis.barh(names, [min(snr, 100.0) for snr in snrs], label=f"{bits} bits")
            axis.invert_yaxis()
            axis.set_xlabel(f"{kind}: signal-to-noise ratio of the outputs, dB")
            axis.legend()
        figure.tight_layout()
        figure.savefig(path)
        pyplot.close(figure)


def _widths(found: dict[str, dict[int, LayerSensitivity]]) -> list[int]:
    return sorted({bits for cells in found.values() for bits in cells})


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    bits: Sequence[int] = (2, 3, 4, 8),
    kinds: Sequence[str] = KINDS,
    metric: Callable[[Any], float] | None = None,
    config: QATConfig = BASE,
    reestimate: bool = True,
    forward: Callable[[Any, Any], object] | None = None,
    progress: bool = True,
) -> Sensitivity:
    """What it costs to quantize each layer's weights and inputs alone, at each width.

    The noise-to-signal ratio of the outputs: the mean over outputs of
    ``sum((y - y_float)^2) / sum((y_float - mean(y_float))^2)``. It takes a pass over the batches
    for every layer, kind and width, so a few images are enough.

    Args:
        model (nn.Module): a trained float model, which stays as it is.
        batches (iterable): of unlabelled images, as :func:`hqod_ops.quant.calibrate` takes them.
        bits (sequence of int): widths to try. Default: (2, 3, 4, 8)
        kinds (sequence of str): ``"weight"``, ``"act"`` or both. Default: both
        metric (callable, optional): ``metric(model)``, the greater the better, such as the AP on a
            part of the training images; a run of it for every layer, kind and width. Default: None
        config (QATConfig): how they are quantized, but for bits, edge layers and rules. Default:
            per channel, with scales of the least squared error
        reestimate (bool): what a re-estimation of batch normalisations repairs does not count: they
            normalise by the batch, and for the metric they are re-estimated. Default: True
        forward (callable, optional): ``forward(model, batch)`` runs one batch and returns the
            outputs to compare; of detectors, raw predictions. Default: None
        progress (bool): show a bar, if rich is installed. Default: True

    Returns:
        Sensitivity: a table, to be saved as JSON, drawn, or given to :func:`search_bits`.

    Raises:
        ValueError: there was no batch, a kind or width is unknown, outputs differ in shape, or as
            :func:`hqod_ops.quant.prepare_qat` and :func:`hqod_ops.quant.calibrate`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from hqod_ops.quant.tuning import sensitivity
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> found = sensitivity(model, [torch.rand(4, 3, 8, 8)], bits=(2, 8), progress=False)
        >>> cells = found.of("weight")["2"]
        >>> len(found.rows), cells[8].snr > cells[2].snr
        (8, True)
    """
    check_run(model, batches, forward)
    checks.function("metric", metric)
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"kinds: expected {' or '.join(KINDS)}, got {kind!r}")
    held = list(batches)
    require_batches(len(held))
    float_layers(model)  # an error, where it is prepared already
    with evaluating(model), _by_batch(model, reestimate):
        reference = outputs_of(model, held, forward)
    with evaluating(model):
        best = None if metric is None else float(metric(model))
    rows: list[LayerSensitivity] = []
    weights: dict[str, int] = {}
    other = 0.0
    for width in bits:
        changes = {"weight_bits": width, "act_bits": width, "edge_bits": width}
        settings = dataclasses.replace(config, **changes, first=(), prediction=(), overrides=())  # type: ignore[arg-type]
        made = prepare_qat(copy.deepcopy(model), settings, example=held[0]).eval()
        calibrate(made, held, forward=forward, progress=False)
        layers = {n: m for n, m in made.named_modules() if isinstance(m, QATLayer)}
        weights = {name: layer.weight.numel() for name, layer in layers.items()}
        other = summary(made).size_mb - sum(-(-n * width // 8) for n in weights.values()) / 1e6
        quantizers = [m for m in made.modules() if isinstance(m, Quantizer)]
        for quantizer in quantizers:
            quantizer.enabled = False
        cells = [(name, kind) for name in layers for kind in kinds]
        for name, kind in shown(cells, f"sensitivity, {width} bits", progress):
            layer = layers[name]
            alone = layer.weight_quantizer if kind == "weight" else layer.input_quantizer
            assert alone is not None
            alone.enabled = True
            with _by_batch(made, reestimate):
                noise = noise_of(made, reference, held, forward)
            drop = None
            if metric is not None and best is not None:
                drop = best - _metric(made, model, held, metric, reestimate, forward)
            alone.enabled = False
            rows.append(LayerSensitivity(name, kind, width, noise, drop))
    return Sensitivity(tuple(rows), weights, other, best)


@contextmanager
def _by_batch(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Batch normalisations by the statistics of the batch, if that is wanted."""
    if not wanted:
        yield
        return
    with batch_statistics(estimated_norms(model)):
        yield


def _metric(
    made: nn.Module,
    model: nn.Module,
    batches: Sequence[Any],
    metric: Callable[[Any], float],
    reestimate: bool,
    forward: Callable[[Any, Any], object] | None,
) -> float:
    """The metric, with re-estimated statistics, which are put back."""
    norms = estimated_norms(made)
    if not (reestimate and norms):
        return float(metric(made))
    saved = {name: copy.deepcopy(norm.state_dict()) for name, norm in norms.items()}
    try:
        reestimate_batch_norm(made, batches, float_model=model, forward=forward)
        with torch.no_grad():
            return float(metric(made))
    finally:
        for name, norm in norms.items():
            norm.load_state_dict(saved[name])
