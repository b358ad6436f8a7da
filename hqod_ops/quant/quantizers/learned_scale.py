"""Scales that are learned as they are, and the ways to keep them positive."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hqod_ops.quant.quantizers.base import Quantizer, QuantizerOptions
from hqod_ops.quant.quantizers.state import Codes, Values
from hqod_ops.quant.signatures import Unpack

SCALE_MODES = ("abs", "clamp", "softplus", "raw")
EPS = torch.finfo(torch.float32).eps
"""Lower bound of a scale (float32's machine epsilon, as in the official code)."""


def clamp_through(x: Tensor, low: float, high: float | None = None) -> Tensor:
    """x within bounds, with the gradient of x also beyond them, so that it can come back."""
    return x.detach().clamp(low, high) + (x - x.detach())


def positive(value: Tensor, mode: str) -> Tensor:
    """The positive scale s that a parameter v stands for.

    Args:
        value (Tensor[*]): v.
        mode (str): of :data:`SCALE_MODES`, see :class:`hqod_ops.quant.LSQ`.

    Example:
        >>> positive(torch.tensor([-0.5, 2.0]), "abs")
        tensor([0.5000, 2.0000])
    """
    if mode == "abs":
        return value.abs().clamp(min=EPS)
    if mode == "clamp":
        return clamp_through(value, EPS)
    if mode == "softplus":
        return clamp_through(torch.nn.functional.softplus(value), EPS)
    return value


def write_back(values: Sequence[Tensor]) -> None:
    """Write ``max(|v|, eps)`` to the parameters v, as the official code does before it uses them.

    So a step across 0 leaves a small positive scale, not a negative parameter: averages of models
    do not cross 0, a scale below eps has a gradient, and an optimizer's momentum keeps its sign.
    What autograd has saved stays valid, for a second call in one forward pass changes nothing:
    ``data`` does not count as a new version.
    """
    with torch.no_grad():
        data = [value.data for value in values]
        torch._foreach_abs_(data)
        torch._foreach_clamp_min_(data, EPS)


def inverse_positive(scale: Tensor, mode: str) -> Tensor:
    """The parameter that stands for a positive scale."""
    # The inverse of softplus, in the form that does not overflow.
    return scale + (-torch.expm1(-scale)).log() if mode == "softplus" else scale


class LearnedOptions(QuantizerOptions, total=False):
    """The options of :class:`LearnedScale`."""

    scale_mode: str


class LearnedScale(Quantizer):
    """A quantizer whose scale follows from a parameter that is kept positive.

    Args:
        bits (int), **options: see :class:`Quantizer`.
        scale_mode (str): see :class:`hqod_ops.quant.LSQ`. Default: ``"abs"``

    Raises:
        ValueError: scale_mode is unknown, and as :class:`Quantizer`.
    """

    def __init__(
        self, bits: int, *, scale_mode: str = "abs", **options: Unpack[QuantizerOptions]
    ) -> None:
        super().__init__(bits, **options)
        if scale_mode not in SCALE_MODES:
            raise ValueError(
                f"scale_mode: expected one of {', '.join(SCALE_MODES)}, got {scale_mode!r}"
            )
        self.scale_mode = scale_mode

    @property
    def writes_back(self) -> bool:
        """Whether a forward pass uses :func:`write_back`: in training; an export changes none."""
        # The flag itself: torch.compile takes torch.compiler.is_exporting() for true.
        exporting = torch.compiler._is_exporting_flag
        return self.scale_mode == "abs" and self.training and not exporting

    def _positive(self, name: str, level: int) -> Tensor:
        """A value of one level, see :func:`positive`."""
        return positive(self._value(name, level), self.scale_mode)

    def _used(self, name: str, level: int) -> Tensor:
        """The same for a forward pass, which may write it back."""
        if not self.writes_back:
            return self._positive(name, level)
        value = self._value(name, level)
        write_back([value])
        return value

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale_mode={self.scale_mode!r}"


class LinearOptions(LearnedOptions, total=False):
    """The options of :class:`LinearScale`."""

    grad_scale: float | str | None


class LinearScale(LearnedScale):
    """A quantizer whose scale is the parameter itself; the base of LSQ, LSQ+ and DSQ.

    Args:
        bits (int), scale_mode (str), **options: see :class:`LearnedScale`.
        grad_scale (float or str, optional): see :func:`hqod_ops.fake_quant`. Default: ``"lsq"``
    """

    def __init__(
        self,
        bits: int,
        *,
        grad_scale: float | str | None = "lsq",
        **options: Unpack[LearnedOptions],
    ) -> None:
        super().__init__(bits, **options)
        self.grad_scale = grad_scale

    def effective_scale(self, level: int = 0) -> Tensor:
        return self._positive("scale", level)

    def _used_scale(self, level: int) -> Tensor:
        return self._used("scale", level)

    def _encode(self, scale: Tensor, zero_point: Tensor | None, codes: Sequence[Codes]) -> Values:
        return {"scale": inverse_positive(scale, self.scale_mode)}
