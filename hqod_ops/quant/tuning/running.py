"""What the functions of this folder share: passes over batches, in one process or several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from operator import length_hint
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch import nn

from hqod_ops import checks
from hqod_ops.quant.observers import gather

_Model = TypeVar("_Model", bound=nn.Module)
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def network(model: _Model) -> _Model:
    """The model itself, where ``DistributedDataParallel`` wraps it.

    Its wrapper synchronises buffers in every call, so that processes with different numbers of
    batches would wait for each other for ever.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return cast(_Model, model.module)
    return model


def check_unwrapped(model: nn.Module) -> None:
    """Check that biases can be made: a wrapper would not know of them.

    Raises:
        ValueError: the model is wrapped in ``DistributedDataParallel``.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "model: expected a model that is not wrapped in DistributedDataParallel yet: it may "
            "get biases"
        )


def limited(batches: Iterable[_Item], steps: int | None) -> Iterable[_Item]:
    """So many batches at most.

    Raises:
        ValueError: steps is less than 1.
    """
    if steps is None:
        return batches
    checks.count("steps", steps)
    known = length_hint(batches, 0)
    return _Limited(batches, steps if not known else min(steps, known))


class _Limited(Iterable[_Item]):
    """The first entries of an iterable, with a length for progress bars."""

    def __init__(self, items: Iterable[_Item], count: int) -> None:
        self._items, self._count = items, count

    def __iter__(self) -> Iterator[_Item]:
        return islice(iter(self._items), self._count)

    def __length_hint__(self) -> int:
        return self._count


def shown(items: Iterable[_Item], text: str, progress: bool = True) -> Iterable[_Item]:
    """The items, with a bar on standard error while they are taken, if rich is installed."""
    if not progress:
        return items
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return items
    return track(
        items,
        text,
        total=length_hint(items, 0) or None,
        console=Console(stderr=True),
        transient=True,
        show_speed=False,
    )


def together(
    work: Callable[[], _Result], doing: str, group: dist.ProcessGroup | None = None
) -> list[_Result]:
    """What the work gives in every process, in the order of ranks.

    An error in one process is one in all of them, where the others would wait for ever.

    Args:
        work (callable): without collective operations; its result pickles, tensors on the CPU.
        doing (str): what it does, for the error of the other processes.
        group (ProcessGroup, optional): default: None, all processes

    Raises:
        RuntimeError: it failed in another process; an error of this one is raised as it is.
    """
    error: Exception | None = None
    result: Any = None
    try:
        result = work()
    except Exception as failure:
        error = failure
    # Not every exception survives pickling; its text does.
    everyone = gather((result, None if error is None else str(error)), group)
    if error is not None:
        raise error
    for rank, (_, text) in enumerate(everyone):
        if text is not None:
            raise RuntimeError(f"{doing} failed in process {rank}: {text}")
    return [found for found, _ in everyone]


def require_batches(count: int) -> int:
    """The number of batches that all processes saw.

    Raises:
        ValueError: there was none.
    """
    if not count:
        raise ValueError("batches: expected at least one batch, got none")
    return count
