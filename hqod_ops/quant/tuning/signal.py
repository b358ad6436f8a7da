"""How far the outputs of a quantized model are from those of the float model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hqod_ops.quant.batches import call


def float_leaves(outputs: Any) -> list[Tensor]:
    """The floating tensors among what a model returned."""
    return [x for x in tree_leaves(outputs) if isinstance(x, Tensor) and x.is_floating_point()]


@dataclass
class Noise:
    """Signal and noise of several outputs, summed up over batches.

    The signal of an output is its deviation from its own mean: an output that is far from 0
    everywhere, such as the logits of rare classes, says little by that.
    """

    signal: list[float] = field(default_factory=list)
    noise: list[float] = field(default_factory=list)

    def add(self, outputs: Sequence[Tensor], reference: Sequence[Tensor]) -> None:
        """Take in the outputs of one batch.

        Raises:
            ValueError: they are not alike, such as the boxes that are left of an image.
        """
        shapes = [[tuple(x.shape) for x in found] for found in (outputs, reference)]
        if shapes[0] != shapes[1] or not shapes[0]:
            raise ValueError(
                "forward: expected tensors of the same shapes from the quantized and the float "
                f"model, got {shapes[0]} and {shapes[1]}; give one that returns raw predictions, "
                "such as that of hqod_ops.quant.detection_network"
            )
        for index, (y, wanted) in enumerate(zip(outputs, reference, strict=True)):
            wanted = wanted.double()
            values = (wanted - wanted.mean()).square().sum(), (y.double() - wanted).square().sum()
            if index == len(self.signal):
                self.signal.append(0.0)
                self.noise.append(0.0)
            self.signal[index] += values[0].item()
            self.noise[index] += values[1].item()

    @property
    def ratio(self) -> float:
        """Noise over signal, the mean over the outputs."""
        pairs = list(zip(self.noise, self.signal, strict=True))
        ratios = [noise / signal if signal else float(noise > 0) for noise, signal in pairs]
        return sum(ratios) / len(ratios)


def decibel(ratio: float) -> float:
    """The signal-to-noise ratio of a noise-to-signal ratio.

    Example:
        >>> decibel(0.01), decibel(0.0)
        (20.0, inf)
    """
    return -10 * math.log10(ratio) if ratio > 0 else math.inf


@torch.no_grad()
def outputs_of(
    model: nn.Module, batches: Sequence[Any], forward: Callable[[Any, Any], object] | None
) -> list[list[Tensor]]:
    """The floating outputs of a model in the mode it is in, on the CPU, one entry a batch."""
    return [[x.cpu() for x in float_leaves(call(model, batch, forward))] for batch in batches]


def noise_of(
    model: nn.Module,
    reference: Sequence[Sequence[Tensor]],
    batches: Sequence[Any],
    forward: Callable[[Any, Any], object] | None,
) -> float:
    """The noise-to-signal ratio of a model's outputs against those of the float model."""
    noise = Noise()
    for batch, wanted in zip(batches, reference, strict=True):
        noise.add(outputs_of(model, [batch], forward)[0], wanted)
    return noise.ratio
