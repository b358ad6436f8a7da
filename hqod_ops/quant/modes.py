"""In which modes a model runs over the batches of a calibration."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hqod_ops.quant.batches import call, evaluating
from hqod_ops.quant.quantizers.base import Quantizer
from hqod_ops.quant.quantizers.calls import reset_levels

MODES = ("auto", "eval", "train")


class CalibrationRuns:
    """Runs a model over batches; buffers and modes are afterwards as they were.

    Args:
        model (nn.Module): a prepared model.
        mode (str): of :data:`MODES`, see :func:`hqod_ops.quant.calibrate`.
        inputs (sequence of Quantizer): those whose data is looked at.
        forward (callable, optional): ``forward(model, batch)`` runs a batch. Default: None
    """

    def __init__(
        self,
        model: nn.Module,
        mode: str,
        inputs: Sequence[Quantizer],
        forward: Callable[[Any, Any], object] | None,
    ) -> None:
        self._model, self._mode, self._inputs, self._forward = model, mode, inputs, forward
        self._training = {module: module.training for module in model.modules()}
        self._in_training: set[Quantizer] = set()
        """The quantizers that data reaches in training mode alone."""
        self._first = True
        self._stack = ExitStack()
        self.problem: str | None = None
        """Why the model did not run in training mode."""

    def __enter__(self) -> CalibrationRuns:
        self._stack.enter_context(evaluating(self._model))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def run(self, batch: Any, *, spare: Callable[[], set[Quantizer]]) -> None:
        """Run a batch.

        Args:
            batch: the batch.
            spare (callable): the quantizers that need no data.
        """
        if self._mode == "train":
            with self._training_mode():
                self._call(batch)
            return
        if self._mode == "auto" and self._first:
            with _watched_statistics(self._training):
                self._call(batch)
        else:
            self._call(batch)
        self._first = False
        if self._mode == "eval" or self.problem is not None:
            return
        unseen = {q for q in self._inputs if not q.has_seen} - spare()
        self._in_training |= unseen
        if self._in_training:
            rest = [q for q in self._inputs if q not in self._in_training]
            try:
                with _paused(rest), self._training_mode():
                    self._call(batch)
            except Exception as error:  # as of a detector that wants targets
                self.problem = f"{type(error).__name__}: {error}".partition("\n")[0]
            self._in_training = {q for q in self._in_training if q.has_seen}

    def _call(self, batch: Any) -> None:
        reset_levels(self._model)
        call(self._model, batch, self._forward)

    @contextmanager
    def _training_mode(self) -> Iterator[None]:
        """Training mode, with what is fixed in it; statistics that it updates are put back."""
        if self._training[self._model]:
            for module, mode in self._training.items():
                module.training = mode
        else:
            self._model.train()
        kept = [(buffer, buffer.clone()) for buffer in self._model.buffers()]
        try:
            with torch.random.fork_rng(devices=[]):
                yield
        finally:
            for buffer, value in kept:
                buffer.copy_(value)
            self._model.eval()


@contextmanager
def _paused(quantizers: Sequence[Quantizer]) -> Iterator[None]:
    """Let quantizers neither observe nor quantize for a while."""
    kept = [(quantizer, quantizer._observers, quantizer.enabled) for quantizer in quantizers]
    try:
        for quantizer in quantizers:
            quantizer._observers, quantizer.enabled = None, False
        yield
    finally:
        for quantizer, observers, enabled in kept:
            quantizer._observers, quantizer.enabled = observers, enabled


MISFIT = 4.0
"""A variance that is so many times another's, or a part of it, does not fit it."""


@contextmanager
def _watched_statistics(training: dict[nn.Module, bool]) -> Iterator[None]:
    """Warn where batch norms that train have running statistics far from those of their batch."""
    misfits: list[bool] = []

    def look(norm: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if x.dim() > 2 and x.numel() > 8 * x.shape[1]:
            var = x.float().var(dim=[0, *range(2, x.dim())])
            ratio = (var + norm.eps) / (norm.running_var.float() + norm.eps)
            misfits.append(bool((ratio.log().abs().median() > torch.tensor(MISFIT).log()).item()))

    norms: list[Any] = [m for m in training if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    any_trains = any(training[norm] for norm in norms)
    handles = [
        norm.register_forward_pre_hook(look)
        for norm in norms
        if norm.running_var is not None
        and norm.num_batches_tracked is not None
        and bool(norm.num_batches_tracked > 0)  # else it is a model of random weights
        and (training[norm] or not any_trains)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if sum(misfits) * 4 > len(misfits):
        warnings.warn(
            f"calibrate: the running statistics of {sum(misfits)} of {len(misfits)} batch norms do "
            f"not fit the first batch (variances differ by {MISFIT:.0f} times and more), so that "
            "the scales found in eval mode will not fit training: train the float model longer, "
            'give batches like its training data, or calibrate with mode="train"',
            stacklevel=7,
        )
