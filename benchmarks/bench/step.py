"""One training step of torchvision's RetinaNet: float, with LSQ of the peers, with ours."""

from __future__ import annotations

import contextlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bench import peers
from bench.measure import spread
from bench.memory import peak_beyond
from hqod_ops import _loader, reference
from hqod_ops.quant import (
    calibrate,
    parameter_groups,
    place_on_producers,
    plan_qat,
    prepare_qat,
)

PEERS = {"eager LSQ": peers.lsq, "torch's own": peers.torch_learnable}
"""What stands in for fake_quant: the rest of the toolkit is the same for all."""

HAS_BREVITAS = importlib.util.find_spec("brevitas") is not None
OURS = ("ours", "ours, saved as codes", "ours, on producers", "ours, saved as codes, on producers")
VARIANTS = ("float", *PEERS, *["brevitas"] * HAS_BREVITAS, *OURS)
Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


@dataclass(frozen=True)
class Settings:
    """What is trained, and how long it is measured."""

    backbone: str = "resnet50"
    batch: int = 8
    size: int = 640
    """Side of the square images, in pixels."""
    config: str = "hqod_w4a4"
    warmup: int = 5
    steps: int = 20


FULL = Settings()
SMALL = Settings(batch=1, size=192, warmup=1, steps=15)
QUICK = Settings(backbone="resnet18", batch=1, size=64, warmup=1, steps=2)


