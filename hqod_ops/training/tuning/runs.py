"""What ``hqod quantize`` and ``hqod sensitivity`` do with a trained run."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from hqod_ops.detection.data import DetectionDataset
from hqod_ops.detection.evaluation import coco_results, evaluate_coco
from hqod_ops.detection.models.detector import Detector
from hqod_ops.quant.config import QATConfig
from hqod_ops.quant.tuning import Report, Sensitivity, quantize, sensitivity
from hqod_ops.training import ConfigError
from hqod_ops.training.batch import batch_images
from hqod_ops.training.build import choose_device, load_detector
from hqod_ops.training.data import check_categories, image_shape, open_data
from hqod_ops.training.evaluate import evaluate, predict
from hqod_ops.training.files import (
    CHECKPOINT,
    CONFIG,
    FORMAT,
    HARMONY,
    RESULT,
    write_json,
    write_whole,
)
from hqod_ops.training.reading import from_dict, to_dict
from hqod_ops.training.settings import DistillConfig, RunConfig, TuningConfig

REPORT = "quantize.json"
"""What each step of post-training quantization changed."""

_BATCH = 16


@dataclass
class FloatRun:
    """A trained float run, and images of it that need no labels.

    Args:
        checkpoint (Path): a checkpoint, or the directory of a run.
        source (str, optional): images in the place of those the run was trained on. Default: None
        images (int, optional): how many of them, drawn by the run's seed. Default: None,
            ``data.calibration_images``
        device (str): see :class:`hqod_ops.training.settings.RunConfig`. Default: ``"auto"``

    Raises:
        ConfigError: it is not the checkpoint of a float run.
        DataError: its images cannot be used.
    """

    checkpoint: Path
    source: str | None = None
    images: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        self.model: Detector
        self.model, config, self.categories = load_detector(self.checkpoint)
        if config.quantized:
            raise ConfigError(f"{self.checkpoint}: expected a run in float, got a quantized one")
        data = config.data if self.source is None else replace(config.data, source=self.source)
        self.config: RunConfig = replace(config, data=data, device=self.device)
        self.model = self.model.to(choose_device(self.device))
        # As they are: mirrored images are no better, and would be others every time.
        self.dataset: DetectionDataset = open_data(replace(data, flip=False), train=True)
        count = self.images or data.calibration_images
        generator = torch.Generator().manual_seed(config.seed)
        self.order = torch.randperm(len(self.dataset), generator=generator)[:count]

    def batches(self) -> list[Tensor]:
        """The images in normalised batches."""
        device = next(self.model.parameters()).device
        return [
            batch_images([self.dataset[i][0] for i in part.tolist()], device, self.model.stride)
            for part in self.order.split(_BATCH)
        ]


def quantize_run(
    run: FloatRun,
    quant: QATConfig,
    directory: Path,
    *,
    learn_rounding: bool = False,
    progress: bool = True,
) -> tuple[Report, dict[str, Any]]:
    """Quantize a trained run without training; a run that evaluates and exports comes of it.

    It leaves ``config.json``, ``last.pt``, ``quantize.json`` (what each step changed),
    ``harmony.npz`` and ``result.json``.

    Args:
        run (FloatRun): the run, and its images; its model is quantized in place.
        quant (QATConfig): what is quantized, and how.
        directory (Path): where the new run goes; its name is that of the run.
        learn_rounding (bool): see :func:`hqod_ops.quant.tuning.learn_rounding`. Default: False
        progress (bool): show progress bars where the output is a terminal. Default: True

    Returns:
        Report, dict: what each step changed, and the result on the test images.

    Raises:
        ConfigError: the directory holds a run already, or the settings do not fit the network.
    """
    if (directory / CHECKPOINT).is_file():
        raise ConfigError(f"{directory}: holds a run already; choose another name")
    config = replace(
        run.config,
        name=directory.name,
        init=str(run.checkpoint),
        quant=quant,
        distill=DistillConfig(),
        tuning=TuningConfig(post_training=True, learn_rounding=learn_rounding),
    )
    config = from_dict(to_dict(config))  # checked, as settings from files are
    test = open_data(config.data)
    check_categories("data.test_split", "of the model", run.categories, test.categories)
    try:
        _, report = quantize(
            run.model.network, run.batches(), config.quant, learn=learn_rounding, progress=progress
        )
    except ValueError as error:
        raise ConfigError(f"quant.{error}") from None
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / CONFIG, to_dict(config))
    _save(run, config, directory)
    report.save(directory / REPORT)
    metrics, harmony = evaluate(run.model, test, workers=config.data.workers, progress=progress)
    harmony.save(directory / HARMONY)
    result = {
        **{key: None if value != value else value for key, value in metrics.items()},
        "epochs": 0,
        "seconds": round(sum(step.seconds for step in report.steps), 1),
        "parameters": sum(p.numel() for p in run.model.parameters()),
    }
    write_json(directory / RESULT, result)
    return report, result


def _save(run: FloatRun, config: RunConfig, directory: Path) -> None:
    """A checkpoint to evaluate and to export; there is nothing to resume."""
    state = {
        "format": FORMAT,
        "config": to_dict(config),
        "categories": list(run.categories),
        "image": list(image_shape(run.dataset)),
        "epoch": 0,
        "history": [],
        "model": run.model.state_dict(),
    }
    content = io.BytesIO()
    torch.save(state, content)
    write_whole(directory / CHECKPOINT, content.getbuffer())


def run_sensitivity(
    run: FloatRun,
    *,
    bits: Sequence[int] = (2, 3, 4, 8),
    metric: bool = False,
    progress: bool = True,
) -> Sensitivity:
    """What it costs to quantize each layer of a trained run alone.

    Args:
        run (FloatRun): the run, and its images.
        bits (sequence of int): widths to try. Default: (2, 3, 4, 8)
        metric (bool): measure the AP on these images too, by their labels. Default: False
        progress (bool): show progress bars where the output is a terminal. Default: True

    Raises:
        ConfigError: a width is unknown.
    """
    measure: Callable[[Any], float] | None = None
    if metric:
        measure = _precision(run, progress=False)
    try:
        return sensitivity(
            run.model.network, run.batches(), bits=bits, metric=measure, progress=progress
        )
    except ValueError as error:
        raise ConfigError(f"--{error}") from None


def _precision(run: FloatRun, progress: bool) -> Callable[[Any], float]:
    """The AP of a network on the images of a run."""
    indices: Iterable[int] = run.order.tolist()
    some = Subset(run.dataset, list(indices))
    kept = {target["image_id"] for _, target in (some[i] for i in range(len(some)))}
    truth = dict(run.dataset.coco_ground_truth)
    truth["images"] = [image for image in truth["images"] if image["id"] in kept]
    truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] in kept]

    def measure(network: Any) -> float:
        original = run.model.network
        run.model.network = network
        try:
            outputs, targets = predict(run.model, some, progress=progress)
        finally:
            run.model.network = original
        return float(evaluate_coco(truth, coco_results(outputs, targets))["AP"])

    return measure
