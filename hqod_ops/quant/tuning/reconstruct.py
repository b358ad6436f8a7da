"""Inputs and outputs of a part of a model, held on the CPU, and the error of running it on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hqod_ops.quant.batches import call
from hqod_ops.quant.quantizers import reset_levels
from hqod_ops.quant.tuning.blocks import Part
from hqod_ops.quant.tuning.pairs import hooked


@dataclass
class Example:
    """One batch: what a part was given and returned, one entry a call."""

    inputs: list[Tensor]
    float_inputs: list[Tensor]
    outputs: list[Tensor]
    """Of the float model."""

    def bytes(self) -> int:
        """Their size."""
        tensors = (*self.inputs, *self.float_inputs, *self.outputs)
        return sum(t.numel() * t.element_size() for t in tensors)


@dataclass
class Cache:
    """Examples of a part, as many as fit.

    Args:
        megabytes (float): how many may be held.
    """

    megabytes: float
    examples: list[Example] = field(default_factory=list)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def full(self) -> bool:
        """Whether another one like the last would not fit."""
        if not self.examples:
            return False
        used = sum(example.bytes() for example in self.examples)
        return used + self.examples[-1].bytes() > 1e6 * self.megabytes


class _Reached(Exception):
    """The part was run as often as it is called: the rest of the model is not needed."""


@torch.no_grad()
def record(
    model: nn.Module,
    float_model: nn.Module,
    part: Part,
    batches: Sequence[Any],
    forward: Callable[[Any, Any], object] | None,
    cache: Cache,
) -> None:
    """Fill a cache: the part's inputs in both models, and the float model's outputs."""
    for batch in batches:
        if cache.full():
            return
        float_inputs, outputs = _run(float_model, part, batch, forward)
        inputs, _ = _run(model, part, batch, forward, calls=len(outputs))
        cache.device = next(iter(model.parameters())).device
        cache.examples.append(Example(inputs, float_inputs, outputs))


def _run(
    model: nn.Module,
    part: Part,
    batch: Any,
    forward: Callable[[Any, Any], object] | None,
    calls: int | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs of a part; with the number of its calls known, the outputs are not."""
    first, last = part.names[0], part.names[-1]
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def before(name: str, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0].detach().cpu().clone())
        if len(inputs) == calls:
            raise _Reached

    def after(name: str, args: Any, output: Tensor) -> None:
        outputs.append(output.detach().cpu().clone())

    try:
        with (
            hooked({first: model.get_submodule(first)}, before=before),
            hooked({last: model.get_submodule(last)}, after=after),
        ):
            call(model, batch, forward)
    except _Reached:
        pass
    return inputs, outputs


def replay(modules: Sequence[nn.Module], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a part for the inputs of all its calls in one forward pass."""
    for module in modules:
        reset_levels(module)
    outputs = []
    for x in inputs:
        for module in modules:
            x = module(x)
        outputs.append(x)
    return outputs


class Objective:
    """The error of a part on the examples of a cache.

    Args:
        cache (Cache): with at least one example.
        batch_size (int): images of one step.
        seed (int): of the choice of images.
    """

    def __init__(self, cache: Cache, batch_size: int, seed: int) -> None:
        self._examples, self._device = cache.examples, cache.device
        self._size = batch_size
        self.generator = torch.Generator().manual_seed(seed)
        outputs = [y.double() for example in self._examples for y in example.outputs]
        count = sum(y.numel() for y in outputs)
        mean = sum(float(y.sum()) for y in outputs) / max(count, 1)
        power = sum(float((y - mean).square().sum()) for y in outputs)
        self._variance = power / max(count, 1) or 1.0
        self._unit = 1.0

    def start(self, modules: Sequence[nn.Module]) -> float:
        """:meth:`error`, which :meth:`loss` is relative to from now on."""
        error = self.error(modules)
        self._unit = error or 1.0
        return error

    @torch.no_grad()
    def error(self, modules: Sequence[nn.Module]) -> float:
        """Squared error of the part's outputs on all examples, relative to their variance."""
        noise, count = 0.0, 0
        for example in self._examples:
            outputs = replay(modules, [x.to(self._device) for x in example.inputs])
            for y, wanted in zip(outputs, example.outputs, strict=True):
                noise += float((y.cpu() - wanted).double().square().sum())
                count += wanted.numel()
        totals = torch.tensor([noise / self._variance, float(count)], dtype=torch.float64)
        if _several():
            dist.all_reduce(totals)
        return float(totals[0] / totals[1].clamp(min=1))

    def loss(self, modules: Sequence[nn.Module], drop: float) -> Tensor:
        """The error on some images of one example."""
        index = int(torch.randint(len(self._examples), (), generator=self.generator))
        example = self._examples[index]
        images = len(example.inputs[0])
        chosen = torch.randperm(images, generator=self.generator)[: self._size]
        inputs = []
        for x, exact in zip(example.inputs, example.float_inputs, strict=True):
            pick = x[chosen] if len(x) == images else x
            if drop:
                exact = exact[chosen] if len(x) == images else exact
                left = torch.rand(pick.shape, generator=self.generator) < drop
                pick = torch.where(left, exact, pick)
            inputs.append(pick.to(self._device))
        outputs = replay(modules, inputs)
        wanted = [y[chosen] if len(y) == images else y for y in example.outputs]
        noise = torch.stack(
            [(y - other.to(y)).square().sum() for y, other in zip(outputs, wanted, strict=True)]
        ).sum()
        count = sum(y.numel() for y in wanted)
        return noise / (self._variance * max(count, 1) * self._unit)

    def average(self, grads: Sequence[Tensor | None]) -> None:
        """Average gradients over processes."""
        if _several():
            found = [grad for grad in grads if grad is not None]
            flat = torch.cat([grad.flatten() for grad in found])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            for grad, part in zip(found, flat.split([g.numel() for g in found]), strict=True):
                grad.copy_(part.view_as(grad))


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()
