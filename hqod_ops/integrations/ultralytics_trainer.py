"""Quantization-aware training by Ultralytics' own trainer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.cfg import parse_key_value_pair
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import DEFAULT_CFG
from ultralytics.utils.torch_utils import unwrap_model

from hqod_ops.integrations.harmonize import harmonize
from hqod_ops.integrations.ultralytics import is_quantized
from hqod_ops.quant import QATConfig, calibrate, prepare_qat
from hqod_ops.quant.config.qat_config import get_config
from hqod_ops.quant.config.toml import from_toml
from hqod_ops.quant.parameters import quantizer_parameters


class HQODTrainer(DetectionTrainer):  # type: ignore[misc]
    """Trains a quantized detector with the terms of HQOD, in place of Ultralytics' trainer.

    Everything else is Ultralytics': data, augmentation, optimizer, EMA, validation, checkpoints,
    resuming. Before training the model is prepared and calibrated on images of the training set;
    its scales get no weight decay. A checkpoint holds the quantized model, which ``YOLO(path)``
    validates and predicts with; opening it needs this package. For a file to deploy call
    :func:`hqod_ops.quant.export_onnx`, as Ultralytics' export knows nothing of the quantizers.

    The attributes below are also arguments of ``YOLO.train``, beside Ultralytics' own. On the
    command line: ``hqod yolo train model=yolo11n.pt data=coco8.yaml qat=hqod_w4a4``. A training
    that is resumed goes on with those that it was started with.

    Attributes:
        qat (QATConfig or str): see :func:`hqod_ops.quant.prepare_qat`; a str that ends in ``.toml``
            is a file. Without edge layers in it they are the first convolution and the last ones of
            the head. Default: ``"hqod_w4a4"``
        hqod (mapping, optional): options of :func:`hqod_ops.integrations.harmonize`; None for the
            loss as it is. Default: ``{}``
        calibration_batches (int): how many batches calibrate. Default: 8

    Example:
        >>> from ultralytics import YOLO
        >>> from hqod_ops.integrations.ultralytics_trainer import HQODTrainer
        >>> model = YOLO("yolo11n.yaml")
        >>> model.train(trainer=HQODTrainer, data="coco8.yaml", qat="w8a8")  # doctest: +SKIP
    """

    qat: ClassVar[QATConfig | str] = "hqod_w4a4"
    hqod: ClassVar[Mapping[str, Any] | None] = {}
    calibration_batches: ClassVar[int] = 8

    def __init__(self, cfg: Any = DEFAULT_CFG, overrides: Any = None, _callbacks: Any = None):
        given = dict(overrides or {})
        names = ("qat", "hqod", "calibration_batches")
        own = {name: given.pop(name) for name in names if name in given}
        if own:
            # The processes of a training on several GPUs are given the class and Ultralytics' own
            # arguments.
            self.__class__ = type(type(self).__name__, (type(self),), own)
        _config(self.qat)  # an error now, not when the data is loaded
        self._resumed = False
        super().__init__(cfg, given, _callbacks)

    def setup_model(self) -> Any:
        """As Ultralytics, and the quantized model of a checkpoint that is resumed."""
        checkpoint = super().setup_model()
        if self.resume and checkpoint and is_quantized(checkpoint["ema"]):
            self.model = copy.deepcopy(checkpoint["ema"]).float().requires_grad_(True)
            self._resumed = True
        return checkpoint

    def set_model_attributes(self) -> None:
        """As Ultralytics; after it the model is complete, and neither compiled nor wrapped."""
        super().set_model_attributes()
        if self._resumed:  # with its quantizers and terms
            return
        if self.hqod is not None:
            harmonize(self.model, **self.hqod)
        if not is_quantized(self.model):
            prepare_qat(self.model, _config(self.qat))
            self._calibrate()

    def _calibrate(self) -> None:
        size = self.batch_size if self.batch_size > 0 else 16
        loader = self.get_dataloader(self.data["train"], batch_size=size, rank=-1, mode="train")
        batches = [
            self.preprocess_batch(b)["img"] for b in islice(loader, self.calibration_batches)
        ]
        calibrate(self.model, batches, progress=False)

    def build_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As Ultralytics, with the scales among the parameters that do not decay."""
        optimizer: torch.optim.Optimizer = super().build_optimizer(model, *args, **kwargs)
        scales = {id(p): p for p in quantizer_parameters(unwrap_model(model))}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in scales]
        # Of MuSGD's two the last has the usual rate.
        still = [g for g in optimizer.param_groups if g.get("param_group") == "bn"][-1]
        still["params"].extend(scales.values())
        return optimizer


def _config(qat: QATConfig | str) -> QATConfig:
    """What ``qat`` says."""
    if isinstance(qat, str) and qat.endswith(".toml"):
        return from_toml(Path(qat).read_text(encoding="utf-8"))
    return get_config(qat)


def command(mode: str, arguments: list[str]) -> None:
    """``hqod yolo``: what Ultralytics' own command does, with :class:`HQODTrainer`.

    Args:
        mode (str): ``"train"``, ``"val"`` or ``"predict"``.
        arguments (list of str): ``name=value``, Ultralytics' and those of the trainer.

    Raises:
        ValueError: an argument of another form, or no model.
    """
    given: dict[str, Any] = {}
    for argument in arguments:
        if "=" not in argument:
            raise ValueError(f"{argument}: expected name=value")
        name, value = parse_key_value_pair(argument)
        given[name] = value
    if "model" not in given:
        raise ValueError("model: expected model=FILE.pt or model=FILE.yaml, got none")
    model = YOLO(given.pop("model"))
    if mode == "train":
        given["trainer"] = HQODTrainer
    getattr(model, mode)(**given)
