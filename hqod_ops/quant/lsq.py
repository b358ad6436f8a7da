"""LSQ: learned step size quantization."""

from __future__ import annotations

import torch
from torch import Tensor

from hqod_ops.functional import fake_quant
from hqod_ops.quant.quantizer import Quantizer

SCALE_MODES = ("abs", "clamp", "softplus", "raw")
EPS = torch.finfo(torch.float32).eps
"""Lower bound of a scale (float32's machine epsilon, as in the official code)."""


class LSQ(Quantizer):
    """Learned step size quantization: the scale is trained with the weights.

    ``y = clamp(round(x / s), qmin, qmax) * s`` by :func:`hqod_ops.fake_quant`, where the gradient
    to s is multiplied by ``1 / sqrt(elements per scale * qmax)``. Elements count the whole batch.

    How s is kept positive, from the parameter v (``scale``):

    - ``"abs"``: ``s = max(|v|, eps)``, as in the official code.
    - ``"clamp"``: ``s = max(v, eps)``, with the gradient of s passed to v also below eps, so that a
      scale that has sunk below can rise again.
    - ``"softplus"``: ``s = max(log(1 + exp(v)), eps)``: smooth, but it learns a small scale more
      slowly, by the factor ``1 - exp(-s)``.
    - ``"raw"``: ``s = v``, nothing guarded.

    Args:
        bits (int), signed (bool, optional), ch_axis (int, optional), channels (int),
            observer (str), device, dtype: see :class:`Quantizer`.
        scale_mode (str): ``"abs"``, ``"clamp"``, ``"softplus"`` or ``"raw"``. Default: ``"abs"``
        grad_scale (float or str, optional): see :func:`hqod_ops.fake_quant`. Default: ``"lsq"``

    Raises:
        ValueError: bits is outside 2..8, or scale_mode or observer is unknown.

    Source: LSQ (arXiv:1902.08153), with the details of the HQOD code.

    Example:
        >>> import torch
        >>> from hqod_ops.quant import LSQ
        >>> quantizer = LSQ(2)
        >>> quantizer.set_scale(torch.tensor([0.4]), signed=True)
        >>> quantizer(torch.tensor([-1.2, -0.3, 0.26, 1.5])).tolist()
        [-0.800000011920929, -0.4000000059604645, 0.4000000059604645, 0.4000000059604645]
    """

    def __init__(
        self,
        bits: int,
        *,
        signed: bool | None = None,
        ch_axis: int | None = None,
        channels: int = 1,
        observer: str = "ema_mse",
        scale_mode: str = "abs",
        grad_scale: float | str | None = "lsq",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            bits,
            signed=signed,
            ch_axis=ch_axis,
            channels=channels,
            observer=observer,
            device=device,
            dtype=dtype,
        )
        if scale_mode not in SCALE_MODES:
            raise ValueError(
                f"scale_mode: expected one of {', '.join(SCALE_MODES)}, got {scale_mode!r}"
            )
        self.scale_mode, self.grad_scale = scale_mode, grad_scale

    def effective_scale(self, level: int = 0) -> Tensor:
        value: Tensor = self.scale
        if self.levels > 1:
            value = value[level] if value.dim() > 1 else value[level : level + 1]
        if self.scale_mode == "abs":
            return value.abs().clamp(min=EPS)
        if self.scale_mode == "clamp":
            return value.detach().clamp(min=EPS) + (value - value.detach())
        if self.scale_mode == "softplus":
            return torch.nn.functional.softplus(value).clamp(min=EPS)
        return value

    def _quantize(self, x: Tensor, level: int) -> Tensor:
        quant_min, quant_max = self.codes(level)
        return fake_quant(
            x,
            self.effective_scale(level),
            quant_min=quant_min,
            quant_max=quant_max,
            ch_axis=self.ch_axis,
            grad_scale=self.grad_scale,
        )

    def _encode(self, scale: Tensor) -> Tensor:
        # The inverse of softplus, in the form that does not overflow.
        return scale + (-torch.expm1(-scale)).log() if self.scale_mode == "softplus" else scale

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale_mode={self.scale_mode!r}"
