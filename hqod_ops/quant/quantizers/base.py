"""The base of all quantizers: calibration, and one scale per level in shared layers."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from hqod_ops.functional import fake_quant
from hqod_ops.quant.observers.base import Observer, check_bits, code_range
from hqod_ops.quant.observers.registry import OBSERVERS, check_observer
from hqod_ops.quant.quantizers.state import Codes, ScaleState, StateOptions, Values
from hqod_ops.quant.signatures import PassesOn, Unpack

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "relu6": nn.functional.relu6,
}
"""The activations that :func:`hqod_ops.fake_quant` takes in."""


class Observed(NamedTuple):
    """What calibration found, as :meth:`Quantizer.set_scale` takes it."""

    scale: Tensor
    """Tensor[1] or Tensor[C]; with L > 1 levels Tensor[L] or Tensor[L, C]."""
    signed: list[bool]
    """Sign of the codes of each level."""
    zero_point: Tensor | None = None
    """Whole zero points in the shape of the scale; None if symmetric."""


class ForeachForm(NamedTuple):
    """One tensor of a call of :func:`hqod_ops.fake_quant_foreach`, see
    :meth:`Quantizer.foreach_form`."""

    x: Tensor
    scale: Tensor
    zero_point: Tensor | None
    codes: Codes
    ch_axis: int | None
    grad_scale: float | str | None
    scale_mode: str | None = None
    """How the scales of all tensors are yet to be made positive, see :class:`hqod_ops.quant.LSQ`;
    None: they are."""
    written_back: bool = False
    """Whether that is to be written back to them, once for all tensors, before they are used."""

    @property
    def kind(self) -> tuple[object, ...]:
        """What the tensors of one call have in common."""
        shifted = self.zero_point is not None
        return self.x.dtype, self.x.device, shifted, *self[4:]


class QuantizerOptions(StateOptions, total=False):
    """The options that all quantizers have; see :class:`Quantizer`."""

    observer: str


class Quantizer(PassesOn, ScaleState, ABC):
    """Fake-quantizes one tensor of a layer; the base of :class:`hqod_ops.quant.LSQ` and the others.

    The result lies on a grid: ``y = (k - z) * s`` with a whole k in :meth:`codes`, s
    :meth:`effective_scale` and z :meth:`effective_zero_point`.

    **State.** What is learned or found in calibration, such as ``scale``, is one value: Tensor[1],
    Tensor[C] with a channel axis, and with L > 1 levels Tensor[L] or Tensor[L, C]; a parameter if
    it is trained, else a buffer. The buffer ``code_range`` says whether the quantizer is
    calibrated, which sign was found and how many bits the state is for. Loading a state_dict takes
    over the number of levels, in the same parameter objects, so an optimizer made earlier stays
    valid.

    **Levels.** A layer that is called several times in one forward pass of the prepared model, such
    as a head shared by the levels of an FPN, has one scale per call, in the order of calls. The
    calls are counted from the start of the prepared model's forward pass
    (:func:`hqod_ops.quant.reset_levels` starts the count by hand). A pass that leaves levels out
    must leave out the last ones, as which level an input belongs to is known by its place alone.
    When activation checkpointing repeats a call during the backward pass, its level is that of the
    call whose input had the same shape.

    Args:
        bits (int): 2 to 8.
        signed (bool, optional): sign of the codes. Default: None, found in calibration: unsigned if
            no negative value was seen
        ch_axis (int, optional): axis with a scale of its own for every index. Default: None, one
            scale for all
        channels (int): size of that axis. Default: 1
        observer (str): a name of :data:`hqod_ops.quant.OBSERVERS`. Default: ``"ema_mse"``
        device, dtype: of the state.

    Raises:
        ValueError: bits is outside 2..8, the observer is unknown or finds no zero point where one
            is wanted, or a channel axis where the quantizer has one scale for all.
        TypeError: bits is not an int.
    """

    roles: ClassVar[frozenset[str]] = frozenset({"weight", "input"})
    """What it is for: ``"weight"``, ``"input"``, or both."""
    per_channel: ClassVar[bool] = True
    """Whether it may have a channel axis."""
    symmetric: bool = True
    """Whether the zero point is always 0."""
    grad_scale: float | str | None = None
    """Factor of the gradients of scale and zero point, see :func:`hqod_ops.fake_quant`."""
    plain: ClassVar[bool] = True
    """Whether values and gradients are those of
    ``fake_quant(transform(x, level), **arguments(level))``, cast to the dtype of x."""

    activation: str | None = None
    """What is applied to the input first, in the same op: ``"relu"`` or ``"relu6"``. Only where the
    quantizer :attr:`absorbs`."""

    def __init__(
        self, bits: int, *, observer: str = "ema_mse", **options: Unpack[StateOptions]
    ) -> None:
        check_observer(observer, self.symmetric)
        if options.get("ch_axis") is not None and not self.per_channel:
            raise ValueError(
                f"ch_axis: {type(self).__name__} has one scale for the whole tensor, "
                f"got {options['ch_axis']}"
            )
        super().__init__(check_bits("bits", bits), **options)
        self.observer = observer
        self.enabled = True
        self._observers: list[Observer] | None = None

    @property
    def absorbs(self) -> bool:
        """Whether it is one call of :func:`hqod_ops.fake_quant` on its input, which can take in an
        :attr:`activation`."""
        return self.plain and type(self).transform is Quantizer.transform

    def onnx_problem(self, level: int = 0) -> str | None:
        """Why ONNX's QuantizeLinear cannot express what a level does to inputs; None if it can."""
        return None

    def foreach_form(self, x: Tensor) -> ForeachForm | None:
        """What quantizes x together with other tensors, in one call; None if x must be alone.

        Args:
            x (Tensor[*]): of the only level.

        Raises:
            RuntimeError: the quantizer was never calibrated.
        """
        if not self.plain:
            return None
        arguments = self.arguments()
        return ForeachForm(
            self.transform(x),
            arguments["scale"],
            arguments.get("zero_point"),
            (arguments["quant_min"], arguments["quant_max"]),
            arguments["ch_axis"],
            arguments.get("grad_scale"),
        )

    @abstractmethod
    def effective_scale(self, level: int = 0) -> Tensor:
        """The positive scale (Tensor[1] or Tensor[C]) that a level quantizes with."""

    def _used_scale(self, level: int) -> Tensor:
        """:meth:`effective_scale` for a forward pass, which may first correct the state."""
        return self.effective_scale(level)

    def effective_zero_point(self, level: int = 0) -> Tensor | None:
        """The whole zero point, in the shape of the scale; None if symmetric."""
        return None

    @abstractmethod
    def _encode(self, scale: Tensor, zero_point: Tensor | None, codes: Sequence[Codes]) -> Values:
        """The values that give a scale and a zero point."""

    def arguments(self, level: int = 0) -> dict[str, Any]:
        """The arguments of :func:`hqod_ops.fake_quant` for a level, with the graph to its values.

        Args:
            level (int): default: 0

        Returns:
            dict: scale, quant_min, quant_max, ch_axis, grad_scale; zero_point and activation where
            the quantizer has them.

        Raises:
            RuntimeError: the quantizer was never calibrated.
        """
        quant_min, quant_max = self.codes(level)
        arguments = {
            "scale": self._used_scale(level),
            "quant_min": quant_min,
            "quant_max": quant_max,
            "ch_axis": self.ch_axis,
            "grad_scale": self.grad_scale,
        }
        if self.activation is not None:
            arguments["activation"] = self.activation
        return arguments

    def transform(self, x: Tensor, level: int = 0) -> Tensor:
        """What is done to x before it is rounded; in float32 if x has half precision."""
        return x

    def activate(self, x: Tensor) -> Tensor:
        """The activation's result; x itself if there is none."""
        return x if self.activation is None else ACTIVATIONS[self.activation](x)

    def forward(self, x: Tensor) -> Tensor:
        """x on the quantizer's grid; while calibrating, and with ``enabled = False``, x itself or,
        with an activation, the result of that.

        Raises:
            RuntimeError: the quantizer was never calibrated, or it was called more often in one
                forward pass than in calibration.
        """
        if self._observers is not None or not self.enabled or self.left_out:
            x = self.activate(x)
            if self._observers is not None:
                self._observe(x, self._observers)
            return x
        level = 0
        if len(self._codes) > 1:
            level = self._calls.next_level(x.shape, len(self._codes), self.label)
        return self._quantize(x, level)

    def _quantize(self, x: Tensor, level: int) -> Tensor:
        y = fake_quant(self.transform(x, level), **self.arguments(level))
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def set_scale(
        self, scale: Tensor, signed: bool | Sequence[bool], zero_point: Tensor | None = None
    ) -> None:
        """Set scale and sign, and with them the number of levels.

        Args:
            scale (Tensor[L] or Tensor[L, C]): positive scales, one a level; Tensor[1] or Tensor[C]
                for one level.
            signed (bool or sequence of L bool): sign of the codes.
            zero_point (Tensor, optional): whole zero points within the codes, in the shape of
                scale. Default: None, 0

        Raises:
            ValueError: numbers of scales and signs differ, a scale is not positive, a shape is
                wrong, or a zero point is given to a symmetric quantizer or is not a code.
            TypeError: scale is not a Tensor.
        """
        if not isinstance(scale, Tensor):
            raise TypeError(f"{self.label}: scale: expected a Tensor, got {scale!r}")
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise ValueError(
                f"{self.label}: expected positive, finite scales, got {scale.tolist()}"
            )
        signs = [signed] if isinstance(signed, bool) else list(signed)
        if len(signs) > 1 and len(scale) != len(signs):
            raise ValueError(
                f"{self.label}: expected one scale a level, got {len(scale)} scales "
                f"for {len(signs)} levels"
            )
        if tuple(scale.shape) != self._shape(len(signs)):
            raise ValueError(
                f"{self.label}: expected scales of shape {self._shape(len(signs))}, "
                f"got {tuple(scale.shape)}"
            )
        codes = [code_range(self.bits, sign) for sign in signs]
        self._check_zero_point(zero_point, scale, codes)
        like: Tensor = getattr(self, self.values[0])
        values = self._encode(
            scale.detach().to(like),
            None if zero_point is None else zero_point.detach().to(like),
            codes,
        )
        self._set_values(values, codes)

    def _check_zero_point(
        self, zero_point: Tensor | None, scale: Tensor, codes: Sequence[Codes]
    ) -> None:
        if zero_point is None:
            return
        if self.symmetric:
            raise ValueError(f"{self.label}: zero_point: expected None, the quantizer is symmetric")
        if zero_point.shape != scale.shape:
            raise ValueError(
                f"{self.label}: zero_point: expected the shape of scale, {tuple(scale.shape)}, "
                f"got {tuple(zero_point.shape)}"
            )
        rows = zero_point.reshape(len(codes), -1)
        for row, (low, high) in zip(rows, codes, strict=True):
            if not bool(((row == row.round()) & (row >= low) & (row <= high)).all()):
                raise ValueError(
                    f"{self.label}: zero_point: expected whole numbers in [{low}, {high}], "
                    f"got {row.tolist()}"
                )

    def start_observing(self) -> None:
        """From now on, forward collects statistics and returns its input."""
        self._observers = []
        self._calls.clear()

    @property
    def has_seen(self) -> bool:
        """Whether data has come since :meth:`start_observing`."""
        return any(observer.count for observer in self._observers or ())

    def observed_scale(self) -> Observed | None:
        """Scale, signs and zero point that the statistics ask for, as :meth:`set_scale` takes them.

        Where the data was all 0 it says nothing about the scale: such a channel gets the scale of
        the widest channel, and a tensor without any other value that of the range [-1, 1], with a
        warning.

        Returns:
            Observed, or None if a level had no data.
        """
        observers = self._observers or []
        if not observers or not all(observer.count for observer in observers):
            return None
        scale = self._join([self._nonzero(observer) for observer in observers])
        zeros = [zero for o in observers if (zero := o.zero_point()) is not None]
        return Observed(
            scale, [observer.signed for observer in observers], self._join(zeros) if zeros else None
        )

    def _join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors of single levels as one."""
        joined = torch.stack(list(tensors))
        if self.ch_axis is None:
            return joined.flatten()
        return joined[0] if len(tensors) == 1 else joined

    def observed_state(self) -> list[dict[str, Any]]:
        """What was seen in calibration, one entry a level; to be sent to other processes."""
        return [observer.state() for observer in self._observers or []]

    def merge_observed(self, states: Sequence[Sequence[dict[str, Any]]]) -> None:
        """Take over what several processes saw, this one among them.

        Args:
            states (sequence of list): of :meth:`observed_state`, in the same order everywhere.
        """
        if self._observers is None:
            return
        for level in range(max(map(len, states))):
            if level == len(self._observers):
                self._observers.append(self._new_observer())
            self._observers[level].merge([rank[level] for rank in states if level < len(rank)])

    def stop_observing(self) -> None:
        """Forward quantizes again; the statistics are forgotten."""
        self._observers = None
        self._calls.clear()

    def extra_repr(self) -> str:
        codes = ", ".join(f"[{low}, {high}]" for low, high in dict.fromkeys(self._codes))
        return (
            f"bits={self.bits}, codes={codes or 'not calibrated'}, levels={self.levels}, "
            f"ch_axis={self.ch_axis}"
        )

    def _nonzero(self, observer: Observer) -> Tensor:
        scale = observer.scale()
        if bool((scale > 0).all()):
            return scale
        widest = scale.max()
        if not bool(widest > 0):
            warnings.warn(
                f"{self.label}: all values seen in calibration were 0; "
                "its scale is that of the range [-1, 1]",
                stacklevel=2,
            )
            low, high = code_range(self.bits, True)
            widest = torch.full_like(widest, 2 / (high - low))
        return torch.where(scale > 0, scale, widest)

    def _to_observe(self, x: Tensor) -> Tensor:
        """What calibration looks at."""
        return x

    def _new_observer(self) -> Observer:
        return OBSERVERS[self.observer](
            self.bits, signed=self.signed, ch_axis=self.ch_axis, symmetric=self.symmetric
        )

    def _observe(self, x: Tensor, observers: list[Observer]) -> None:
        level = self._calls.add(x.shape)
        if level == len(observers):
            observers.append(self._new_observer())
        try:
            observers[level].observe(self._to_observe(x))
        except ValueError as error:
            raise ValueError(f"{self.label}: {error}") from None
