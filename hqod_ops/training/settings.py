"""What a run is made of; :mod:`hqod_ops.training.reading` reads and checks it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta

from hqod_ops.detection.models.options import (
    Count,
    Factor,
    LossConfig,
    ModelConfig,
    Part,
    TestConfig,
    WholeNumber,
)
from hqod_ops.quant.config import FLOAT_BITS, QATConfig

__all__ = [
    "DataConfig",
    "DistillConfig",
    "EngineConfig",
    "LossConfig",
    "ModelConfig",
    "RunConfig",
    "ScheduleConfig",
    "TestConfig",
    "TuningConfig",
]


@dataclass(frozen=True)
class DataConfig:
    """Where images come from.

    Args:
        source (str): "digits", or the directory of a COCO or Pascal VOC data set.
        train_split (str): split to train on.
        test_split (str): split to test on; "" is "test" of the digits and "val" of other data.
        size (int or "auto"): side of the square that images are stretched to; 0 keeps their size.
            "auto" is 96 for digits; images from files keep their shape: the shorter side is
            short_side or else that of the median image, to a multiple of 32 and at most 640; of a
            run that starts from another one (init), what that had.
        short_side (int): length of the shorter side of images from files; 0 keeps it.
        max_side (int): limit of the longer side; 0 for none, or twice a shorter side that "auto"
            finds.
        categories (list of str): names of the classes by label, for data from files that does not
            say them or says too many; empty takes those of the data.
        orientation (str): of photographs with an EXIF orientation: "auto" turns a picture where the
            annotated size asks for it or leaves it open, "exif" always, "stored" never.
        unreadable (str): what to do about image files that cannot be read, which are looked for
            before a training: "error" names them all, "skip" leaves them out, of the test images
            too, "unchecked" does not look.
        flip (bool): mirror every second training image, where the data set allows it.
        train_images (int), test_images (int): scenes to train and to test on (digits).
        max_objects (int): most objects a scene (digits).
        clutter (float): mean number of strokes, blobs and pieces of digits a scene (digits).
        seed (int): of the scenes (digits); runs of different seeds share their data.
        workers (int): processes that load images; 0 loads in the training process.
        calibration_images (int): training images, drawn at random, that set the first activation
            scales.
    """

    source: str = "digits"
    train_split: str = "train"
    test_split: str = ""
    size: WholeNumber | Literal["auto"] = "auto"
    short_side: WholeNumber = 0
    max_side: WholeNumber = 0
    categories: tuple[str, ...] = ()
    orientation: Literal["auto", "exif", "stored"] = "auto"
    unreadable: Literal["error", "skip", "unchecked"] = "error"
    flip: bool = True
    train_images: Count = 8000
    test_images: Count = 500
    max_objects: int = 5
    clutter: float = 4.0
    seed: int = 0
    workers: WholeNumber = 0
    calibration_images: Count = 256


@dataclass(frozen=True)
class ScheduleConfig:
    """How long and how fast to train: AdamW or SGD under a one-cycle or step schedule.

    Args:
        epochs (int): passes over the training images.
        batch_size (int): images a step, of all processes together.
        optimizer (str): "adamw" or "sgd" (momentum 0.9).
        lr (float): highest learning rate.
        weight_decay (float): of weights; norms, biases and factors have none.
        scale_lr (float): learning rate of the quantizers' scales, relative to that of the weights.
        scale_decay (float): weight decay of the scales; the published recipes give them that of the
            weights.
        policy (str): "onecycle" (up, then down along a cosine) or "step" (warm-up epoch, then / 10
            at steps).
        warmup (float): part of a one-cycle run in which the rate rises; first rate of a step run,
            relative to lr.
        steps (list of int): epochs after which a step schedule divides the rate by 10.
        clip (float): largest L2 norm of the gradient; 0 for none.
        accumulate (int): parts that the images of a step come in one after another, where they do
            not fit in memory together; each has norms and loss divisors of its own.
        ema (float): decay of a moving average of weights and scales, which is then what a run
            gives, with batch norm statistics of its own; about 1 / (1 - ema) steps count. 0 for
            none.
    """

    epochs: Count = 5
    batch_size: Count = 8
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Factor = 4e-3
    weight_decay: Factor = 1e-2
    scale_lr: Factor = 0.1
    scale_decay: Factor = 0.0
    policy: Literal["onecycle", "step"] = "onecycle"
    warmup: Part = 0.1
    steps: tuple[WholeNumber, ...] = ()
    clip: Factor = 10.0
    accumulate: Count = 1
    ema: Annotated[float, Meta(ge=0, lt=1)] = 0.0


@dataclass(frozen=True)
class DistillConfig:
    """Learning from a float model with the same network, beside the labels or without them.

    Args:
        teacher (str): checkpoint of a float run, or its directory; "" for none.
        labels (bool): learn from the labels too.
        feature_weight (float): factor of the channel-wise loss of what the prediction layers read.
        prediction_weight (float): factor of the relative squared error of the raw predictions.
        temperature (float): of the channel-wise loss.
    """

    teacher: str = ""
    labels: bool = True
    feature_weight: Factor = 1.0
    prediction_weight: Factor = 1.0
    temperature: Annotated[float, Meta(gt=0, le=sys.float_info.max)] = 1.0


@dataclass(frozen=True)
class EngineConfig:
    """How a run computes: precision, processes, checkpoints.

    Args:
        precision (str): of training: "fp32", or "bf16" or "fp16" by autocast; "fp16" needs CUDA.
        channels_last (bool): weights and images with the channels last in memory.
        compile (bool): torch.compile the network.
        sync_norms (bool): batch norms over the images of all processes; needs CUDA.
        backend (str): of torchrun's processes: "gloo", "nccl", or "auto" by the device.
        checkpoint_minutes (float): time between checkpoints within an epoch; 0 for none.
    """

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    compile: bool = False
    sync_norms: bool = False
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    checkpoint_minutes: Factor = 10.0


@dataclass(frozen=True)
class TuningConfig:
    """What was done to a quantized run beside training; ``hqod quantize`` sets it.

    Args:
        post_training (bool): quantized without training.
        learn_rounding (bool): whether each weight is rounded up or down was learned.
    """

    post_training: bool = False
    learn_rounding: bool = False


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run depends on.

    Args:
        name (str): directory of the run, below the directory of all runs.
        seed (int): of weights and order.
        init (str): checkpoint to start from: weights of a float model with the same network.
        device (str): "auto", "cpu", "cuda", "cuda:1", ...
        quant (QATConfig): what is quantized, and how; without it nothing is.
    """

    name: str = "run"
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1)] = 0
    init: str = ""
    device: str = "auto"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    test: TestConfig = field(default_factory=TestConfig)
    quant: QATConfig = field(default_factory=lambda: QATConfig(FLOAT_BITS, FLOAT_BITS))
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)

    @property
    def quantized(self) -> bool:
        """Whether there is anything to quantize; what a rule does is seen in the network alone."""
        bits = {self.quant.weight_bits, self.quant.act_bits}
        return bits != {FLOAT_BITS} or bool(self.quant.overrides)
