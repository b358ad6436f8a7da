"""What the observers have in common: codes, ranges, and statistics exchanged over processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from hqod_ops.checks import integer
from hqod_ops.quant.signatures import PassesOn

MIN_BITS, MAX_BITS = 2, 8


def check_bits(name: str, bits: int) -> int:
    """A number of bits that the quantizers support.

    Raises:
        ValueError: bits is outside 2..8.
        TypeError: bits is not an int.
    """
    bits = integer(name, bits)
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"{name}: expected a value in [{MIN_BITS}, {MAX_BITS}], got {bits}")
    return bits


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """The smallest and the largest code: [-2^(b-1), 2^(b-1) - 1] if signed, else [0, 2^b - 1].

    Example:
        >>> code_range(2, signed=True), code_range(4, signed=False)
        ((-2, 1), (0, 15))
    """
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def scale_for_range(low: Tensor, high: Tensor, bits: int, signed: bool) -> Tensor:
    """Scale at which symmetric codes span a range of values.

    Signed: ``max(|low|, high) / ((qmax - qmin) / 2)``, that is /1.5 at 2 bits and /7.5 at 4, so
    that the greatest value is clipped by half a step if it is positive; unsigned: ``high / qmax``.

    Args:
        low (Tensor[C]), high (Tensor[C]): the range; 0 is taken into it.
        bits (int): 2 to 8.
        signed (bool): whether codes are signed.

    Returns:
        Tensor[C]: the scale, 0 for the range [0, 0].
    """
    quant_min, quant_max = code_range(bits, signed)
    if not signed:
        return high.clamp(min=0) / quant_max
    return torch.maximum(low.abs(), high.abs()) / ((quant_max - quant_min) / 2)


def affine_for_range(low: Tensor, high: Tensor, bits: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point at which all codes together span a range of values.

    ``s = (high - low) / (qmax - qmin)`` and ``z = round(qmin - low / s)``, a code itself, so that 0
    is on the grid.

    Args:
        low (Tensor[C]), high (Tensor[C]): the range; 0 is taken into it.
        bits (int): 2 to 8.
        signed (bool): whether codes are signed.

    Returns:
        (Tensor[C], Tensor[C]): scale and whole zero point, both 0 for the range [0, 0].

    Example:
        >>> affine_for_range(torch.tensor([-1.0]), torch.tensor([2.0]), 2, signed=False)
        (tensor([1.]), tensor([1.]))
    """
    quant_min, quant_max = code_range(bits, signed)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / (quant_max - quant_min)
    zero = (quant_min - low / scale).round().clamp(quant_min, quant_max)
    return scale, torch.where(scale > 0, zero, 0.0)


class ObserverOptions(TypedDict, total=False):
    """The options that all observers have; see :class:`Observer`."""

    signed: bool | None
    ch_axis: int | None
    symmetric: bool


