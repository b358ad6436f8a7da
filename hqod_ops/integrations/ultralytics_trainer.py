"""Quantization-aware training by Ultralytics' own trainer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import nn
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils.torch_utils import unwrap_model

from hqod_ops.integrations.harmonize import harmonize
from hqod_ops.integrations.ultralytics import (
    is_quantized,
    keep_unfused,
)
from hqod_ops.quant import QATConfig, Rule, calibrate, prepare_qat
from hqod_ops.quant.config.qat_config import get_config
from hqod_ops.quant.parameters import quantizer_parameters


class HQODTrainer(DetectionTrainer):  # type: ignore[misc]
    """Trains a quantized detector with the terms of HQOD, in place of Ultralytics' trainer.

    Everything else is Ultralytics': data, augmentation, optimizer, EMA, validation, checkpoints,
    resuming. Before training the model is prepared and calibrated on images of the training set;
    its scales get no weight decay. A checkpoint holds the quantized model, which ``YOLO(path)``
    validates and predicts with; opening it needs this package. For a file to deploy call
    :func:`hqod_ops.quant.export_onnx`, as Ultralytics' export knows nothing of the quantizers.

    To change an attribute derive a class, in a module that can be imported: Ultralytics starts the
    processes of a training on several GPUs by its name.

    Attributes:
        qat (QATConfig or str): see :func:`hqod_ops.quant.prepare_qat`. Without edge layers in it
            they are the first convolution and the last ones of the head. Default: ``"hqod_w4a4"``
        hqod (mapping, optional): options of :func:`hqod_ops.integrations.harmonize`; None for the
            loss as it is. Default: ``{}``
        calibration_batches (int): how many batches calibrate. Default: 8

    Example:
        >>> from ultralytics import YOLO
        >>> from hqod_ops.integrations.ultralytics_trainer import HQODTrainer
        >>> model = YOLO("yolo11n.yaml")
        >>> model.train(trainer=HQODTrainer, data="coco8.yaml", epochs=10)  # doctest: +SKIP
    """

    qat: ClassVar[QATConfig | str] = "hqod_w4a4"
    hqod: ClassVar[Mapping[str, Any] | None] = {}
    calibration_batches: ClassVar[int] = 8

    def setup_model(self) -> Any:
        """As Ultralytics, and the quantized model of a checkpoint that is resumed."""
        checkpoint = super().setup_model()
        if self.resume and checkpoint and is_quantized(checkpoint["ema"]):
            self.model = copy.deepcopy(checkpoint["ema"]).float().requires_grad_(True)
        return checkpoint

    def set_model_attributes(self) -> None:
        """As Ultralytics; after it the model is complete, and neither compiled nor wrapped."""
        super().set_model_attributes()
        if self.hqod is not None:
            harmonize(self.model, **self.hqod)
        keep_unfused(self.model)
        if not is_quantized(self.model):
            config = get_config(self.qat)
            if self.model.model[-1].reg_max > 1:
                # A convolution sums up the distribution of a side, with constants as weights.
                constant = Rule("*.dfl.conv", skip=True)
                config = replace(config, overrides=(*config.overrides, constant))
            prepare_qat(self.model, config)
            self._calibrate()

    def _calibrate(self) -> None:
        size = self.batch_size if self.batch_size > 0 else 16
        loader = self.get_dataloader(self.data["train"], batch_size=size, rank=-1, mode="train")
        batches = [
            self.preprocess_batch(b)["img"] for b in islice(loader, self.calibration_batches)
        ]
        calibrate(self.model, batches, progress=False, forward=_both_heads)

    def build_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As Ultralytics, with the scales among the parameters that do not decay."""
        optimizer: torch.optim.Optimizer = super().build_optimizer(model, *args, **kwargs)
        scales = {id(p): p for p in quantizer_parameters(unwrap_model(model))}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in scales]
        still = next(g for g in optimizer.param_groups if g.get("param_group") == "bn")
        still["params"].extend(scales.values())
        return optimizer


def _both_heads(model: nn.Module, images: torch.Tensor) -> None:
    """Of an end-to-end model one runs in training only. Boxes are decoded in evaluation only."""
    model.train()(images)
    model.eval()(images)
