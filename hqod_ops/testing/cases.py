"""Every op of the package as data: one registry for the contract tests and the benchmarks.

A new op needs one :class:`OpCase` here, and every contract test and benchmark applies to it::

    case = CASES["fake_quant"]
    variant = case.variant("per_channel_axis0")
    inputs = case.make(variant, (64, 32, 3, 3), torch.float32)
    y = case.call(inputs, variant)                 # hqod_ops.fake_quant(**inputs, **variant.kwargs)
    expected = case.call_reference(inputs, variant)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import hqod_ops
from hqod_ops import reference
from hqod_ops.testing.device import DEVICE

Size = tuple[Any, ...]
"""(N,) for the losses, the shape of x for fake_quant, a tuple of shapes for fake_quant_foreach."""

Inputs = dict[str, Any]
"""The tensor arguments of one call by name: a tensor, or a list of tensors for foreach ops."""

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Variant:
    """One way of calling an op."""

    name: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Options of the call, without tensors."""
    optional: tuple[str, ...] = ()
    """Optional tensor inputs that are given: "weight", "avg_factor", "zero_point", "int_zero_point"
    (the argument zero_point with dtype int32), "float_scale" (a float32 scale beside a half x)."""


@dataclass(frozen=True)
class OpCase:
    """One op: what to call, with which inputs, and what is differentiable."""

    name: str
    function: Callable[..., Any]
    """The public function."""
    reference: Callable[..., Any]
    """Its twin in :mod:`hqod_ops.reference`: the oracle when it is given float64 inputs."""
    maker: Callable[..., Inputs]
    """``maker(variant, size, dtype, generator)``: contiguous inputs on the CPU."""
    differentiable: tuple[str, ...]
    """Inputs with a gradient (optional ones only where the variant has them)."""
    variants: tuple[Variant, ...]
    """The first one is the default call."""
    sizes: tuple[Size, ...]
    """Sizes of the tests: empty, one, around vector widths, odd tails, beyond one chunk."""
    layouts: tuple[str, ...]
    """What :meth:`make` accepts as layout, "contiguous" first."""
    module: Callable[[Variant], nn.Module] | None
    """The module form of a variant, called with the inputs in order (None: there is none)."""
    is_loss: bool
    """Whether it returns float32 for half inputs (a loss) or the dtype of x (fake-quant)."""

    def variant(self, name: str) -> Variant:
        """The variant of that name."""
        return next(variant for variant in self.variants if variant.name == name)

    def make(
        self,
        variant: Variant,
        size: Size,
        dtype: torch.dtype = torch.float32,
        layout: str = "contiguous",
        *,
        requires_grad: bool = True,
        device: torch.device | str = DEVICE,
        seed: int = 0,
    ) -> Inputs:
        """Inputs of one call, the same for every run; values in the range of a training step.

        The layout is that of x and xs, for a loss that of all inputs.
        """
        generator = torch.Generator().manual_seed(seed)

        def place(name: str, x: Tensor) -> Tensor:
            x = x.to(device)
            if self.is_loss or name in ("x", "xs"):
                x = lay_out(x, layout)
            return x.requires_grad_(requires_grad and x.is_floating_point())

        return {
            name: [place(name, x) for x in value] if isinstance(value, list) else place(name, value)
            for name, value in self.maker(variant, size, dtype, generator).items()
        }

    def call(self, inputs: Inputs, variant: Variant) -> Any:
        """The op under test."""
        return self.function(**inputs, **variant.kwargs)

    def call_reference(self, inputs: Inputs, variant: Variant) -> Any:
        """The plain PyTorch twin."""
        return self.reference(**inputs, **variant.kwargs)


