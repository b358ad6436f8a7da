"""From the settings of a run to its detector: built, loaded, quantized."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from hqod_ops.detection.data import DetectionDataset
from hqod_ops.detection.models.atss import ATSS
from hqod_ops.detection.models.detector import Detector
from hqod_ops.quant import calibrate, prepare_qat, use_level_batch_norm
from hqod_ops.training import ConfigError
from hqod_ops.training.batch import batch_images
from hqod_ops.training.data import check_categories
from hqod_ops.training.engine import local_rank, rank, world
from hqod_ops.training.files import read_checkpoint, trained_weights
from hqod_ops.training.reading import from_dict
from hqod_ops.training.settings import RunConfig

_STATISTICS_BATCH = 16
"""Images that a batch normalisation sees together while its statistics are estimated."""


def _atss(config: RunConfig, num_classes: int) -> ATSS:
    model = ATSS(config.model, num_classes, config.loss, config.test)
    if config.model.level_norms:
        if config.model.head_depth == 0:
            raise ValueError("level_norms: expected a head_depth of at least 1, got 0")
        use_level_batch_norm(model.network, "head.*_tower.*", config.model.levels)
    return model


MODELS: Mapping[str, Callable[[RunConfig, int], Detector]] = {"atss": _atss}
"""The kinds of detectors, by the setting ``model.kind``."""


def build_model(config: RunConfig, num_classes: int) -> Detector:
    """An untrained float detector.

    Raises:
        ConfigError: there is no such model, or its settings do not fit together.
    """
    if config.model.kind not in MODELS:
        kinds = ", ".join(map(repr, MODELS))
        raise ConfigError(f"model.kind: expected one of {kinds}, got {config.model.kind!r}")
    try:
        return MODELS[config.model.kind](config, num_classes)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from None


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto" is CUDA where there is one, under torchrun the rank's own.

    Raises:
        ConfigError: the name is unknown or the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" or world() == 1:
            return torch.device(name)
    try:
        device = torch.device(f"cuda:{local_rank()}" if name == "cuda" and world() > 1 else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).partition("\n")[0]
        if first.startswith("Expected one of "):  # two dozen backends, most of them not built in
            first = 'expected a device of torch, such as "cpu", "cuda" or "cuda:1"'
        raise ConfigError(f"device: cannot use {name!r}: {first}") from None
    if device.type == "meta":
        raise ConfigError(f"device: cannot use {name!r}: it computes no values")
    return device


def quantize(model: Detector, config: RunConfig) -> None:
    """Put quantizers into a detector's network, in place; their scales are still to be set.

    Raises:
        ConfigError: the settings do not fit the network.
    """
    # What must see the network run, such as the folding of norms, needs no values for that.
    device = next(model.parameters()).device
    example = torch.zeros(1, 3, 2 * model.stride, 2 * model.stride, device=device)
    try:
        prepare_qat(model.network, config.quant, example=example)
    except ValueError as error:
        raise ConfigError(f"quant.{error}") from None


def set_scales(model: Detector, dataset: DetectionDataset, config: RunConfig) -> None:
    """The first scales of a quantized detector, from training images drawn by the run's seed.

    Files are often sorted by what is in them, so the first ones are no sample.
    """
    device = next(model.parameters()).device
    batches = (  # one in memory at a time
        batch_images([dataset[i][0] for i in indices], device, model.stride)
        for indices in _sample(dataset, config, config.schedule.batch_size)
    )
    # Every process sees the same images, and so sets the scales that one alone would.
    calibrate(model.network, batches, progress=False, distributed=False)


def _sample(dataset: DetectionDataset, config: RunConfig, batch: int) -> Iterator[list[int]]:
    """Indices of training images drawn by the run's seed, in batches."""
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(dataset), generator=generator)[: config.data.calibration_images]
    yield from (part.tolist() for part in order.split(batch))


