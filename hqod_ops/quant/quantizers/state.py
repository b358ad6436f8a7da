"""The state of a quantizer: values one a level and channel, and the codes' range of each level."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hqod_ops.quant.observers import code_range
from hqod_ops.quant.quantizers.calls import CountsCalls

UNCALIBRATED = (0, 0)
LEFT_OUT = (-1, -1)
"""The codes of a quantizer that passes on what it gets."""
Codes = tuple[int, int]
"""The smallest and the largest code."""
Values = dict[str, Tensor]
"""What is learned or found in calibration, by name."""


class StateOptions(TypedDict, total=False):
    """The options of all quantizers that say what their state is like; see :class:`Quantizer`."""

    signed: bool | None
    ch_axis: int | None
    channels: int
    device: torch.device | str | None
    dtype: torch.dtype | None


class ScaleState(CountsCalls):
    """What a quantizer keeps in its state_dict; the base of all quantizers.

    Each of ``values`` is a Tensor[1], Tensor[C] with a channel axis, and with L > 1 levels
    Tensor[L] or Tensor[L, C]: a parameter if it is trained, else a buffer. ``code_range`` (buffer,
    float [L, 2]) holds the codes' range of each level; it says that the quantizer is calibrated
    (else it is 0), which sign was found and how many bits the state is for. It is a float, and
    rounded when it is loaded, so that averages of models keep it: those of integers are cut off. It
    has a mirror in Python, so that a forward pass never reads a value from a device. Loading a
    state_dict takes over the number of levels, in the same parameter objects.

    Args:
        bits (int), signed (bool, optional), ch_axis (int, optional), channels (int), device, dtype:
            see :class:`hqod_ops.quant.Quantizer`.
    """

    values: ClassVar[tuple[str, ...]] = ("scale",)
    """Names of the values."""
    trained: ClassVar[bool] = True
    """Whether the values are parameters; else they are buffers."""
    code_range: Tensor
    left_out: bool = False
    """Whether it passes on what it gets, see :meth:`leave_out`."""

    def __init__(
        self,
        bits: int,
        *,
        signed: bool | None = None,
        ch_axis: int | None = None,
        channels: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.bits, self.signed, self.ch_axis = bits, signed, ch_axis
        self.label = type(self).__name__
        self.register_buffer("code_range", torch.zeros(1, 2, device=device))
        self._codes: tuple[Codes, ...] = ()
        self.left_out = False
        for name in self.values:
            value = torch.ones(1 if ch_axis is None else channels, device=device, dtype=dtype)
            if self.trained:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    @property
    def calibrated(self) -> bool:
        """Whether the scale was set or loaded."""
        return bool(self._codes)

    def leave_out(self) -> None:
        """From now on pass on what comes, also where the state is loaded, until a scale is set.

        For a layer that calibration does not reach; its values are not trained.
        """
        self._codes, self.left_out = (), True
        self._resize(self._shape(1), 1)
        self.code_range.copy_(torch.tensor([LEFT_OUT]))
        for parameter in self.parameters(recurse=False):
            parameter.requires_grad_(False)

    def _take_in(self) -> None:
        """Undo :meth:`leave_out`."""
        if self.left_out:
            self.left_out = False
            for parameter in self.parameters(recurse=False):
                parameter.requires_grad_(True)

    @property
    def levels(self) -> int:
        """Number of scales (channels aside)."""
        return max(len(self._codes), 1)

    def codes(self, level: int = 0) -> Codes:
        """The smallest and the largest code of a level.

        Raises:
            RuntimeError: the quantizer was never calibrated.
        """
        if not self._codes:
            raise RuntimeError(
                f"{self.label}: the quantizer was never calibrated; run "
                "hqod_ops.quant.calibrate(model, batches) or load a calibrated state_dict"
            )
        return self._codes[level]

    def _value(self, name: str, level: int) -> Tensor:
        """A value of one level: Tensor[1] or Tensor[C]."""
        value: Tensor = getattr(self, name)
        if len(self._codes) <= 1:
            return value
        return value[level] if value.dim() > 1 else value[level : level + 1]

    def _along(self, x: Tensor, value: Tensor) -> Tensor:
        """A value of one level, in the shape that broadcasts along the channel axis of x."""
        shape = [1] * x.dim()
        if self.ch_axis is not None:
            shape[self.ch_axis] = -1
        return value.view(shape)

    def _set_values(self, values: Values, codes: Sequence[Codes]) -> None:
        """Set all values, one level or several, with the codes of these levels."""
        self._resize(next(iter(values.values())).shape, len(codes))
        with torch.no_grad():
            for name in self.values:
                getattr(self, name).copy_(values[name])
            self.code_range.copy_(torch.tensor(codes))
        self._codes = tuple(codes)
        self._take_in()

    @torch.inference_mode(False)
    def _resize(self, shape: Iterable[int], levels: int) -> None:
        for name in self.values:
            value = getattr(self, name)
            if value.shape != tuple(shape):
                # The parameter object stays, and with it optimizers and references made earlier.
                value.data = value.new_ones(tuple(shape))
                value.grad = None
                if self.trained:
                    _note_resized(value)
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
        names = (*self.values, "code_range")
        found = [name for name in names if prefix + name in state_dict]
        codes: tuple[Codes, ...] | None = None
        if len(found) == len(names):
            table = state_dict[prefix + "code_range"].to(self.code_range.dtype).round()
            state_dict[prefix + "code_range"] = table
            codes = tuple((int(low), int(high)) for low, high in table.tolist())
            problem = self._misfit({n: state_dict[prefix + n] for n in self.values}, codes)
            if problem:
                error_msgs.append(f"{prefix[:-1] or self.label}: {problem}")
                return
            self._resize(state_dict[prefix + names[0]].shape, len(codes))
        elif found:
            error_msgs.append(
                f"{prefix[:-1] or self.label}: expected all of the keys {', '.join(names)}, "
                f"got {', '.join(found)} alone"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if codes is not None and LEFT_OUT in codes:
            self.leave_out()
        elif codes is not None:
            self._codes = () if UNCALIBRATED in codes else codes
            self._take_in()

    def _misfit(self, values: Values, codes: tuple[Codes, ...]) -> str | None:
        """Why a state does not fit this quantizer."""
        allowed = [
            code_range(self.bits, sign) for sign in (False, True) if self.signed in (None, sign)
        ]
        for found in codes:
            if found not in (*allowed, UNCALIBRATED, LEFT_OUT):
                expected = " or ".join(f"[{low}, {high}]" for low, high in allowed)
                return (
                    f"code_range: expected {expected} ({self.bits} bits), got {list(found)}; "
                    "was the checkpoint made with another configuration?"
                )
        expected_shape = self._shape(len(codes))
        for name, value in values.items():
            if tuple(value.shape) != expected_shape:
                return f"{name}: expected shape {expected_shape}, got {tuple(value.shape)}"
        return None

    def _shape(self, levels: int) -> tuple[int, ...]:
        """The shape of a value of so many levels."""
        own: Tensor = getattr(self, self.values[0])
        channels = () if self.ch_axis is None else tuple(own.shape[-1:])
        return (levels, *channels) if levels > 1 or not channels else channels


_resized_hook: Any = None


def _note_resized(parameter: Tensor) -> None:
    """Let optimizers forget what they know of a parameter of another shape, when they step next."""
    global _resized_hook
    parameter._hqod_resized = True  # type: ignore[attr-defined]
    if _resized_hook is None:
        _resized_hook = register_optimizer_step_pre_hook(_forget_resized)


def _forget_resized(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not getattr(parameter, "_hqod_resized", False):
                continue
            values = optimizer.state.get(parameter, {}).values()
            if any(
                isinstance(v, Tensor) and v.dim() and v.shape != parameter.shape for v in values
            ):
                del optimizer.state[parameter]


def per_level(numbers: Sequence[float], like: Tensor) -> Tensor:
    """One number a level, in a shape that goes with a value of all levels."""
    column = torch.tensor(numbers, dtype=like.dtype, device=like.device)
    return column[:, None] if like.dim() > 1 else column
