"""Entries of fake quantization with a learned scale (LSQ, 4 bits)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import hqod_ops
from bench import peers
from bench.entry import GPU_PHASES, PHASES, Entry, Inputs
from bench.machine import keeps_memory
from hqod_ops.reference import lsq_grad_scale

WEIGHT_RANGE = (-8, 7)
ACTIVATION_RANGE = (0, 15)
WEIGHTS = ((64, 64, 3, 3), (256, 256, 3, 3), (512, 2048, 1, 1), (2048, 512, 3, 3))
SMALL_ACTIVATION, LARGE_ACTIVATION = (8, 256, 64, 64), (16, 256, 100, 152)
FLOAT = 4
LARGE_ON_GPU = 8 * 256 * 64 * 64
"""From this number of elements on a GPU has enough of them to reach its copy rate."""
FRESH = 32 * 2**20
"""From this size on, glibc maps and faults in the pages of every new tensor."""


def make_pair(
    shape: tuple[int, ...], limits: tuple[int, int], axis: int | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A tensor and its scale as LSQ starts it, a few elements of it clipped.

    Elements near a rounding tie or within half a step beyond the range are moved: there the peers
    differ by a step, rightly, and nothing else could be compared. So are those just below its upper
    end, which bfloat16 would round to beyond it.
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
    code = torch.where((code > high - 0.1) & (code < high + 1), high - 0.3, code)
    code = torch.where((code < low) & (code > low - 1), low + 0.3, code)
    return code.mul_(scale.reshape(along)), scale


def _inputs(
    shape: tuple[int, ...],
    limits: tuple[int, int],
    axis: int | None,
    layout: torch.memory_format,
    dtype: torch.dtype,
) -> Callable[[], Inputs]:
    def setup() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        x, scale = make_pair(shape, limits, axis, generator)
        x = x.to(dtype).contiguous(memory_format=layout)
        dy = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout)
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


def _gpu_goals(numel: int, axis: int | None) -> dict[tuple[str, str], float]:
    goals = {
        ("FB", "torch"): 4 if numel < 5e6 else 2,
        ("FB", "compile"): 1.3 if axis == 1 else 1,
    }
    if numel >= LARGE_ON_GPU:
        # 0.88 of the copy's rate; the backward pass moves 3 tensors where the copy moves 2.
        goals |= {("F", "copy_"): 0.88, ("B", "copy_"): 0.88 * 2 / 3, ("FB", "eager"): 6.5}
    return goals


def _fake_quant(
    shape: tuple[int, ...],
    axis: int | None,
    limits: tuple[int, int],
    layout: torch.memory_format = torch.contiguous_format,
    quick: bool = False,
    dtype: torch.dtype = torch.float32,
    gpu: bool = False,
) -> Entry:
    low, high = limits
    numel = torch.Size(shape).numel()
    moved = dtype.itemsize * numel
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
    where += "" if dtype == torch.float32 else f", {str(dtype).removeprefix('torch.')}"
    return Entry(
        name=f"fake_quant/{size}, {where}",
        setup=_inputs(shape, limits, axis, layout, dtype),
        ours=ours,
        # torch's op takes no half x.
        peers={"eager": eager} | ({"torch": native} if dtype == torch.float32 else {}),
        compiled=eager,
        copied="x",
        traffic={"F": 2 * moved, "B": 3 * moved, "FB": 5 * moved},
        memory_unit=("tensors of x", moved),
        goals=_gpu_goals(numel, axis) if gpu else _goals(numel),
        waiting=frozenset({"torch"}),
        phases=GPU_PHASES if gpu else PHASES,
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


def retinanet_shapes() -> list[tuple[int, int, int, int]]:
    """The 71 convolution weights of torchvision's RetinaNet with a ResNet-50."""
    pyramid = [(256, inputs, 1, 1) for inputs in (512, 1024, 2048)] + [(256, 256, 3, 3)] * 5
    towers = [(256, 256, 3, 3)] * 8
    return [*resnet50_shapes(), *pyramid, *towers, (9 * 91, 256, 3, 3), (9 * 4, 256, 3, 3)]


def _foreach(model: str, shapes: list[tuple[int, int, int, int]], gpu: bool = False) -> Entry:
    low, high = WEIGHT_RANGE
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
        name=f"fake_quant_foreach/{model}, axis 0",
        setup=setup,
        ours=ours,
        peers={"loop of ours": loop, "eager": eager, "torch": native},
        traffic={"F": 2 * FLOAT * numel, "B": 3 * FLOAT * numel, "FB": 5 * FLOAT * numel},
        memory_unit=("tensors of x", FLOAT * numel),
        goals={("FB", "loop of ours"): 5} if gpu else {},
        waiting=frozenset({"torch"}),
        phases=GPU_PHASES if gpu else PHASES,
    )


def _overhead() -> Entry:
    """The fixed cost of a call."""
    base = _fake_quant((16,), None, WEIGHT_RANGE)
    return Entry(
        name="overhead/fake_quant of 16",
        setup=base.setup,
        ours=base.ours,
        peers=base.peers,
        waiting=base.waiting,
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
    foreach = _foreach("ResNet-50", resnet50_shapes())
    return [_overhead(), *weights, *activations, *large, foreach]


def gpu_entries() -> list[Entry]:
    """All entries of this module for a GPU: the channel outermost, in the middle and innermost."""
    half, last = torch.bfloat16, torch.channels_last
    weight = partial(_fake_quant, limits=WEIGHT_RANGE, gpu=True)
    activation = partial(_fake_quant, limits=ACTIVATION_RANGE, gpu=True)
    small, large = SMALL_ACTIVATION, LARGE_ACTIVATION
    return [
        _overhead(),
        *(weight(shape, 0) for shape in WEIGHTS),
        weight(WEIGHTS[1], None),
        *(activation(small, axis, dtype=dtype) for dtype in (torch.float32, half)
          for axis in (None, 0, 1)),
        *(activation(small, 1, layout=last, dtype=dtype) for dtype in (torch.float32, half)),
        activation(large, None),
        activation(large, 1),
        *(activation(large, 1, layout=layout, dtype=half)
          for layout in (torch.contiguous_format, last)),
        _foreach("RetinaNet-R50", retinanet_shapes(), gpu=True),
    ]  # fmt: skip
