"""The documented contract of fake quantization: it checks, then makes one call into the backend.

The formulas are in :mod:`hqod_ops.reference` (plain PyTorch) and ``csrc/math`` (native).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hqod_ops import _debug, checks
from hqod_ops._loader import backend as _backend


def _float_zero_point(zero_point: Tensor, scale: Tensor) -> Tensor:
    """An integer zero point in the dtype of the scale."""
    if not isinstance(zero_point, Tensor) or not isinstance(scale, Tensor):
        return zero_point  # the checks will refuse them
    if zero_point.dtype.is_floating_point or zero_point.dtype.is_complex:
        return zero_point
    return zero_point.to(scale.dtype)


def _codes(name: str, values: int | Sequence[int], xs: Sequence[Tensor]) -> list[int]:
    """One code for each of xs, given as one for all or as a list."""
    listed = list(values) if isinstance(values, Sequence) else [values] * len(xs)
    checks.one_each(name, listed, xs)
    return listed


def _grad_scale(grad_scale: float | str | None) -> float | str:
    checks.grad_scale(grad_scale)
    return 1.0 if grad_scale is None else grad_scale


def fake_quant(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    quant_min: int,
    quant_max: int,
    ch_axis: int | None = None,
    grad_scale: float | str | None = None,
    activation: str | None = None,
) -> Tensor:
    """Quantize and dequantize, with gradients to x, the scale and the zero point (LSQ, LSQ+).

    ``q = clamp(round(x / scale) + round(zero_point), quant_min, quant_max)`` and
    ``y = (q - round(zero_point)) * scale``, rounding half to even, with a true division, as ONNX
    defines QuantizeLinear and DequantizeLinear.

    Args:
        x (Tensor[*]): weights or activations, any dense layout; y keeps it.
        scale (Tensor[1] or Tensor[C]): step size, in units of x; C is the size of ``ch_axis``. The
            dtype of x, or float32 with a half x. A non-positive scale is not rejected: see
            :func:`hqod_ops.debug`.
        zero_point (Tensor[1] or Tensor[C], optional): code of the value 0, with the dtype of scale
            (learned) or an integer dtype (fixed). Default: None, symmetric
        quant_min (int), quant_max (int): the codes' range, such as -8 and 7 or 0 and 15.
        ch_axis (int, optional): axis with a scale of its own for every index; may be negative.
            Default: None, one scale for all
        grad_scale (float or str, optional): factor of the gradients to scale and zero point;
            ``"lsq"`` is 1 / sqrt(x.numel() / C * quant_max). Default: None, 1
        activation (str, optional): ``"relu"`` or ``"relu6"``, applied to x first, in the same pass:
            equal in value and gradient to quantizing ``relu(x)``, without its tensor. Default: None

    Returns:
        Tensor[*]: the shape, dtype and layout of x. NaN stays NaN.

    Raises:
        ValueError: wrong number of scales or zero points, devices differ, quant_min >= quant_max,
            unknown activation.
        TypeError: a dtype is not floating point, the dtypes do not fit, or an option is no number.
        IndexError: ch_axis is out of range.

    Gradient: straight-through. With code ``c = round(x / s) + round(z)`` before the clamp: inside
    the range ``dx = dy``, ``ds = (q - z - x / s) dy``, ``dz = 0``; outside ``dx = 0``,
    ``ds = (q - z) dy``, ``dz = -s dy``; ds and dz are summed over their elements and multiplied by
    grad_scale. They are recomputed from x in one pass; differentiable once. A scale that requires
    no gradient costs no reduction.

    Source: LSQ (arXiv:1902.08153), LSQ+ (arXiv:2004.09576).

    Example:
        >>> import torch
        >>> from hqod_ops import fake_quant
        >>> x = torch.tensor([-1.2, -0.3, 0.26, 1.5], requires_grad=True)
        >>> scale = torch.tensor(0.4, requires_grad=True)
        >>> y = fake_quant(x, scale, quant_min=-2, quant_max=1)
        >>> y.sum().backward()
        >>> y.detach()
        tensor([-0.8000, -0.4000,  0.4000,  0.4000])
        >>> x.grad, scale.grad
        (tensor([0., 1., 1., 0.]), tensor(-0.9000))
    """
    quant_min = checks.integer("quant_min", quant_min)
    quant_max = checks.integer("quant_max", quant_max)
    checks.quant_range(quant_min, quant_max)
    checks.activation(activation)
    if zero_point is not None:
        zero_point = _float_zero_point(zero_point, scale)
    axis = checks.quant_params(x, scale, zero_point, ch_axis)
    if _debug.active():
        _debug.quantized(x, scale, zero_point, (quant_min, quant_max))
    return _backend().fake_quant(
        x,
        scale,
        zero_point,
        quant_min=quant_min,
        quant_max=quant_max,
        ch_axis=axis,
        grad_scale=_grad_scale(grad_scale),
        activation=activation,
    )


def fake_quant_foreach(
    xs: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor] | None = None,
    *,
    quant_min: int | Sequence[int],
    quant_max: int | Sequence[int],
    ch_axis: int | None = None,
    grad_scale: float | str | None = None,
) -> list[Tensor]:
    """:func:`fake_quant` of many tensors in one call: a whole model's weights, say.

    The results and gradients are those of a loop over :func:`fake_quant`; the call pays the fixed
    cost of one op instead of one a tensor.

    Args:
        xs (sequence of Tensor[*]): tensors of one dtype and device, shapes free.
        scales (sequence of Tensor[1] or Tensor[C_i]): one an x.
        zero_points (sequence of Tensor, optional): one an x. Default: None, symmetric
        quant_min (int or sequence of int), quant_max (int or sequence of int): the codes' range,
            one for all or one an x.
        ch_axis (int, optional): as in :func:`fake_quant`, for all. Default: None
        grad_scale (float or str, optional): as in :func:`fake_quant`. Default: None, 1

    Returns:
        list of Tensor[*]: like xs.

    Raises:
        ValueError: lists of different lengths, and as :func:`fake_quant` for every entry.
        TypeError, IndexError: as :func:`fake_quant` for every entry.

    Gradient: as :func:`fake_quant`.

    Source: LSQ (arXiv:1902.08153), LSQ+ (arXiv:2004.09576).

    Example:
        >>> import torch
        >>> from hqod_ops import fake_quant_foreach
        >>> weights = [torch.tensor([0.3, -2.0]), torch.tensor([0.9])]
        >>> scales = [torch.tensor(0.5), torch.tensor(1.0)]
        >>> fake_quant_foreach(weights, scales, quant_min=-2, quant_max=1)
        [tensor([ 0.5000, -1.0000]), tensor([1.])]
    """
    xs, scales = list(xs), list(scales)
    checks.one_each("scales", scales, xs)
    mins = _codes("quant_min", quant_min, xs)
    maxs = _codes("quant_max", quant_max, xs)
    zeros: list[Tensor | None] = [None] * len(xs)
    if zero_points is not None:
        checks.one_each("zero_points", zero_points, xs)
        zeros = [_float_zero_point(z, s) for z, s in zip(zero_points, scales, strict=True)]
    debugging = _debug.active()
    for index, (x, scale, zero, low, high) in enumerate(
        zip(xs, scales, zeros, mins, maxs, strict=True)
    ):
        try:
            mins[index] = checks.integer("quant_min", low)
            maxs[index] = checks.integer("quant_max", high)
            checks.quant_range(mins[index], maxs[index])
            checks.quant_params(x, scale, zero, ch_axis)
            checks.alike("x", x, "xs[0]", xs[0])
            if zero_points is not None and zero is None:
                raise TypeError("zero_point: expected a Tensor, got None")
            if debugging:
                _debug.quantized(x, scale, zero, (mins[index], maxs[index]))
        except (ValueError, TypeError, IndexError) as error:
            raise type(error)(f"entry {index}: {error}") from None
    if not xs:
        return []
    return _backend().fake_quant_foreach(
        xs,
        scales,
        None if zero_points is None else zeros,
        quant_min=mins,
        quant_max=maxs,
        ch_axis=ch_axis,
        grad_scale=_grad_scale(grad_scale),
    )
