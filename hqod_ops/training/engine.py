"""Devices, precision and processes of a run: plain torch under ``torchrun``.

A run of one process is the case of one rank: it takes the same way, and nothing is exchanged.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hqod_ops.detection.models.detector import Detector, Objects
from hqod_ops.detection.models.losses import total
from hqod_ops.quant.nn.layers import QATLayer
from hqod_ops.quant.quantizers.base import Quantizer
from hqod_ops.quant.tuning import Distillation
from hqod_ops.training import ConfigError
from hqod_ops.training.settings import DistillConfig, EngineConfig

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Of this process; 0 in a run of one."""
    return dist.get_rank() if _grouped() else _launched("RANK", 0)


def local_rank() -> int:
    """Of this process on its machine."""
    return _launched("LOCAL_RANK", 0)


def world() -> int:
    """Number of processes: those of the group, or that torchrun has started."""
    return dist.get_world_size() if _grouped() else _launched("WORLD_SIZE", 1)


def _launched(name: str, alone: int) -> int:
    """What torchrun tells its processes; one variable alone may come from elsewhere."""
    known = os.environ.keys() >= {"RANK", "WORLD_SIZE", "MASTER_ADDR"}
    return int(os.environ.get(name, alone)) if known else alone


def launcher() -> list[str]:
    """The command that starts ``hqod`` in as many processes as this one was."""
    if world() == 1:
        return ["hqod"]
    local = _launched("LOCAL_WORLD_SIZE", 1)
    nodes = [] if local == world() else ["--nnodes", str(world() // local)]
    return ["torchrun", *nodes, "--nproc-per-node", str(local), "-m", "hqod_ops.cli"]


def from_first(value: Any) -> Any:
    """The value that the first process has, on every process."""
    if world() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


@contextmanager
def processes(config: EngineConfig, device: torch.device) -> Iterator[None]:
    """The process group of a run under torchrun; nothing in a run of one process.

    Raises:
        ConfigError: the backend does not fit the device, or is not in this build of torch.
    """
    if _grouped() or world() == 1:
        yield
        return
    backend: str = config.backend
    if backend == "auto":
        # gloo for what is gathered from the CPU, such as detections
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    elif backend == "nccl" and device.type != "cuda":
        raise ConfigError(f"engine.backend: nccl needs CUDA devices, got device {device}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(backend)
    except (RuntimeError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise ConfigError(f"engine.backend: cannot use {config.backend!r}: {first}") from None
    try:
        yield
    finally:
        dist.destroy_process_group()


class _Losses(nn.Module):
    """The losses of a detector as a forward pass, which DistributedDataParallel wraps."""

    def __init__(
        self, model: Detector, distillation: Distillation | None = None, labels: bool = True
    ) -> None:
        super().__init__()
        # Plain attributes: the teacher is no part of what is trained.
        self.model, self.distillation, self.labels = model, distillation, labels

    def forward(self, images: Tensor, targets: Sequence[Objects]) -> dict[str, Tensor]:
        if self.distillation is None:
            return self.model.losses(images, targets)
        if not self.labels:
            return {"distill": self.distillation(images)}
        return {**self.model.losses(images, targets), "distill": self.distillation.loss()}


class Engine:
    """How one step of a detector is computed.

    Args:
        model (Detector): the detector, on its device, with its quantizers.
        config (EngineConfig): precision, layout, compilation.
        accumulate (int): parts that the images of a step come in. Default: 1
        teacher (Detector, optional): a float detector with the same network, in eval mode, which
            the detector learns from. Default: None
        distill (DistillConfig, optional): how. Default: None, DistillConfig()

    Raises:
        ConfigError: the device lacks the precision, or has no norms over all ranks.
    """

    def __init__(
        self,
        model: Detector,
        config: EngineConfig,
        accumulate: int = 1,
        *,
        teacher: Detector | None = None,
        distill: DistillConfig | None = None,
    ) -> None:
        self.model, self.config, self.accumulate = model, config, accumulate
        self.device = next(model.parameters()).device
        kind = self.device.type
        if config.precision == "fp16" and kind != "cuda":
            raise ConfigError(f"engine.precision: fp16 needs a CUDA device, got {self.device}")
        # As a plain scaler: its state is part of a checkpoint.
        self.scaler = torch.amp.grad_scaler.GradScaler(kind, enabled=config.precision == "fp16")
        if config.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.compile:
            model.network.compile()
        distill = distill or DistillConfig()
        self._distillation = None if teacher is None else _distillation(model, teacher, distill)
        losses = _Losses(model, self._distillation, distill.labels)
        self._losses: nn.Module = losses
        if world() > 1:
            devices = [self.device] if kind == "cuda" else None
            self._losses = nn.parallel.DistributedDataParallel(
                losses,
                device_ids=devices,
                # What lies behind the prediction layers learns from labels alone.
                find_unused_parameters=teacher is not None and not distill.labels,
            )
        self._batch_scales = list(_scales_of_batches(model)) if self.parts > 1 else []

    @property
    def parts(self) -> int:
        """Into how many batches the images of a step are cut, over ranks and one after another."""
        return world() * self.accumulate

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward pass."""
        if self.config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_HALF[self.config.precision])

    def backward(
        self, images: Tensor, targets: Sequence[Objects], *, last: bool = True
    ) -> dict[str, Tensor]:
        """Losses of a part of a step, whose gradients are added to those of the parts before.

        Args:
            images (Tensor[B, 3, H, W]): normalised images.
            targets (sequence of mapping): the objects of each image.
            last (bool): no part follows; gradients are averaged over the ranks. Default: True

        Returns:
            dict of Tensor[]: the terms.
        """
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        waits = isinstance(self._losses, nn.parallel.DistributedDataParallel) and not last
        with self._losses.no_sync() if waits else nullcontext():  # type: ignore[operator]
            with self.autocast():
                losses: dict[str, Tensor] = self._losses(images, targets)
            loss = total(losses)
            if self.accumulate > 1:
                loss = loss / self.accumulate
            self.scaler.scale(loss).backward()
        return losses

    def update(self, optimizer: torch.optim.Optimizer, clip: float) -> None:
        """One step of the optimizer, with gradients of at most the norm ``clip``; 0 for any."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(optimizer)
        for parameter in self._batch_scales:
            if parameter.grad is not None:
                parameter.grad /= self.parts**0.5
        if clip > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.scaler.step(optimizer)
        self.scaler.update()

    def close(self) -> None:
        """Take the teacher's hooks from the detector."""
        if self._distillation is not None:
            self._distillation.close()

    def share_buffers(self) -> None:
        """Give every rank the buffers of the first, such as the statistics of batch norms."""
        if world() > 1:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, src=0)


def _distillation(model: Detector, teacher: Detector, config: DistillConfig) -> Distillation:
    if not config.feature_weight and not config.prediction_weight:
        raise ConfigError(
            "distill.prediction_weight: expected it or distill.feature_weight above 0, got 0 twice"
        )
    try:
        return Distillation(
            model.network,
            teacher.network,
            feature_weight=config.feature_weight,
            prediction_weight=config.prediction_weight,
            temperature=config.temperature,
        )
    except ValueError as error:  # a detector whose prediction layers are not known
        raise ConfigError(f"distill.teacher: {error}") from None


def _scales_of_batches(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of inputs whose gradient LSQ divides by the square root of their elements' number.

    That counts the batch; of a step that is cut into parts, each has as many times fewer.
    """
    weights = {m.weight_quantizer for m in model.modules() if isinstance(m, QATLayer)}
    for module in model.modules():
        if isinstance(module, Quantizer) and module not in weights and module.grad_scale == "lsq":
            yield from module.parameters()


def sync_norms(network: nn.Module) -> nn.Module:
    """Batch norms with the statistics of all ranks, in place.

    Raises:
        ConfigError: the network is not on a CUDA device, which torch's need.
    """
    device = next(network.parameters()).device
    if world() == 1:
        return network
    if device.type != "cuda":
        raise ConfigError(f"engine.sync_norms: expected CUDA devices, got {device}")
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return converted
