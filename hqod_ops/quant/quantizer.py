"""The base of all quantizers: state, calibration, and one scale per level in shared layers."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hqod_ops.quant.observers import OBSERVERS, Observer, check_bits, code_range

UNCALIBRATED = (0, 0)


class Quantizer(nn.Module, ABC):
    """Fake-quantizes one tensor of a layer; the base of :class:`hqod_ops.quant.LSQ`.

    **State.** ``scale`` (parameter) is Tensor[1], Tensor[C] with a channel axis, and with L > 1
    levels Tensor[L] or Tensor[L, C]. ``code_range`` (buffer, int32 [L, 2]) holds the smallest and
    largest code of each level; it says in the state_dict that the quantizer is calibrated (else it
    is 0), which sign was found and how many bits the scale is for. It has a mirror in Python, so
    that a forward pass never reads a value from a device. Loading a state_dict takes over the
    number of levels, in the same parameter object, so an optimizer made earlier stays valid.

    **Levels.** A layer that is called several times in one forward pass of the prepared model, such
    as a head shared by the levels of an FPN, has one scale per call, in the order of calls. The
    calls are counted from the start of the prepared model's forward pass (:func:`reset_levels`
    starts the count by hand). When activation checkpointing repeats a call during the backward
    pass, its level is that of the call whose input had the same shape.

    Args:
        bits (int): 2 to 8.
        signed (bool, optional): sign of the codes. Default: None, found in calibration: unsigned if
            no negative value was seen
        ch_axis (int, optional): axis with a scale of its own for every index. Default: None, one
            scale for all
        channels (int): size of that axis. Default: 1
        observer (str): ``"minmax"``, ``"lsq"`` or ``"ema_mse"``. Default: ``"ema_mse"``
        device, dtype: of the scale.

    Raises:
        ValueError: bits is outside 2..8, or the observer is unknown.
    """

    scale: nn.Parameter
    code_range: Tensor

    def __init__(
        self,
        bits: int,
        *,
        signed: bool | None = None,
        ch_axis: int | None = None,
        channels: int = 1,
        observer: str = "ema_mse",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if observer not in OBSERVERS:
            raise ValueError(f"observer: expected one of {', '.join(OBSERVERS)}, got {observer!r}")
        self.bits = check_bits("bits", bits)
        self.signed = signed
        self.ch_axis = ch_axis
        self.observer = observer
        self.enabled = True
        self.label = type(self).__name__
        self.scale = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))
        self.register_buffer("code_range", torch.zeros(1, 2, device=device, dtype=torch.int32))
        self._ranges: tuple[tuple[int, int], ...] = ()
        self._observers: list[Observer] | None = None
        self._calls = _Calls()

    @abstractmethod
    def effective_scale(self, level: int = 0) -> Tensor:
        """The positive scale (Tensor[1] or Tensor[C]) that a level quantizes with."""

    @abstractmethod
    def _quantize(self, x: Tensor, level: int) -> Tensor: ...

    @abstractmethod
    def _encode(self, scale: Tensor) -> Tensor:
        """The value of the parameter that gives a scale."""

    @property
    def calibrated(self) -> bool:
        """Whether the scale was set or loaded."""
        return bool(self._ranges)

    @property
    def levels(self) -> int:
        """Number of scales (channels aside)."""
        return max(len(self._ranges), 1)

    def codes(self, level: int = 0) -> tuple[int, int]:
        """The smallest and the largest code of a level.

        Raises:
            RuntimeError: the quantizer was never calibrated.
        """
        if not self._ranges:
            raise RuntimeError(
                f"{self.label}: the quantizer was never calibrated; run "
                "hqod_ops.quant.calibrate(model, batches) or load a calibrated state_dict"
            )
        return self._ranges[level]

    def forward(self, x: Tensor) -> Tensor:
        """x on the quantizer's grid; x itself while calibrating or with ``enabled = False``.

        Raises:
            RuntimeError: the quantizer was never calibrated, or it was called more often in one
                forward pass than in calibration.
        """
        if self._observers is not None:
            self._observe(x, self._observers)
            return x
        if not self.enabled:
            return x
        level = self._next_level(x) if len(self._ranges) > 1 else 0
        return self._quantize(x, level)

    def set_scale(self, scale: Tensor, signed: bool | Sequence[bool]) -> None:
        """Set scale and sign, and with them the number of levels.

        Args:
            scale (Tensor[L] or Tensor[L, C]): positive scales, one a level; Tensor[1] or Tensor[C]
                for one level.
            signed (bool or sequence of L bool): sign of the codes.

        Raises:
            ValueError: numbers of scales and signs differ, or a scale is not positive.
        """
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
        ranges = tuple(code_range(self.bits, sign) for sign in signs)
        self._resize(scale.shape, len(ranges))
        with torch.no_grad():
            self.scale.copy_(self._encode(scale.to(self.scale)))
            self.code_range.copy_(torch.tensor(ranges, dtype=torch.int32))
        self._ranges = ranges

    def start_observing(self) -> None:
        """From now on, forward collects statistics and returns its input."""
        self._observers = []
        self._calls.clear()

    def observed_scale(self) -> tuple[Tensor, list[bool]] | None:
        """Scale and signs, as :meth:`set_scale` takes them, that the statistics ask for.

        Where the data was all 0 it says nothing about the scale: such a channel gets the scale of
        the widest channel, and a tensor without any other value that of the range [-1, 1], with a
        warning.

        Returns:
            (Tensor, list of bool), or None if a level had no data.
        """
        observers = self._observers or []
        if not observers or not all(observer.count for observer in observers):
            return None
        scale = torch.stack([self._nonzero(observer) for observer in observers])
        if self.ch_axis is None:
            scale = scale.flatten()
        elif len(observers) == 1:
            scale = scale[0]
        return scale, [observer.signed for observer in observers]

    def stop_observing(self) -> None:
        """Forward quantizes again; the statistics are forgotten."""
        self._observers = None
        self._calls.clear()

    def reset_level(self) -> None:
        """The next call is that of the first level."""
        self._calls.clear()

    def extra_repr(self) -> str:
        codes = ", ".join(f"[{low}, {high}]" for low, high in dict.fromkeys(self._ranges))
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

    def _observe(self, x: Tensor, observers: list[Observer]) -> None:
        level = self._calls.add(x.shape)
        if level == len(observers):
            observers.append(
                OBSERVERS[self.observer](self.bits, signed=self.signed, ch_axis=self.ch_axis)
            )
        try:
            observers[level].observe(x)
        except ValueError as error:
            raise ValueError(f"{self.label}: {error}") from None

    def _next_level(self, x: Tensor) -> int:
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return self._repeated_level(x)
        level = self._calls.add(x.shape)
        if level >= len(self._ranges):
            raise RuntimeError(
                f"{self.label}: called more than {len(self._ranges)} times in one forward pass, "
                "the number of its levels in calibration; call the prepared model as a whole, or "
                "hqod_ops.quant.reset_levels(model) before calling a part of it"
            )
        return level

    def _repeated_level(self, x: Tensor) -> int:
        """The level of a call that activation checkpointing repeats in the backward pass."""
        same = self._calls.find(x.shape)
        if len(same) != 1:
            raise RuntimeError(
                f"{self.label}: cannot tell which level activation checkpointing repeats: "
                f"{len(same)} calls of the forward pass had an input of shape {tuple(x.shape)}"
            )
        return same[0]

    def _resize(self, shape: Iterable[int], levels: int) -> None:
        if self.scale.shape != tuple(shape):
            # The parameter object stays, and with it optimizers and references made earlier.
            self.scale.data = self.scale.new_ones(tuple(shape))
            self.scale.grad = None
        if len(self.code_range) != levels:
            self.code_range = self.code_range.new_zeros(levels, 2)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        scale, codes = state_dict.get(prefix + "scale"), state_dict.get(prefix + "code_range")
        ranges: tuple[tuple[int, int], ...] | None = None
        if scale is not None and codes is not None:
            ranges = tuple((int(low), int(high)) for low, high in codes.tolist())
            problem = self._misfit(scale, ranges)
            if problem:
                error_msgs.append(f"{prefix[:-1]}: {problem}")
                return
            self._resize(scale.shape, len(ranges))
        elif scale is not None or codes is not None:
            error_msgs.append(f"{prefix[:-1]}: expected both of the keys scale and code_range")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if ranges is not None:
            self._ranges = () if UNCALIBRATED in ranges else ranges

    def _misfit(self, scale: Tensor, ranges: tuple[tuple[int, int], ...]) -> str | None:
        """Why a state does not fit this quantizer."""
        allowed = [
            code_range(self.bits, sign) for sign in (False, True) if self.signed in (None, sign)
        ]
        for codes in ranges:
            if codes not in (*allowed, UNCALIBRATED):
                expected = " or ".join(f"[{low}, {high}]" for low, high in allowed)
                return (
                    f"code_range: expected {expected} ({self.bits} bits), got {list(codes)}; "
                    "was the checkpoint made with another configuration?"
                )
        channels = () if self.ch_axis is None else tuple(self.scale.shape[-1:])
        levels = len(ranges)
        expected_shape = (levels, *channels) if levels > 1 or not channels else channels
        if tuple(scale.shape) != expected_shape:
            return f"scale: expected shape {expected_shape}, got {tuple(scale.shape)}"
        return None


class _Calls:
    """The input shapes of a quantizer's calls since the model's forward pass began."""

    def __init__(self) -> None:
        self._shapes: list[torch.Size] = []

    def add(self, shape: torch.Size) -> int:
        """The index of this call."""
        self._shapes.append(shape)
        return len(self._shapes) - 1

    def find(self, shape: torch.Size) -> list[int]:
        return [index for index, seen in enumerate(self._shapes) if seen == shape]

    def clear(self) -> None:
        self._shapes.clear()


def reset_levels(model: nn.Module) -> None:
    """Start a new forward pass: the next call of every shared layer is that of its first level.

    A prepared model does this by itself whenever it is called as a whole. It is needed only before
    calling parts of it.

    Args:
        model (nn.Module): a model from :func:`hqod_ops.quant.prepare_qat`, or a part of one.
    """
    for module in model.modules():
        if isinstance(module, Quantizer):
            module.reset_level()
