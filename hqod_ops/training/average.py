"""The moving average of a model in training: weights and the scales of its quantizers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hqod_ops.detection.models.detector import Detector
from hqod_ops.quant.tuning import reestimate_batch_norm
from hqod_ops.quant.tuning.batch_norm import estimated_norms


class Average:
    """The exponential moving average of a detector's parameters, those of quantizers included.

    With ``p_t`` a parameter after step t and the decay d, ``a_1 = p_1`` and
    ``a_t = d a_(t-1) + (1 - d) p_t``. Buffers are those of the last step until :meth:`finish`.

    Args:
        model (Detector): the detector in training, of which a copy is made.
        decay (float): d, in (0, 1); about ``1 / (1 - d)`` steps count.

    Example:
        >>> from hqod_ops.detection.models.atss import ATSS
        >>> from hqod_ops.detection.models.options import ModelConfig
        >>> from hqod_ops.training.average import Average
        >>> model = ATSS(ModelConfig(), num_classes=10)
        >>> average = Average(model, 0.999)
        >>> average.update(model)
        >>> average.state()["steps"]
        1
    """

    def __init__(self, model: Detector, decay: float) -> None:
        self._averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))

    @property
    def model(self) -> Detector:
        """The detector with the averages."""
        return cast(Detector, self._averaged.module)

    def update(self, model: Detector) -> None:
        """Take in the parameters after a step."""
        self._averaged.update_parameters(model)

    def finish(self, model: Detector, batches: Iterable[Tensor]) -> None:
        """Give the averaged detector the statistics of its own batch normalisations.

        Those in training belong to other weights. In a distributed run every process calls it, with
        batches of its own or with none. Doing it twice changes nothing.

        Args:
            model (Detector): the detector in training; its other buffers are taken.
            batches (iterable of Tensor[B, 3, H, W]): normalised images; not looked at where no
                statistics are to be estimated.
        """
        for own, source in zip(self.model.buffers(), model.buffers(), strict=True):
            own.copy_(source)
        if estimated_norms(self.model.network):
            reestimate_batch_norm(self.model.network, batches)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"model": self.model.state_dict(), "steps": int(self._averaged.n_averaged)}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from the state of a checkpoint."""
        self.model.load_state_dict(state["model"])
        self._averaged.n_averaged.fill_(state["steps"])