def build(settings: Settings, device: torch.device) -> nn.Module:
    """torchvision's RetinaNet with new weights, the same each time."""
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(
        backbone_name=settings.backbone,
        weights=None,
        norm_layer=nn.BatchNorm2d,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    model = RetinaNet(backbone, 91, min_size=settings.size, max_size=settings.size)
    return model.to(device)


def make_batch(settings: Settings, device: torch.device) -> Batch:
    """Noise with eight objects an image."""
    generator = torch.Generator().manual_seed(0)
    images, targets = [], []
    for _ in range(settings.batch):
        images.append(torch.rand(3, settings.size, settings.size, generator=generator).to(device))
        corner = torch.rand(8, 2, generator=generator) * 0.5 * settings.size
        side = (torch.rand(8, 2, generator=generator) * 0.4 + 0.1) * settings.size
        labels = torch.randint(1, 91, (8,), generator=generator)
        boxes = torch.cat([corner, corner + side], dim=1)
        targets.append({"boxes": boxes.to(device), "labels": labels.to(device)})
    return images, targets


def _settle(model: nn.Module, batch: Batch) -> None:
    """Let the running statistics be those of the batch: calibration runs in eval mode."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(*batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


class _PeerOps:
    """The public functions, computed by a peer."""

    def __init__(self, op: Callable[..., Tensor]) -> None:
        self._op = op

    def fake_quant(
        self, x: Tensor, scale: Tensor, zero_point: Tensor | None = None, **options: Any
    ) -> Tensor:
        if zero_point is not None or options.get("activation") is not None:
            return reference.fake_quant(x, scale, zero_point, **options)
        low, high, factor = options["quant_min"], options["quant_max"], options["grad_scale"]
        if factor == "lsq":
            factor = reference.lsq_grad_scale(x.numel(), scale.numel(), high)
        return self._op(x, scale, low, high, options["ch_axis"], factor)

    def fake_quant_foreach(
        self,
        xs: Sequence[Tensor],
        scales: Sequence[Tensor],
        zero_points: Sequence[Tensor] | None = None,
        *,
        quant_min: Sequence[int],
        quant_max: Sequence[int],
        **options: Any,
    ) -> list[Tensor]:
        zeros = [None] * len(xs) if zero_points is None else zero_points
        every = zip(xs, scales, zeros, quant_min, quant_max, strict=True)
        return [
            self.fake_quant(x, s, z, quant_min=lo, quant_max=hi, **options)
            for x, s, z, lo, hi in every
        ]


@contextlib.contextmanager
def ops_of(variant: str) -> Iterator[None]:
    """The quantizers call what a variant stands for."""
    native = _loader._backend_module
    if variant in PEERS:
        _loader._backend_module = _PeerOps(PEERS[variant])  # type: ignore[assignment]
    try:
        yield
    finally:
        _loader._backend_module = native


def _with_brevitas(model: nn.Module, config: str, batch: Batch) -> nn.Module:
    """brevitas' convolutions in the place of the model's, with the bits that ours would get.

    Its default integer quantizers, scales per tensor: the weight's from its range at every call,
    the input's learned, after the statistics of one call.
    """
    import brevitas.nn as brevitas
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat

    modules = dict(model.named_modules())
    for name, plan in plan_qat(model, config).items():
        old = modules[name]
        if not isinstance(old, nn.Conv2d):
            raise TypeError(f"{name}: expected a convolution, got {type(old).__name__}")
        new = brevitas.QuantConv2d(
            old.in_channels,
            old.out_channels,
            old.kernel_size,
            old.stride,
            old.padding,
            old.dilation,
            old.groups,
            bias=old.bias is not None,
            weight_quant=Int8WeightPerTensorFloat,
            weight_bit_width=plan.weight_bits,
            input_quant=Int8ActPerTensorFloat,
            input_bit_width=plan.act_bits,
            input_collect_stats_steps=1,
        )
        new.load_state_dict(old.state_dict(), strict=False)
        parent, _, own = name.rpartition(".")
        setattr(modules[parent], own, new.to(old.weight.device))
    with torch.no_grad():
        model.train()(*batch)
    return model


def make(variant: str, settings: Settings, batch: Batch, device: torch.device) -> nn.Module:
    """The model of a variant, ready to be trained."""
    model = build(settings, device)
    _settle(model, batch)
    if variant == "brevitas":
        model = _with_brevitas(model, settings.config, batch)
    elif variant != "float":
        save = "codes" if "saved as codes" in variant else None
        model = prepare_qat(model, settings.config, save=save)
        if variant.endswith("on producers"):
            place_on_producers(model)
        model = calibrate(model, [batch], progress=False)
    return model.train()


class Trial:
    """A variant's model, and its step: forward, losses, backward, update, perhaps mixed."""

    def __init__(
        self, variant: str, settings: Settings, batch: Batch, device: torch.device, amp: bool
    ) -> None:
        self.variant, self.amp = variant, amp
        self._batch, self._device = batch, device
        with ops_of(variant):
            self.model = make(variant, settings, batch, device)
        groups = parameter_groups(self.model, weight_decay=1e-4)
        self._optimizer = torch.optim.SGD(groups, lr=1e-4, momentum=0.9)
        self._dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
        scaled = amp and self._dtype == torch.float16
        self._scaler = torch.amp.GradScaler(device.type, enabled=scaled)

    def drop_gradients(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def _losses(self) -> dict[str, Tensor]:
        with torch.autocast(self._device.type, self._dtype, enabled=self.amp):
            found: dict[str, Tensor] = self.model(*self._batch)
        return found

    def backward(self) -> Tensor:
        """The loss, with its gradients in place."""
        self.drop_gradients()
        with ops_of(self.variant):
            loss: Tensor = sum(self._losses().values())
            self._scaler.scale(loss).backward()
        return loss

    def step(self) -> Tensor:
        loss = self.backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return loss.detach()

    def warm_up(self, steps: int) -> None:
        """Raises RuntimeError where the loss is not finite."""
        for _ in range(steps):
            loss = self.step()
        self.drop_gradients()
        if not bool(loss.isfinite()):
            raise RuntimeError(f"{self.variant}: the loss is {loss.item()}")

    def seconds(self) -> float:
        _wait(self._device)
        start = time.perf_counter()
        self.step()
        _wait(self._device)
        took = time.perf_counter() - start
        self.drop_gradients()
        return took

    def held_bytes(self) -> int:
        """Parameters, buffers and the optimizer's state."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        for state in self._optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in tensors)

    def peak_bytes(self) -> int:
        """Most bytes of tensors at once during a step, model and optimizer included."""
        if self._device.type != "cuda":
            return self.held_bytes() + peak_beyond(self.step)
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        self.step()
        peak = torch.cuda.max_memory_allocated(self._device) - before
        return self.held_bytes() + peak

    def saved_bytes(self) -> int:
        """What a forward pass keeps for the backward pass, the model's own parameters aside."""
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        seen: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage  # kept, so that no address is used twice
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with ops_of(self.variant), hooks:
            losses = self._losses()
        del losses
        return sum(storage.nbytes() for storage in seen.values())

    def profiled(self) -> tuple[float, str]:
        """The share of our ops in the device's time (on the CPU, its own), and the table of all."""
        on_gpu = self._device.type == "cuda"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
        with profile(activities=activities, acc_events=True) as recorded:
            self.step()
            _wait(self._device)
        self.drop_gradients()
        attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        rows = recorded.key_averages()
        # An operator's kernels count for it, and again as rows of their own: operators alone, then.
        operators = [row for row in rows if row.device_type == torch.autograd.DeviceType.CPU]
        total = sum(getattr(row, attribute) for row in operators)
        ours = sum(getattr(row, attribute) for row in operators if row.key.startswith("hqod::"))
        table: str = rows.table(sort_by=attribute, row_limit=40, max_name_column_width=80)
        return ours / total if total else 0.0, table


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    settings: Settings,
    device: torch.device,
    amp: bool,
    variants: Sequence[str] = VARIANTS,
    said: Callable[[str], None] = lambda text: None,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Time, memory and profile of the variants' steps.

    All models are there at once and take turns, in changing order, so that what the machine does
    meanwhile meets all of them; what a variant adds is taken inside a round.

    Args:
        settings: the model and the effort.
        device: where it trains.
        amp: mixed precision.
        variants: of :data:`VARIANTS`, the first one is what the others are compared with.
        said: is told what comes next, ``len(variants) + settings.steps`` times.

    Returns:
        (list, dict): the entries of the result file, and the profiler's table of each variant.

    Raises:
        RuntimeError: a loss is not finite.
    """
    batch = make_batch(settings, device)
    trials = []
    for variant in variants:
        said(f"{variant}{', mixed precision' if amp else ''}")
        trials.append(Trial(variant, settings, batch, device, amp))
        trials[-1].warm_up(settings.warmup)
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for k in range(settings.steps):
        said(f"round {k + 1}{', mixed precision' if amp else ''}")
        first = k % len(trials)
        for trial in trials[first:] + trials[:first]:
            times[trial.variant].append(1e3 * trial.seconds())
    plain = times[variants[0]]
    entries, profiles = [], {}
    for trial in trials:
        own = times[trial.variant]
        share, profiles[trial.variant] = trial.profiled()
        entries.append(
            {
                "variant": trial.variant,
                "amp": amp,
                "ms": spread(own, 3),
                "added_ms": spread([b - a for a, b in zip(plain, own, strict=True)], 3),
                "share_added": round(
                    statistics.median(1 - a / b for a, b in zip(plain, own, strict=True)), 4
                ),
                "peak_bytes": trial.peak_bytes(),
                "saved_bytes": trial.saved_bytes(),
                "share_of_our_ops": round(share, 4),
            }
        )
        trial.drop_gradients()
    return entries, profiles