def map_tensors(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """The inputs with ``function`` applied to every tensor."""
    return {
        name: [function(v) for v in value] if isinstance(value, list) else function(value)
        for name, value in inputs.items()
    }


def leaves(inputs: Inputs, names: tuple[str, ...] | None = None) -> dict[str, Tensor]:
    """The tensors of the inputs by name, "xs[0]" and so on for lists."""
    flat: dict[str, Tensor] = {}
    for name, value in inputs.items():
        if names is not None and name not in names:
            continue
        if isinstance(value, list):
            flat.update({f"{name}[{i}]": v for i, v in enumerate(value)})
        else:
            flat[name] = value
    return flat


def differentiable(case: OpCase, inputs: Inputs) -> dict[str, Tensor]:
    """The inputs that the op gives a gradient to, as in :func:`leaves`."""
    flat = leaves(inputs, case.differentiable)
    return {name: tensor for name, tensor in flat.items() if tensor.requires_grad}


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of x in another memory layout, on its device.

    Dense ones: "contiguous", "channels_last" (the axis 1 innermost, any rank), "permuted" (the
    reverse order of axes). Others: "sliced" (every second element of the last axis and of the
    first), "offset" (contiguous, starting one element into its storage, so not aligned) and
    "expanded" (every row along the first axis is the first one, stride 0: other values).
    """
    if layout == "contiguous" or x.dim() == 0:
        return x.contiguous()
    if layout == "channels_last":
        return x if x.dim() < 3 else x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "permuted":
        axes = list(reversed(range(x.dim())))
        return x.permute(axes).contiguous().permute(axes)
    if layout == "sliced":
        steps = [1] * x.dim()
        steps[0] = steps[-1] = 2
        wide = x.new_full([n * step for n, step in zip(x.shape, steps, strict=True)], 7.0)
        view = wide[tuple(slice(None, None, step) for step in steps)]
        view.copy_(x)
        return view
    if layout == "offset":
        return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)
    if layout == "expanded":
        return x[:1].contiguous().expand(x.shape) if x.shape[0] else x
    raise ValueError(f"layout: unknown {layout!r}")


def uniform(shape: Size, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Float64 values between low and high."""
    return torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low


def make_boxes(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Float64 predictions and targets of a 640-pixel image, with IoUs from 0 to about 0.95."""
    centre, size = uniform((n, 2), 60, 580, generator), uniform((n, 2), 3, 5, generator).exp()
    spread = uniform((n, 1), 0.02, 0.9, generator)
    shift = uniform((n, 2), -1, 1, generator) * spread * size
    grow = (uniform((n, 2), -0.7, 0.7, generator) * spread).exp()
    target = torch.cat([centre - size / 2, centre + size / 2], dim=1)
    centre, size = centre + shift, size * grow
    return torch.cat([centre - size / 2, centre + size / 2], dim=1), target


def _loss_inputs(
    variant: Variant, size: Size, dtype: torch.dtype, generator: torch.Generator
) -> Inputs:
    (n,) = size
    pred, target = make_boxes(n, generator)
    scores = uniform((n,), 0.03, 0.97, generator)
    if variant.kwargs.get("logits"):
        scores = scores.logit()
    inputs = {"pred": pred, "target": target, "scores": scores}
    if "weight" in variant.optional:
        inputs["weight"] = uniform((n,), 0.1, 2, generator)
    inputs = {name: value.to(dtype) for name, value in inputs.items()}
    if "avg_factor" in variant.optional:
        loss_dtype = torch.float32 if dtype in HALF else dtype
        inputs["avg_factor"] = torch.tensor(max(n, 1) / 3, dtype=loss_dtype)
    return inputs


def _iou_inputs(*args: Any) -> Inputs:
    inputs = _hiou_inputs(*args)
    return {"boxes1": inputs.pop("pred"), "boxes2": inputs.pop("target"), **inputs}


def _hiou_inputs(*args: Any) -> Inputs:
    inputs = _loss_inputs(*args)
    return {name: inputs[name] for name in ("pred", "target", "weight") if name in inputs}


def _tcorr_inputs(
    variant: Variant, size: Size, dtype: torch.dtype, generator: torch.Generator
) -> Inputs:
    inputs = _loss_inputs(variant, size, dtype, generator)
    ious = uniform(size, 0.01, 0.99, generator).to(dtype)
    inputs = {"scores": inputs["scores"], "ious": ious, "weight": inputs.get("weight")}
    return {name: value for name, value in inputs.items() if value is not None}


def quant_inputs(
    variant: Variant,
    shape: Size,
    dtype: torch.dtype,
    generator: torch.Generator,
    quant_min: int,
    quant_max: int,
) -> Inputs:
    """x with a tenth of the codes beyond each end of the range, and never near a rounding tie."""
    axis = variant.kwargs.get("ch_axis")
    channels = 1 if axis is None else shape[axis]
    scale = uniform((channels,), 0.05, 0.3, generator)
    along = [1] * len(shape)
    if axis is not None:
        along[axis] = channels
    zero = torch.zeros(channels, dtype=torch.float64)
    if "zero_point" in variant.optional or "int_zero_point" in variant.optional:
        # Codes on both sides of 0; fractions stay away from one half, in half precision too.
        zero = uniform((channels,), quant_min, quant_max, generator).round()
        if "zero_point" in variant.optional:
            zero = zero + uniform((channels,), -0.3, 0.3, generator)
    beyond = 0.1 * (quant_max - quant_min)
    codes = uniform(shape, quant_min - beyond - 0.5, quant_max + beyond + 0.5, generator).round()
    codes = codes + uniform(shape, -0.4, 0.4, generator)
    x = (codes - zero.round().reshape(along)) * scale.reshape(along)
    scale_dtype = torch.float32 if "float_scale" in variant.optional and dtype in HALF else dtype
    shape_of_scale = (1,) if axis is not None else ()
    inputs = {
        "x": x.to(dtype),
        "scale": scale.to(scale_dtype) if shape_of_scale else scale.to(scale_dtype).reshape(()),
    }
    if "zero_point" in variant.optional:
        inputs["zero_point"] = zero.to(scale_dtype).reshape(inputs["scale"].shape)
    if "int_zero_point" in variant.optional:
        inputs["zero_point"] = zero.to(torch.int32).reshape(inputs["scale"].shape)
    return inputs


def _fake_quant_inputs(
    variant: Variant, size: Size, dtype: torch.dtype, generator: torch.Generator
) -> Inputs:
    low, high = variant.kwargs["quant_min"], variant.kwargs["quant_max"]
    return quant_inputs(variant, size, dtype, generator, low, high)


def _foreach_inputs(
    variant: Variant, size: Size, dtype: torch.dtype, generator: torch.Generator
) -> Inputs:
    inputs: Inputs = {"xs": [], "scales": []}
    for i, shape in enumerate(size):
        low, high = (
            bound if isinstance(bound, int) else bound[i]
            for bound in (variant.kwargs["quant_min"], variant.kwargs["quant_max"])
        )
        one = quant_inputs(variant, shape, dtype, generator, low, high)
        for name, value in one.items():
            inputs.setdefault(f"{name}s", []).append(value)
    return inputs


def _loss_module(kind: Callable[..., nn.Module]) -> Callable[[Variant], nn.Module]:
    def build(variant: Variant) -> nn.Module:
        options = dict(variant.kwargs)
        avg_factor = options.pop("avg_factor", None)
        if kind is not hqod_ops.HQODLoss:
            options.setdefault("reduction", "none")
        module = kind(**options)
        return module if avg_factor is None else _WithAvgFactor(module, avg_factor)

    return build


class _WithAvgFactor(nn.Module):
    """A loss module with a number as its avg_factor."""

    def __init__(self, loss: nn.Module, avg_factor: float) -> None:
        super().__init__()
        self.loss, self.avg_factor = loss, avg_factor

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        loss: Tensor = self.loss(*inputs, avg_factor=self.avg_factor, **named)
        return loss


LOSS_SIZES = tuple(
    (n,)
    for n in (0, 1, 2, 3, 5, 7, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 1023, 1024, 1025)
    + (4097, 20011)
)
LOSS_LAYOUTS = ("contiguous", "permuted", "sliced", "offset", "expanded")

QUANT_SIZES: tuple[Size, ...] = (
    (1,), (17,), (20011,), (1, 1), (3, 5), (16, 1000), (7, 3, 9), (4, 6, 7, 7),
    (8, 16, 3, 3), (2, 3, 4, 5, 3), (1, 5, 1, 1), (301, 4, 2), (0,), (0, 3), (3, 0, 2),
)  # fmt: skip
QUANT_LAYOUTS = ("contiguous", "channels_last", "permuted", "sliced", "offset", "expanded")

_W4 = {"quant_min": -8, "quant_max": 7}
_A4 = {"quant_min": 0, "quant_max": 15}

_QUANT_VARIANTS = (
    Variant("per_tensor", {**_W4, "grad_scale": "lsq"}),
    Variant("per_tensor_zero_point", {**_A4, "grad_scale": 0.25}, ("zero_point",)),
    Variant("per_tensor_int_zero_point", _W4, ("int_zero_point",)),
    Variant("per_tensor_float_scale", {"quant_min": 0, "quant_max": 3}, ("float_scale",)),
    Variant("per_channel_axis0", {**_W4, "ch_axis": 0, "grad_scale": "lsq"}),
    Variant("per_channel_axis0_zero_point", {**_W4, "ch_axis": 0}, ("zero_point",)),
    Variant(
        "per_channel_last_zero_point",
        {**_A4, "ch_axis": -1, "grad_scale": 0.5},
        ("zero_point", "float_scale"),
    ),
    Variant("per_channel_last_2bit", {"quant_min": -2, "quant_max": 1, "ch_axis": -1}),
)
# Of fake_quant alone: an activation in front of it.
_ACTIVATION_VARIANTS = (
    Variant("per_tensor_relu", {**_A4, "grad_scale": "lsq", "activation": "relu"}),
    Variant(
        "per_channel_axis0_relu6",
        {"quant_min": -20, "quant_max": 80, "ch_axis": 0, "activation": "relu6"},
        ("zero_point", "float_scale"),
    ),
)

BOX_IOU_LOSSES = {
    "generalized_box_iou_loss": hqod_ops.GeneralizedBoxIoULoss,
    "distance_box_iou_loss": hqod_ops.DistanceBoxIoULoss,
    "complete_box_iou_loss": hqod_ops.CompleteBoxIoULoss,
    "efficient_box_iou_loss": hqod_ops.EfficientBoxIoULoss,
    "scylla_box_iou_loss": hqod_ops.ScyllaBoxIoULoss,
}
"""torchvision's losses of boxes, and those with their arguments."""


def _box_iou_case(name: str) -> OpCase:
    return OpCase(
        name=name,
        function=getattr(hqod_ops, name),
        reference=getattr(reference, name),
        maker=_iou_inputs,
        differentiable=("boxes1", "boxes2", "weight"),
        variants=(
            Variant("default"),
            Variant("sum_eps", {"eps": 1e-3, "reduction": "sum"}),
            Variant("mean", {"reduction": "mean"}),
            Variant("weighted", {"eps": 0.5}, ("weight",)),
            Variant("weighted_mean", {"reduction": "mean"}, ("weight",)),
        ),
        sizes=LOSS_SIZES,
        layouts=LOSS_LAYOUTS,
        module=_loss_module(BOX_IOU_LOSSES[name]),
        is_loss=True,
    )


CASES: dict[str, OpCase] = {
    case.name: case
    for case in (
        OpCase(
            name="aligned_box_iou",
            function=hqod_ops.aligned_box_iou,
            reference=reference.aligned_box_iou,
            maker=_iou_inputs,
            differentiable=("boxes1", "boxes2"),
            variants=(Variant("default"),),
            sizes=LOSS_SIZES,
            layouts=LOSS_LAYOUTS,
            module=None,
            is_loss=True,
        ),
        OpCase(
            name="harmonious_iou_loss",
            function=hqod_ops.harmonious_iou_loss,
            reference=reference.harmonious_iou_loss,
            maker=_hiou_inputs,
            differentiable=("pred", "target", "weight"),
            variants=(
                Variant("default"),
                Variant("sum_options", {"alpha": 2.0, "gamma": 0.3, "reduction": "sum"}),
                Variant("mean_gamma0", {"gamma": 0.0, "reduction": "mean"}),
                Variant("weighted", {"gamma": 1.0}, ("weight",)),
                Variant("weighted_mean", {"reduction": "mean"}, ("weight",)),
            ),
            sizes=LOSS_SIZES,
            layouts=LOSS_LAYOUTS,
            module=_loss_module(hqod_ops.HarmoniousIoULoss),
            is_loss=True,
        ),
        *[_box_iou_case(name) for name in BOX_IOU_LOSSES],
        OpCase(
            name="tcorr_loss",
            function=hqod_ops.tcorr_loss,
            reference=reference.tcorr_loss,
            maker=_tcorr_inputs,
            differentiable=("scores", "ious", "weight"),
            variants=(
                Variant("default"),
                Variant("geometric_sum", {"variant": "geometric", "reduction": "sum"}),
                Variant("logits_mean", {"logits": True, "reduction": "mean"}),
                Variant(
                    "weighted_logits_geometric",
                    {"logits": True, "variant": "geometric"},
                    ("weight",),
                ),
                Variant("weighted_sum", {"reduction": "sum"}, ("weight",)),
            ),
            sizes=LOSS_SIZES,
            layouts=LOSS_LAYOUTS,
            module=_loss_module(hqod_ops.TCorrLoss),
            is_loss=True,
        ),
        OpCase(
            name="hqod_loss",
            function=hqod_ops.hqod_loss,
            reference=reference.hqod_loss,
            maker=_loss_inputs,
            differentiable=("pred", "target", "scores", "weight", "avg_factor"),
            variants=(
                Variant("default"),
                Variant(
                    "none_options",
                    {
                        "reduction": "none",
                        "alpha": 1.0,
                        "gamma": 1.2,
                        "hiou_weight": 2.0,
                        "tcorr_weight": 0.5,
                    },
                ),
                Variant("logits_sum", {"logits": True, "reduction": "sum"}),
                Variant("geometric_avg_factor", {"variant": "geometric", "avg_factor": 7.0}),
                Variant("avg_factor_tensor", {"logits": True}, ("avg_factor",)),
                Variant("weighted", {"reduction": "none", "logits": True}, ("weight",)),
                Variant("weighted_avg_factor", {"avg_factor": 3.0}, ("weight",)),
                Variant("weighted_avg_factor_tensor", {}, ("weight", "avg_factor")),
                Variant("hiou_only", {"tcorr_weight": 0.0}),
                Variant("tcorr_only", {"hiou_weight": 0.0}),
            ),
            sizes=LOSS_SIZES,
            layouts=LOSS_LAYOUTS,
            module=_loss_module(hqod_ops.HQODLoss),
            is_loss=True,
        ),
        OpCase(
            name="fake_quant",
            function=hqod_ops.fake_quant,
            reference=reference.fake_quant,
            maker=_fake_quant_inputs,
            differentiable=("x", "scale", "zero_point"),
            variants=(*_QUANT_VARIANTS, *_ACTIVATION_VARIANTS),
            sizes=QUANT_SIZES,
            layouts=QUANT_LAYOUTS,
            module=None,
            is_loss=False,
        ),
        OpCase(
            name="fake_quant_foreach",
            function=hqod_ops.fake_quant_foreach,
            reference=reference.fake_quant_foreach,
            maker=_foreach_inputs,
            differentiable=("xs", "scales", "zero_points"),
            variants=(
                *_QUANT_VARIANTS,
                Variant(
                    "own_ranges",
                    {"quant_min": (-8, -2, 0), "quant_max": (7, 1, 255)},
                    ("zero_point",),
                ),
            ),
            sizes=(
                ((4, 3, 3, 3), (5, 4), (7, 2, 3)),
                ((1,), (20011,), (3, 1)),
                ((6, 5), (0, 5), (2, 3)),
            ),
            layouts=QUANT_LAYOUTS,
            module=None,
            is_loss=False,
        ),
    )
}