class Observer(PassesOn, ABC):
    """Is fed tensors, and says with which scale (and zero point) to start.

    Statistics are kept on the CPU; reading them there waits for the device, so an observer is for
    calibration, not for a training step.

    Args:
        bits (int): 2 to 8.
        signed (bool, optional): sign of the codes. Default: None, found from the data: unsigned if
            no negative value was seen.
        ch_axis (int, optional): axis with a scale of its own for every index. Default: None
        symmetric (bool): zero point 0; else the codes span the range from its least value to its
            greatest. Default: True

    Raises:
        ValueError: bits is outside 2..8, or the observer knows symmetric codes alone.
    """

    asymmetric: ClassVar[bool] = True
    """Whether it can also find a zero point."""
    _statistics: ClassVar[tuple[str, ...]] = ()
    """Names of the attributes that hold what was seen."""

    def __init__(
        self,
        bits: int,
        *,
        signed: bool | None = None,
        ch_axis: int | None = None,
        symmetric: bool = True,
    ) -> None:
        if not symmetric and not self.asymmetric:
            raise ValueError(f"symmetric: {type(self).__name__} finds no zero point, got False")
        self.bits = check_bits("bits", bits)
        self.ch_axis = ch_axis
        self.symmetric = symmetric
        self.count = 0
        self._fixed_sign = signed
        self._negative = False

    @property
    def signed(self) -> bool:
        """The sign given, or the one that the data seen so far asks for."""
        return self._negative if self._fixed_sign is None else self._fixed_sign

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take data into the statistics; an empty tensor says nothing.

        Raises:
            ValueError: x holds NaN or an infinity.
        """
        if x.numel() == 0:
            return
        rows = x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        if self.ch_axis is None:
            rows = rows.reshape(1, -1)
        else:
            rows = rows.movedim(self.ch_axis, 0).flatten(1)
        low, high = rows.amin(dim=1).cpu(), rows.amax(dim=1).cpu()
        if not bool(torch.isfinite(low + high).all()):
            raise ValueError("x: expected finite values, got NaN or an infinity")
        self._negative = self._negative or bool((low < 0).any())
        self._update(rows, low, high)
        self.count += 1

    def scale(self) -> Tensor:
        """The scale (Tensor[1] or Tensor[C]) that the data seen so far asks for; 0 if it was all 0.

        Raises:
            RuntimeError: no data was seen.
        """
        self._check_data()
        return self._scale()

    def zero_point(self) -> Tensor | None:
        """The whole zero point (Tensor[1] or Tensor[C]) that goes with the scale.

        Returns:
            Tensor, or None for symmetric codes.

        Raises:
            RuntimeError: no data was seen.
        """
        self._check_data()
        return None if self.symmetric else self._zero_point()

    def state(self) -> dict[str, Any]:
        """What was seen, as :meth:`merge` takes it: plain values and tensors on the CPU."""
        state: dict[str, Any] = {"count": self.count, "negative": self._negative}
        if self.count:
            state |= {name: getattr(self, name) for name in self._statistics}
        return state

    def merge(self, states: Sequence[dict[str, Any]]) -> None:
        """Forget what was seen here, and take over what observers of this kind saw together.

        Averages over batches become those over all observers, each weighted by its number of
        batches.

        Args:
            states (sequence of dict): of :meth:`state`, this observer's own among them. One without
                data says nothing.
        """
        seen = [state for state in states if state["count"]]
        if seen:
            self.count = sum(state["count"] for state in seen)
            self._negative = any(state["negative"] for state in seen)
            self._merge(seen)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Exchange statistics, so that every process has those of all, to the bit.

        A collective call, for after the last batch; without ``torch.distributed`` it does nothing.
        A process that saw no data takes part, and leaves with the others' statistics.

        Args:
            group (ProcessGroup, optional): default: None, all processes
        """
        self.merge(gather(self.state(), group))

    def _check_data(self) -> None:
        if self.count == 0:
            raise RuntimeError(f"{type(self).__name__}: no data was observed")

    @abstractmethod
    def _update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        """Take data [C, M] with its range a row [C] into the statistics."""

    @abstractmethod
    def _merge(self, states: Sequence[dict[str, Any]]) -> None:
        """Replace the statistics by those of several observers."""

    @abstractmethod
    def _scale(self) -> Tensor: ...

    def _zero_point(self) -> Tensor:
        raise NotImplementedError


class RangeObserver(Observer):
    """An observer that finds a range, from which scale and zero point follow."""

    @abstractmethod
    def _range(self) -> tuple[Tensor, Tensor]:
        """Lower and upper end (Tensor[C]) for the codes' sign."""

    def _scale(self) -> Tensor:
        if self.symmetric:
            return scale_for_range(*self._range(), self.bits, self.signed)
        return affine_for_range(*self._range(), self.bits, self.signed)[0]

    def _zero_point(self) -> Tensor:
        return affine_for_range(*self._range(), self.bits, self.signed)[1]


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The value of every process, in the order of ranks; of this one alone if there is no other.

    Args:
        value: anything that pickles; tensors on the CPU.
        group (ProcessGroup, optional): default: None, all processes
    """
    if not dist.is_available() or not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def weighted_mean(states: Sequence[dict[str, Any]], values: Sequence[Tensor]) -> Tensor:
    """Mean of one value a state, weighted by the batches that each has seen."""
    total = sum(state["count"] for state in states)
    # Weights first: for a single state its value stays as it is.
    return sum(
        (value * (state["count"] / total) for state, value in zip(states, values, strict=True)),
        start=torch.zeros_like(values[0]),
    )
