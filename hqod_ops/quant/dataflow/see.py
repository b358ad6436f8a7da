"""The dataflow of a prepared model, seen in runs of it in eval and in training mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hqod_ops.quant.batches import call, evaluating
from hqod_ops.quant.dataflow.graph import Dataflow
from hqod_ops.quant.dataflow.run import run_dataflow
from hqod_ops.quant.dataflow.trace import LAYERS, add_passes
from hqod_ops.quant.quantizers.base import Quantizer


def see_dataflow(
    model: nn.Module, batch: Any, forward: Callable[[Any, Any], object] | None
) -> Dataflow:
    """Run a prepared model on a batch, unquantized.

    Args:
        model (nn.Module): a prepared model, which stays as it is, buffers included.
        batch: such as :func:`hqod_ops.quant.calibrate` takes them.
        forward (callable, optional): ``forward(model, batch)`` runs it.
    """
    layers = [m for m in model.modules() if isinstance(m, LAYERS)]
    passes = []
    with torch.no_grad(), _unquantized(model), evaluating(model):
        for training in (False, True):
            with _buffers_kept(model), torch.random.fork_rng(devices=[]):
                model.train(training)
                try:
                    passes.append(
                        run_dataflow(model, set(layers), lambda: call(model, batch, forward))
                    )
                except Exception:
                    if not training:
                        raise
                    # A detector may want targets: what it does in training is then not known.
    result = Dataflow()
    add_passes(result, layers, passes)
    return result


@contextmanager
def _unquantized(model: nn.Module) -> Iterator[None]:
    enabled = {m: m.enabled for m in model.modules() if isinstance(m, Quantizer)}
    try:
        for quantizer in enabled:
            quantizer.enabled = False
        yield
    finally:
        for quantizer, flag in enabled.items():
            quantizer.enabled = flag


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)
