"""LSQ: learned step size quantization."""

from __future__ import annotations

from torch import Tensor

from hqod_ops.quant.quantizers.base import ForeachForm
from hqod_ops.quant.quantizers.learned_scale import EPS, SCALE_MODES, LinearScale

__all__ = ["EPS", "LSQ", "SCALE_MODES"]


class LSQ(LinearScale):
    """Learned step size quantization: the scale is trained with the weights.

    ``y = clamp(round(x / s), qmin, qmax) * s`` by :func:`hqod_ops.fake_quant`, where the gradient
    to s is multiplied by ``1 / sqrt(elements per scale * qmax)``. Elements count the whole batch.

    How s is kept positive, from the parameter v (``scale``):

    - ``"abs"``: ``s = max(|v|, eps)``, in training written back to v before it is used, as in the
      official code: a step across 0 leaves a small positive v, whose gradient is that of s. Where
      parameters are sharded (FSDP), so that what is written to them is lost, take another mode.
    - ``"clamp"``: ``s = max(v, eps)``, with the gradient of s passed to v also below eps, so that a
      scale that has sunk below can rise again.
    - ``"softplus"``: ``s = max(log(1 + exp(v)), eps)``: smooth, but it learns a small scale more
      slowly, by the factor ``1 - exp(-s)``.
    - ``"raw"``: ``s = v``, nothing guarded.

    Args:
        bits (int), **options: see :class:`Quantizer`.
        scale_mode (str): ``"abs"``, ``"clamp"``, ``"softplus"`` or ``"raw"``. Default: ``"abs"``
        grad_scale (float or str, optional): see :func:`hqod_ops.fake_quant`. Default: ``"lsq"``

    Raises:
        ValueError: scale_mode is unknown, and as :class:`Quantizer`.

    Gradient: that of :func:`hqod_ops.fake_quant`.

    Source: LSQ (arXiv:1902.08153), with the details of the HQOD code.

    Example:
        >>> import torch
        >>> from hqod_ops.quant import LSQ
        >>> quantizer = LSQ(2)
        >>> quantizer.set_scale(torch.tensor([0.4]), signed=True)
        >>> quantizer(torch.tensor([-1.2, -0.3, 0.26, 1.5])).tolist()
        [-0.800000011920929, -0.4000000059604645, 0.4000000059604645, 0.4000000059604645]
    """

    def foreach_form(self, x: Tensor) -> ForeachForm | None:
        if type(self) is not LSQ:
            return super().foreach_form(x)  # what a subclass changes would be passed by
        # The parameters of all tensors become scales at once.
        back, scale = self.writes_back, self.get_parameter("scale")
        mode = None if back else self.scale_mode
        return ForeachForm(
            x, scale, None, self.codes(), self.ch_axis, self.grad_scale, mode, written_back=back
        )
