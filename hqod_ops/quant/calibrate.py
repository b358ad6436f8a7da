"""calibrate: the first scales, from weights and data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from operator import length_hint
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hqod_ops.quant.batches import check_run
from hqod_ops.quant.modes import MODES, CalibrationRuns
from hqod_ops.quant.nn.derived import current
from hqod_ops.quant.nn.layers import QATLayer
from hqod_ops.quant.observers import gather
from hqod_ops.quant.quantizers.base import Observed, Quantizer

_Model = TypeVar("_Model", bound=nn.Module)

UNSEEN = ("error", "float")


@torch.no_grad()
def calibrate(
    model: _Model,
    batches: Iterable[Any],
    steps: int | None = None,
    *,
    forward: Callable[[_Model, Any], object] | None = None,
    mode: str = "auto",
    unseen: str = "error",
    progress: bool = True,
    distributed: bool = True,
    group: dist.ProcessGroup | None = None,
) -> _Model:
    """Set every scale of a prepared model, from its weights and from the inputs of its layers.

    The model runs over the batches with fake quantization off; then scales, signs of the inputs and
    numbers of levels are set, whatever they were before. The scales of the weights are set here
    too, so load a float checkpoint before. Where no input is quantized, one batch is
    enough. A weight that no call of its layer uses, as where other code reads ``layer.weight``
    itself, is never quantized: a warning names it.

    Batches should be training images, 256 in the official code, on the device of the model. In a
    distributed run every process calls it, with batches of its own or with none, before the model
    is wrapped: what was seen is put together, and all processes get the same scales, to the bit
    (those of the weights are the first process's).

    An average of the model, such as ``torch.optim.swa_utils.AveragedModel``, is to be made after
    it: the number of scales changes here. A compiled model runs uncompiled.

    Args:
        model (nn.Module): a model from :func:`prepare_qat`.
        batches (iterable): of batches. Without a ``forward``, each is passed to the model as it is,
            of a tuple or list the first entry, a list of images (Tensor[C, H, W]) as a whole; a
            detector of a library takes what that library's loaders give: (images, targets) of
            torchvision, a dict with ``"img"`` of Ultralytics, with ``"pixel_values"`` of
            Transformers.
        steps (int, optional): so many batches at most. Default: None, all
        forward (callable, optional): ``forward(model, batch)`` runs one batch. Default: None
        mode (str): in which mode the model runs: ``"eval"``, as it will be used; ``"train"``, with
            the statistics of each batch, for batch norms whose running statistics do not fit;
            ``"auto"``, as ``"eval"``, and in training mode besides for the layers which that does
            not reach. It warns where running statistics do not fit. In training mode a detector may
            want batches with targets. Buffers stay as they were. Default: ``"auto"``
        unseen (str): what becomes of layers that no data reached: ``"error"`` names them all,
            ``"float"`` leaves them in float, with a warning. One that has the weight of another
            layer which data reached, such as the copies of heads that some DETRs keep, is left in
            any case. Default: ``"error"``
        progress (bool): show a bar, if rich is installed. Default: True
        distributed (bool): exchange what was seen where ``torch.distributed`` is initialised; False
            for a process that calibrates alone. Default: True
        group (ProcessGroup, optional): the processes that take part. Default: None, all

    Returns:
        nn.Module: the same object, in the training or eval mode it had.

    Raises:
        ValueError: the model is not prepared, or wrapped in ``DistributedDataParallel``; there was
            no batch, layers were never reached (naming them), an input held NaN, steps is less than
            1, mode or unseen is unknown. The scales are then as they were.
        TypeError: the model does not take a batch as it is, a dict for one, and forward is missing.
        RuntimeError: calibration failed in another process.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from hqod_ops.quant import calibrate, prepare_qat
        >>> model = prepare_qat(nn.Sequential(nn.Conv2d(3, 8, 3)), "w8a8")
        >>> model = calibrate(model, [torch.rand(1, 3, 8, 8)], progress=False)
        >>> model[0].input_quantizer.codes()
        (0, 255)
    """
    check_run(model, batches, forward, steps=steps)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "model: expected a model that is not wrapped in DistributedDataParallel yet: "
            "calibration changes the number of scales"
        )
    for name, value, allowed in (("mode", mode, MODES), ("unseen", unseen, UNSEEN)):
        if value not in allowed:
            raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QATLayer)}
    weights = {m.weight_quantizer: m for m in layers.values() if m.weight_quantizer is not None}
    inputs = [q for q in model.modules() if isinstance(q, Quantizer) and q not in weights]
    if not weights and not inputs:
        raise ValueError("model: expected a model from prepare_qat, it has no quantizer")

    # Compiled code would be compiled for this alone, and break at the observers.
    eager = torch.compiler.set_stance("force_eager")
    runs = CalibrationRuns(model, mode, inputs, forward)
    with eager, runs, _observing(weights, inputs):
        some = _progress(batches, steps) if progress else islice(batches, steps)
        seen = _look(runs, weights, inputs, some, _copies(layers))
        everyone = gather(seen, group) if distributed else [seen]
        _raise_failures(seen, everyone, bool(inputs))
        _merge(inputs, everyone)
        copies = _copies(layers)()
        observed = dict(zip(weights, everyone[0].weights, strict=True))
        scales = {quantizer: quantizer.observed_scale() for quantizer in inputs}
    left_out = _left_out(layers, scales, copies, unseen, runs.problem)
    _warn_unused(weights, everyone, left_out)
    for quantizer, values in {**observed, **scales}.items():
        if quantizer in left_out or values is None:
            quantizer.leave_out()
        else:
            quantizer.set_scale(*values)
    return model


@dataclass
class _Seen:
    """What one process saw, or why it failed."""

    weights: list[Observed] = field(default_factory=list)
    """What calibration is to set for each weight."""
    inputs: list[list[Any]] = field(default_factory=list)
    """The observers' statistics of every input and level."""
    used: list[bool] = field(default_factory=list)
    """Whether each weight was used."""
    batches: int = 0
    error: Exception | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Not every exception survives pickling; its text does.
        error = None if self.error is None else RuntimeError(f"{self.error}")
        return {**self.__dict__, "error": error}


@contextmanager
def _observing(weights: Iterable[Quantizer], inputs: Iterable[Quantizer]) -> Iterator[None]:
    """Weights unquantized, and observers at the inputs."""
    enabled = {quantizer: quantizer.enabled for quantizer in weights}
    try:
        for quantizer in enabled:
            quantizer.enabled = False
        for quantizer in inputs:
            quantizer.start_observing()
        yield
    finally:
        for quantizer in inputs:
            quantizer.stop_observing()
        for quantizer, flag in enabled.items():
            quantizer.enabled = flag


def _look(
    runs: CalibrationRuns,
    weights: dict[Quantizer, QATLayer],
    inputs: list[Quantizer],
    batches: Iterable[Any],
    spare: Callable[[], set[Quantizer]],
) -> _Seen:
    """The statistics of this process. An error is kept: the other processes wait for an answer."""
    seen = _Seen()
    try:
        seen.weights = [_weight_scale(q, current(layer)) for q, layer in weights.items()]
        with _noting_use(weights) as used:
            # Without inputs to look at, one batch shows which weights are used.
            for batch in batches if inputs else islice(batches, 1):
                runs.run(batch, spare=spare)
                seen.batches += 1
        seen.used = [quantizer in used for quantizer in weights]
        seen.inputs = [quantizer.observed_state() for quantizer in inputs]
    except Exception as error:
        seen.error = error
    return seen


def _raise_failures(seen: _Seen, everyone: list[_Seen], inputs: bool) -> None:
    if seen.error is not None:
        raise seen.error
    for rank, other in enumerate(everyone):
        if other.error is not None:
            raise RuntimeError(f"calibration failed in process {rank}: {other.error}")
    if inputs and not any(other.batches for other in everyone):
        raise ValueError("batches: expected at least one batch, got none")


@contextmanager
def _noting_use(weights: Iterable[Quantizer]) -> Iterator[set[nn.Module]]:
    """The quantizers of weights that are called."""
    used: set[nn.Module] = set()

    def note(quantizer: nn.Module, _args: Any) -> None:
        used.add(quantizer)

    handles = [quantizer.register_forward_pre_hook(note) for quantizer in weights]
    try:
        yield used
    finally:
        for handle in handles:
            handle.remove()


def _copies(layers: Mapping[str, QATLayer]) -> Callable[[], set[Quantizer]]:
    """A function that says which inputs were not seen of layers whose weight is that of another,
    which was."""
    by_weight: dict[int, list[QATLayer]] = {}
    for layer in layers.values():
        by_weight.setdefault(id(layer.weight), []).append(layer)
    tied = [group for group in by_weight.values() if len(group) > 1]

    def copies() -> set[Quantizer]:
        found: set[Quantizer] = set()
        for group in tied:
            inputs = {q for layer in group if (q := layer.input_quantizer) is not None}
            unseen = {quantizer for quantizer in inputs if not quantizer.has_seen}
            if unseen != inputs:
                found |= unseen
        return found

    return copies


def _left_out(
    layers: Mapping[str, QATLayer],
    scales: Mapping[Quantizer, Observed | None],
    copies: set[Quantizer],
    unseen: str,
    problem: str | None,
) -> set[Quantizer]:
    """The quantizers of inputs that no data reached, and of the weights of these layers.

    Raises:
        ValueError: there are some that are no copies, where that is an error.
    """
    missing = {quantizer for quantizer, scale in scales.items() if scale is None}
    names = [name for name, layer in layers.items() if layer.input_quantizer in missing - copies]
    readers = {layer.input_quantizer for layer in layers.values()}
    names += [quantizer.label for quantizer in missing if quantizer not in readers]
    if names and unseen == "error":
        several = len(names) > 1
        raise ValueError(
            f"{', '.join(names)}: no data reached {'these layers' if several else 'this layer'} in "
            "calibration (also where other code reads its weight and does not call it); give a "
            'forward that runs it, leave it in float by unseen="float" or leave it out with '
            f"Rule({names[0]!r}, skip=True)"
            + (f". In training mode the model failed: {problem}" if problem else "")
        )
    if names:
        warnings.warn(
            f"{', '.join(names)}: no data reached these layers in calibration, they stay in float",
            stacklevel=4,
        )
    of_weights = {
        quantizer
        for layer in layers.values()
        if layer.input_quantizer in missing and (quantizer := layer.weight_quantizer) is not None
    }
    return missing | of_weights


def _warn_unused(
    weights: Iterable[Quantizer], everyone: list[_Seen], left_out: set[Quantizer]
) -> None:
    if not any(seen.batches for seen in everyone):
        return
    used = [any(flags) for flags in zip(*(seen.used for seen in everyone), strict=True)]
    unused = [q for q, flag in zip(weights, used, strict=True) if not flag and q not in left_out]
    names = [quantizer.label.removesuffix(".weight_quantizer") for quantizer in unused]
    if names:
        warnings.warn(
            f"{', '.join(names)}: the weight has a quantizer, but no call of the layer used it in "
            "calibration: other code reads the weight itself, and stays in float, or the forward "
            f"leaves the layer out. Call the layer, or leave it out with Rule({names[0]!r}, "
            "skip=True)",
            stacklevel=4,
        )


def _merge(inputs: list[Quantizer], everyone: list[_Seen]) -> None:
    """Give the observers what all processes saw."""
    if len(everyone) > 1:
        for index, quantizer in enumerate(inputs):
            quantizer.merge_observed([other.inputs[index] for other in everyone])


def _weight_scale(quantizer: Quantizer, weight: Tensor) -> Observed:
    quantizer.start_observing()
    try:
        quantizer(weight)
        observed = quantizer.observed_scale()
    finally:
        quantizer.stop_observing()
    if observed is None:
        raise ValueError(f"{quantizer.label}: expected a weight, got an empty tensor")
    return observed


def _progress(batches: Iterable[Any], steps: int | None) -> Iterable[Any]:
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return islice(batches, steps)
    known = [count for count in (length_hint(batches, 0), steps or 0) if count]
    return track(
        islice(batches, steps),
        "calibrate",
        total=min(known, default=None),
        console=Console(stderr=True),
        transient=True,
        show_speed=False,
    )
