"""Post-training quantization in one call, with a report of what each step changed."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hqod_ops import checks
from hqod_ops.quant.batches import check_run, evaluating
from hqod_ops.quant.calibrate import calibrate
from hqod_ops.quant.config import QATConfig
from hqod_ops.quant.config.qat_config import get_config
from hqod_ops.quant.patterns import Patterns
from hqod_ops.quant.prepare import prepare_qat
from hqod_ops.quant.quantizers.registry import default_observer
from hqod_ops.quant.summary import summary
from hqod_ops.quant.tuning.batch_norm import estimated_norms, reestimate_batch_norm
from hqod_ops.quant.tuning.bias import correct_bias
from hqod_ops.quant.tuning.rounding import PartResult, learn_rounding
from hqod_ops.quant.tuning.running import require_batches
from hqod_ops.quant.tuning.signal import decibel, noise_of, outputs_of
from hqod_ops.tables import text_table

_Model = TypeVar("_Model", bound=nn.Module)

CHECKED = 2
"""Batches whose outputs tell whether a step is kept."""


@dataclass(frozen=True)
class StepReport:
    """One step of :func:`quantize`.

    Attributes:
        step (str), did (str): its name, and what it did.
        snr (float): signal-to-noise ratio of the outputs after it in dB, over the first batches;
            NaN where outputs cannot be compared, such as boxes after selection.
        seconds (float): how long it took.
    """

    step: str
    did: str
    snr: float
    seconds: float


@dataclass(frozen=True)
class Report:
    """What :func:`quantize` did; ``print`` shows it as a table.

    Attributes:
        steps (tuple of StepReport): in their order.
        parts (tuple of PartResult): what learning the rounding did for each part.
        size_mb (float), float_size_mb (float): see :class:`hqod_ops.quant.summary.Summary`.
    """

    steps: tuple[StepReport, ...]
    parts: tuple[PartResult, ...] = ()
    size_mb: float = 0.0
    float_size_mb: float = 0.0

    def __str__(self) -> str:
        rows = [
            [s.step, s.did, "" if math.isnan(s.snr) else f"{s.snr:.1f}", f"{s.seconds:.1f}"]
            for s in self.steps
        ]
        table = text_table(["step", "did", "snr dB", "s"], rows, right=["snr dB", "s"])
        return f"{table}\n{self.size_mb:.3g} MB, in float {self.float_size_mb:.3g} MB"

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=1), encoding="utf-8")


def quantize(
    model: _Model,
    batches: Iterable[Any],
    config: QATConfig | str = "hqod_w4a4",
    *,
    first: Patterns | None = None,
    prediction: Patterns | None = None,
    reestimate: bool = True,
    correct: bool = True,
    learn: bool | Mapping[str, Any] = False,
    forward: Callable[[Any, Any], object] | None = None,
    progress: bool = True,
) -> tuple[_Model, Report]:
    """Post-training quantization in one call: a trained model and unlabelled images.

    :func:`hqod_ops.quant.prepare_qat`, :func:`hqod_ops.quant.calibrate`,
    :func:`reestimate_batch_norm` against the float model, :func:`learn_rounding` if it is wanted,
    and :func:`correct_bias`. Scales start from the least squared error (``"mse"``) where the
    configuration does not say otherwise and the quantizer has no start of its own.

    A step after which the outputs of the first batches are further from those in float is taken
    back, and the report says so: at 8 bits there may be nothing to gain, and a few hundred images
    are not the training set.

    Args:
        model (nn.Module): a trained float model, changed in place.
        batches (iterable): of unlabelled images, as :func:`hqod_ops.quant.calibrate` takes them; a
            few hundred images, which are held.
        config (QATConfig or str), first (str or sequence of str, optional),
            prediction (str or sequence of str, optional): see :func:`hqod_ops.quant.prepare_qat`.
        reestimate (bool), correct (bool): whether to do these steps. Default: True
        learn (bool or mapping): whether to learn the rounding, or with which arguments of
            :func:`learn_rounding`. Default: False
        forward (callable, optional): ``forward(model, batch)`` runs one batch. Where it returns raw
            predictions, the report can say how much each step changed. Default: None
        progress (bool): show bars, if rich is installed. Default: True

    Returns:
        nn.Module, Report: the same object, in eval mode, and what was done.

    Raises:
        ValueError, TypeError, RuntimeError: as the steps.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from hqod_ops.quant.tuning import quantize
        >>> layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> batches = [torch.rand(4, 3, 8, 8) for _ in range(2)]
        >>> model, report = quantize(
        ...     nn.Sequential(*layers), batches, first="0", prediction="3", progress=False
        ... )
        >>> [step.step for step in report.steps]
        ['calibrate', 're-estimate', 'correct bias']
    """
    check_run(model, batches, forward)
    for name, flag in (("reestimate", reestimate), ("correct", correct), ("progress", progress)):
        checks.flag(name, flag)
    if not isinstance(learn, (bool, Mapping)):
        raise TypeError(f"learn: expected a bool or a mapping of arguments, got {learn!r}")
    held = list(batches)
    require_batches(len(held))  # before the model is changed
    float_model = copy.deepcopy(model).eval()
    config = _with_least_error(get_config(config))
    prepare_qat(model, config, first=first, prediction=prediction, example=held[0])
    model.eval()
    watch = _Clock(model, float_model, held[:CHECKED], forward)

    with watch.step("calibrate") as did:
        calibrate(model, held, forward=forward, progress=progress)
        table = summary(model)
        did.append(f"{len(table)} layers, {_bits(table)}")
    norms = len(estimated_norms(model))
    if reestimate and norms:
        with watch.step("re-estimate") as did:
            reestimate_batch_norm(model, held, float_model=float_model, forward=forward)
            did.append(f"{norms} batch normalisations")
    parts: list[PartResult] = []
    if learn or isinstance(learn, Mapping):
        options = dict(learn) if isinstance(learn, Mapping) else {}
        with watch.step("learn rounding") as did:
            shared = {"forward": forward, "progress": progress, "report": parts.append}
            learn_rounding(model, float_model, held, **{**shared, **options})
            changed = sum(part.changed for part in parts)
            total = sum(part.weights for part in parts)
            did.append(f"{len(parts)} parts, {changed / max(total, 1):.1%} of the codes")
    if correct:
        with watch.step("correct bias") as did:
            before = _biases(model)
            correct_bias(model, float_model, held, forward=forward)
            moved = sum(
                not torch.equal(value, before.get(name, torch.zeros_like(value)))
                for name, value in _biases(model).items()
            )
            did.append(f"{moved} biases")
    sizes = summary(model)
    report = Report(tuple(watch.steps), tuple(parts), sizes.size_mb, sizes.float_size_mb)
    return model, report


def _with_least_error(config: QATConfig) -> QATConfig:
    """Scales from the least squared error, where nothing else is said."""
    inits: dict[str, Any] = {}
    for kind, usual in (("weight", "minmax"), ("act", "ema_mse")):
        own = default_observer(kind, getattr(config, f"{kind}_quantizer"))
        if getattr(config, f"{kind}_init") is None and own == usual:
            inits[f"{kind}_init"] = "mse"
    return dataclasses.replace(config, **inits)


def _bits(rows: Sequence[Any]) -> str:
    """Bits of weights and inputs, as a span where they differ."""
    words = []
    for letter, kind in (("W", "weight_bits"), ("A", "act_bits")):
        found = sorted({getattr(row, kind) for row in rows})
        words.append(letter + "-".join(str(bits) for bits in dict.fromkeys((found[0], found[-1]))))
    return " ".join(words)


def _biases(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.detach().clone()
        for name, value in model.state_dict().items()
        if name.rpartition(".")[2] in ("bias", "running_mean")
    }


class _Clock:
    """Times steps, and compares the model's outputs after each with those in float."""

    def __init__(
        self,
        model: nn.Module,
        float_model: nn.Module,
        batches: Sequence[Any],
        forward: Callable[[Any, Any], object] | None,
    ) -> None:
        self.steps: list[StepReport] = []
        self._best = math.nan
        self._model, self._batches, self._forward = model, batches, forward
        with evaluating(float_model):
            self._reference = outputs_of(float_model, batches, forward)

    @contextmanager
    def step(self, name: str) -> Iterator[list[str]]:
        """A step, to be told what it did; taken back if it made the outputs worse."""
        did: list[str] = []
        saved = copy.deepcopy(self._model.state_dict()) if self.steps else None
        start = time.monotonic()
        yield did
        ratio = self._ratio()
        if saved is not None and ratio > self._best:
            _restore(self._model, saved)
            did.append("taken back, the outputs were worse")
            ratio = self._best
        self._best = ratio
        snr = math.nan if math.isnan(ratio) else decibel(ratio)
        self.steps.append(StepReport(name, "; ".join(did), snr, time.monotonic() - start))

    def _ratio(self) -> float:
        with evaluating(self._model):
            try:
                return noise_of(self._model, self._reference, self._batches, self._forward)
            except ValueError:  # boxes after selection, say: they differ in number
                return math.nan


def _restore(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """A state of before, without the biases that were made since."""
    for name, module in model.named_modules():
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor) and f"{name}.bias".lstrip(".") not in state:
            module.bias = None
    model.load_state_dict(state)
