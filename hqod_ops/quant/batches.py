"""Running a model over batches to look at it: calibration, folding, statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from hqod_ops import checks
from hqod_ops.quant.adapters import find_adapter

_Model = TypeVar("_Model", bound=nn.Module)


def check_run(
    model: object,
    batches: object,
    forward: object = None,
    *,
    steps: object = None,
    float_model: object = None,
) -> None:
    """Check what a function that runs a model over batches is given, before anything changes.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    checks.module("model", model)
    if float_model is not None:
        checks.module("float_model", float_model)
    checks.batches("batches", batches)
    checks.function("forward", forward)
    if steps is not None:
        checks.count("steps", steps)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and afterwards for every module the mode it had."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def call(model: _Model, batch: Any, forward: Callable[[_Model, Any], object] | None) -> object:
    """Run one batch: ``forward(model, batch)``, or the model with the inputs among the batch.

    What these are an adapter may know. Else they are the batch as it is, of a tuple or list the
    first entry, a list of images (Tensor[C, H, W]) as a whole.

    Raises:
        TypeError: there is no forward, and the model does not take inputs of another kind.
    """
    if forward is not None:
        return forward(model, batch)
    adapter = find_adapter(model)
    known = None if adapter is None else adapter.arguments(model, batch)
    if isinstance(known, dict):
        return model(**known)
    if known is not None:
        return model(*known)
    inputs = _inputs(batch)
    try:
        return model(inputs)
    except (AttributeError, KeyError, TypeError) as error:
        if isinstance(inputs, (Tensor, list)):
            raise
        raise TypeError(
            f"batch: {type(model).__name__} does not take a {type(inputs).__name__} ({error}); "
            "give forward=, which runs the model on a batch"
        ) from error


def _inputs(batch: Any) -> Any:
    if not isinstance(batch, (tuple, list)) or not batch:
        return batch
    images = all(isinstance(entry, Tensor) and entry.dim() == 3 for entry in batch)
    return batch if images and isinstance(batch, list) else batch[0]
