"""Entries of fake quantization with a learned scale (LSQ, 4 bits)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import hqod_ops
from bench import peers
from bench.entry import Entry, Inputs
from bench.machine import keeps_memory
from hqod_ops.reference import lsq_grad_scale

WEIGHT_RANGE = (-8, 7)
ACTIVATION_RANGE = (0, 15)
WEIGHTS = ((64, 64, 3, 3), (256, 256, 3, 3), (512, 2048, 1, 1), (2048, 512, 3, 3))
SMALL_ACTIVATION, LARGE_ACTIVATION = (8, 256, 64, 64), (16, 256, 100, 152)
FLOAT = 4
FRESH = 32 * 2**20
"""From this size on, glibc maps and faults in the pages of every new tensor."""


def make_pair(
    shape: tuple[int, ...], limits: tuple[int, int], axis: int | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A tensor and its scale as LSQ starts it, a few elements of it clipped.

    Elements near a rounding tie or within half a step beyond the range are moved: there the peers
    differ by a step, rightly, and nothing else could be compared.
    """
    low, high = limits
    x = torch.randn(shape, generator=generator)
    if low == 0:
        x.relu_()
    # LSQ's start, 2 mean|x| / sqrt(high), halved: with it a normal tensor would clip nothing.
    step = x.abs().mean() / high**0.5
    channels = 1 if axis is None else shape[axis]
    scale = step * (torch.rand(channels, generator=generator) * 0.4 + 0.8)
    along = [-1 if i == axis else 1 for i in range(len(shape))]
    code = x.div_(scale.reshape(along))
    whole = code.round()
    code = (code - whole).clamp_(-0.45, 0.45).add_(whole)
    code = torch.where((code > high) & (code < high + 1), high - 0.3, code)
    code = torch.where((code < low) & (code > low - 1), low + 0.3, code)
    return code.mul_(scale.reshape(along)), scale


def _inputs(
    shape: tuple[int, ...], limits: tuple[int, int], axis: int | None, layout: torch.memory_format
) -> Callable[[], Inputs]:
    def setup() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        x, scale = make_pair(shape, limits, axis, generator)
        x = x.contiguous(memory_format=layout)
        dy = torch.randn(shape, generator=generator).contiguous(memory_format=layout)
        return Inputs({"x": x.requires_grad_(), "scale": scale.requires_grad_()}, dy)

    return setup


def _goals(numel: int) -> dict[tuple[str, str], float]:
    if numel * FLOAT < FRESH:
        return {
            ("F", "copy_"): 0.8,
            ("FB", "torch"): 7,
            ("FB", "eager"): 5,
            ("FB", "compile"): 2,
        }
    return {
        ("F", "clone"): 1 / 1.15,
        ("FB", "torch"): 5 if keeps_memory() else 2.5,
        ("FB", "eager"): 5,
        ("FB", "compile"): 1,
    }


def _fake_quant(
    shape: tuple[int, ...],
    axis: int | None,
    limits: tuple[int, int],
    layout: torch.memory_format = torch.contiguous_format,
    quick: bool = False,
) -> Entry:
    low, high = limits
    numel = torch.Size(shape).numel()
    factor = lsq_grad_scale(numel, 1 if axis is None else shape[axis], high)

    def ours(x: Tensor, scale: Tensor) -> Tensor:
        return hqod_ops.fake_quant(
            x, scale, quant_min=low, quant_max=high, ch_axis=axis, grad_scale="lsq"
        )

    def eager(x: Tensor, scale: Tensor) -> Tensor:
        return peers.lsq(x, scale, low, high, axis, factor)

    def native(x: Tensor, scale: Tensor) -> Tensor:
        return peers.torch_learnable(x, scale, low, high, axis, factor)

    size = "x".join(map(str, shape))
    where = "tensor" if axis is None else f"axis {axis}"
    where += ", channels_last" if layout == torch.channels_last else ""
    return Entry(
        name=f"fake_quant/{size}, {where}",
        setup=_inputs(shape, limits, axis, layout),
        ours=ours,
        peers={"eager": eager, "torch": native},
        compiled=eager,
        copied="x",
        traffic={"F": 2 * FLOAT * numel, "FB": 5 * FLOAT * numel},
        memory_unit=("tensors of x", FLOAT * numel),
        goals=_goals(numel),
        quick=quick,
    )


def resnet50_shapes() -> list[tuple[int, int, int, int]]:
    """The 53 convolution weights of ResNet-50."""
    shapes = [(64, 3, 7, 7)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((4 * width, inputs, 1, 1))
            inputs = 4 * width
    return shapes


def _foreach() -> Entry:
    low, high = WEIGHT_RANGE
    shapes = resnet50_shapes()
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    factors = [lsq_grad_scale(torch.Size(s).numel(), s[0], high) for s in shapes]

    def setup() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        pairs = [make_pair(shape, WEIGHT_RANGE, 0, generator) for shape in shapes]
        args = {
            "xs": [x.requires_grad_() for x, _ in pairs],
            "scales": [scale.requires_grad_() for _, scale in pairs],
        }
        return Inputs(args, [torch.randn(shape, generator=generator) for shape in shapes])

    def ours(xs: list[Tensor], scales: list[Tensor]) -> list[Tensor]:
        return hqod_ops.fake_quant_foreach(
            xs, scales, quant_min=low, quant_max=high, ch_axis=0, grad_scale="lsq"
        )

    one = partial(hqod_ops.fake_quant, quant_min=low, quant_max=high, ch_axis=0, grad_scale="lsq")

    def loop(xs: list[Tensor], scales: list[Tensor]) -> list[Tensor]:
        return [one(x, scale) for x, scale in zip(xs, scales, strict=True)]

    def eager(xs: list[Tensor], scales: list[Tensor]) -> list[Tensor]:
        every = zip(xs, scales, factors, strict=True)
        return [peers.lsq(x, scale, low, high, 0, factor) for x, scale, factor in every]

    def native(xs: list[Tensor], scales: list[Tensor]) -> list[Tensor]:
        every = zip(xs, scales, factors, strict=True)
        return [peers.torch_learnable(x, s, low, high, 0, factor) for x, s, factor in every]

    return Entry(
        name="fake_quant_foreach/ResNet-50, axis 0",
        setup=setup,
        ours=ours,
        peers={"loop of ours": loop, "eager": eager, "torch": native},
        traffic={"F": 2 * FLOAT * numel, "FB": 5 * FLOAT * numel},
        memory_unit=("tensors of x", FLOAT * numel),
    )


def _overhead() -> Entry:
    """The fixed cost of a call."""
    base = _fake_quant((16,), None, WEIGHT_RANGE)
    return Entry(
        name="overhead/fake_quant of 16",
        setup=base.setup,
        ours=base.ours,
        peers=base.peers,
        others={"torch.neg": lambda x, scale: x.neg()},
        quick=True,
    )


def entries() -> list[Entry]:
    """All entries of this module."""
    weights = [
        _fake_quant(shape, axis, WEIGHT_RANGE, quick=shape == (256, 256, 3, 3) and axis == 0)
        for shape in WEIGHTS
        for axis in (0, 1, None)
    ]
    activations = [
        _fake_quant(SMALL_ACTIVATION, axis, ACTIVATION_RANGE, layout)
        for layout in (torch.contiguous_format, torch.channels_last)
        for axis in (None, 1)
    ]
    large = [_fake_quant(LARGE_ACTIVATION, axis, ACTIVATION_RANGE) for axis in (None, 1)]
    return [_overhead(), *weights, *activations, *large, _foreach()]