def sample_batches(
    dataset: DetectionDataset, config: RunConfig, device: torch.device, stride: int
) -> Iterator[Tensor]:
    """This process's share of the images that set the first scales, in normalised batches.

    None is mirrored, so they are the same every time and need no random state.
    """
    whole = _sample(dataset, config, _STATISTICS_BATCH)
    for indices in itertools.islice(whole, rank(), None, world()):
        yield batch_images([dataset.load(i)[0] for i in indices], device, stride)


def load_float(model: Detector, config: RunConfig, categories: Sequence[str]) -> None:
    """The weights of the float model that a run starts from.

    Args:
        model (Detector): a float model; changed in place.
        config (RunConfig): its ``init`` names the checkpoint.
        categories (sequence of str): names of the classes, by label.

    Raises:
        ConfigError: the checkpoint is that of a quantized model, of other classes or of another
            network.
    """
    state = read_checkpoint(config.init)
    if from_dict(state["config"]).quantized:
        raise ConfigError(f"init: expected the checkpoint of a float model, got {config.init}")
    check_categories("init", "of the data", categories, state["categories"])
    problem = f"init: the network of {config.init} differs from that of this run's settings"
    _load_weights(model, trained_weights(state), problem)


def load_teacher(model: Detector, config: RunConfig, categories: Sequence[str]) -> Detector:
    """The float detector that a run learns from, in eval mode and without gradients.

    Args:
        model (Detector): the detector of the run, in float: the teacher must have its network.
        config (RunConfig): its ``distill.teacher`` names the checkpoint.
        categories (sequence of str): names of the classes, by label.

    Returns:
        Detector: on the device of the model.

    Raises:
        ConfigError: the checkpoint is that of a quantized model, of other classes or of another
            network; then the first layer that differs is named.
    """
    path = config.distill.teacher
    with torch.random.fork_rng(devices=()):  # what the run draws does not depend on its teacher
        teacher, its_config, its_categories = load_detector(path)
    if its_config.quantized:
        raise ConfigError(f"distill.teacher: expected the checkpoint of a float model, got {path}")
    check_categories("distill.teacher", "of the data", categories, its_categories)
    different = first_difference(model.network, teacher.network)
    if different:
        raise ConfigError(
            f"distill.teacher: the network of {path} differs from that of this run's settings: "
            f"{different}"
        )
    return teacher.requires_grad_(False).to(next(model.parameters()).device)


def first_difference(expected: nn.Module, got: nn.Module) -> str:
    """The first layer in which two networks differ, and how; "" where they are alike.

    Example:
        >>> from torch import nn
        >>> from hqod_ops.training.build import first_difference
        >>> one, other = nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(2, 4))
        >>> first_difference(one, other)
        "layer '0': expected weight of shape [3, 2], got [4, 2]"
    """
    ours, theirs = ({n: v.shape for n, v in m.state_dict().items()} for m in (expected, got))
    for name in dict.fromkeys([*ours, *theirs]):
        layer, _, entry = name.rpartition(".")
        if name not in theirs:
            return f"layer {layer!r}: expected {entry}, got none"
        if name not in ours:
            return f"layer {layer!r}: expected no {entry}, got one"
        if ours[name] != theirs[name]:
            shapes = [list(shapes[name]) for shapes in (ours, theirs)]
            return f"layer {layer!r}: expected {entry} of shape {shapes[0]}, got {shapes[1]}"
    return ""


def _load_weights(model: Detector, weights: Mapping[str, Tensor], problem: str) -> None:
    try:
        model.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:  # torch's, a quantizer's
        raise ConfigError(problem) from error


def load_detector(path: str | Path) -> tuple[Detector, RunConfig, list[str]]:
    """A trained detector.

    Args:
        path (str or Path): a checkpoint, or the directory of a run.

    Returns:
        tuple: the detector in eval mode on the CPU, the configuration of its run, and the names of
        its classes.

    Raises:
        ConfigError: no checkpoint of a run.
    """
    state = read_checkpoint(path)
    config = from_dict(state["config"])
    model = build_model(config, len(state["categories"]))
    if config.quantized:
        quantize(model, config)
    problem = f"{path}: its weights do not fit the network of its settings"
    _load_weights(model, trained_weights(state), problem)
    return model.eval(), config, state["categories"]
