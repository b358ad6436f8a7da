"""Quantizers where tensors are made: behind a module, or behind a function within a ``forward``.

No class, ``forward`` or name of the model changes. What is attached here is plain attributes and
hooks of module-level functions, so that copies and pickles of the model have their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hqod_ops.quant.dataflow.trace import functions_named
from hqod_ops.quant.nn.layers import QATLayer
from hqod_ops.quant.quantizers.base import Quantizer


def observing(quantizer: Quantizer) -> bool:
    """Whether the quantizer is being calibrated."""
    return quantizer._observers is not None


class Slots:
    """The quantizers behind the calls of one module or function in one call of its owner.

    Args:
        quantizers (sequence of Quantizer or None): one a call; None leaves the result as it is. All
            further calls have that of the only one.
    """

    def __init__(self, quantizers: Sequence[Quantizer | None]) -> None:
        self._quantizers = tuple(quantizers)
        self._next = 0
        self.counts = len(set(self._quantizers)) > 1
        """Whether it matters which call it is."""

    def next(self) -> Quantizer | None:
        """The quantizer behind this call."""
        if not self.counts:
            return self._quantizers[0]
        index = self._next
        self._next = index + 1
        return self._quantizers[index] if index < len(self._quantizers) else None

    def reset(self) -> None:
        """The next call is the first of a call of the owner."""
        self._next = 0


def tag(quantizer: Quantizer, y: Tensor) -> None:
    """Note on a tensor which quantizer it has passed: see :class:`Arrived`."""
    y._hqod_quantizer = quantizer  # type: ignore[attr-defined]


def mark(quantizer: Quantizer, y: Tensor) -> Tensor:
    """y, in calibration with its tag."""
    if observing(quantizer):
        tag(quantizer, y)
    return y


class Arrived:
    """What a layer does with an input that was quantized where it was made: nothing.

    In calibration, as in an export, it makes sure that it was, which is all that a trace leaves
    open.

    Args:
        name (str): of the layer.
        quantizer (Quantizer): of its input.
        places (sequence of str): where it quantizes, for the error.
    """

    def __init__(self, name: str, quantizer: Quantizer, places: Sequence[str]) -> None:
        self._name, self._quantizer, self._places = name, quantizer, tuple(places)

    def __call__(self, x: Tensor) -> Tensor:
        if observing(self._quantizer):
            self.verify(x)
        return x

    def verify(self, x: Tensor) -> None:
        """Check a tensor's tag.

        Raises:
            RuntimeError: it has not passed the quantizer.
        """
        if getattr(x, "_hqod_quantizer", None) is not self._quantizer:
            raise RuntimeError(
                f"{self._name}: expected an input from {' or '.join(self._places)}, as when the "
                "model was traced, but it comes from elsewhere; replace modules before "
                "place_on_producers, or leave the layer out with "
                f"place_on_producers(model, skip={self._name!r})"
            )


class QATReLU(nn.ReLU):
    """A ReLU and the quantizers behind its calls, of which some have taken it in."""

    slots: Slots

    def forward(self, input: Tensor) -> Tensor:
        return _activate(self.slots.next(), "relu", super().forward, input)


class QATReLU6(nn.ReLU6):
    """A ReLU6 and the quantizers behind its calls, of which some have taken it in."""

    slots: Slots

    def forward(self, input: Tensor) -> Tensor:
        return _activate(self.slots.next(), "relu6", super().forward, input)


RELUS: dict[type[nn.Module], type[nn.Module]] = {nn.ReLU: QATReLU, nn.ReLU6: QATReLU6}
"""The twins of the activations that a quantizer can take in."""


def _activate(
    quantizer: Quantizer | None, name: str, activation: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    if quantizer is None:
        return activation(x)
    absorbed = quantizer.activation == name
    return mark(quantizer, quantizer(x if absorbed else activation(x)))


def quantize_module(module: nn.Module, slots: Slots) -> None:
    """Put quantizers behind the calls of a module."""
    twin = RELUS.get(type(module))
    if twin is not None:
        module.__class__ = twin
        module.__dict__["slots"] = slots
    else:
        module.__dict__["_hqod_slots"] = slots
        module.register_forward_hook(_quantize_output)


def _quantize_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Forward hook. It finds the quantizers on the module it is given: the copy's in a copy."""
    quantizer = module.__dict__["_hqod_slots"].next()
    return output if quantizer is None else mark(quantizer, quantizer(output))


def restart(owner: nn.Module, slots: Sequence[Slots]) -> None:
    """Let every call of the owner count its modules' calls anew."""
    owner.__dict__["_hqod_owned"] = tuple(slots)
    owner.register_forward_pre_hook(_restart)


def _restart(owner: nn.Module, args: Any) -> None:
    for slots in owner.__dict__["_hqod_owned"]:
        slots.reset()


def quantize_functions(
    owner: nn.Module, slots: dict[str, Slots], children: Sequence[nn.Module]
) -> None:
    """Put quantizers behind the calls of functions in a module's own ``forward``.

    Args:
        owner (nn.Module): the module.
        slots (dict of str to Slots): by the function's name, as
            :func:`hqod_ops.quant.dataflow.trace.function_name` has it.
        children (sequence of nn.Module): the modules that its ``forward`` calls, within which
            functions do not count.
    """
    watch = _Watch(owner, slots)
    owner.forward = watch
    for child in children:
        _pause_within(child, watch)


def _pause_within(child: nn.Module, watch: _Watch) -> None:
    # Outermost, so that what other hooks of the child do does not count either.
    if "_hqod_watches" not in child.__dict__:
        child.__dict__["_hqod_watches"] = []
        child.register_forward_pre_hook(_pause, prepend=True)
        child.register_forward_hook(_resume)
    child.__dict__["_hqod_watches"].append(watch)


def _pause(child: nn.Module, args: Any) -> None:
    for watch in child.__dict__["_hqod_watches"]:
        watch.paused += 1


def _resume(child: nn.Module, args: Any, output: Any) -> None:
    for watch in child.__dict__["_hqod_watches"]:
        watch.paused -= 1


class _Watch:
    """``forward`` of a module with quantizers behind some of the functions that it calls itself.

    Args:
        owner (nn.Module): the module.
        slots (dict of str to Slots): by the function's name.
    """

    _owner: nn.Module
    _slots: dict[str, Slots]
    _forward: Callable[..., Any] | None
    paused: int
    """Within how many of the children the program is."""

    def __init__(self, owner: nn.Module, slots: dict[str, Slots]) -> None:
        state = {"_owner": owner, "_slots": slots, "_forward": owner.__dict__.get("forward")}
        self.__setstate__({**state, "paused": 0})

    def __getstate__(self) -> dict[str, Any]:
        # Without the functions: not all of them can be pickled.
        return {key: value for key, value in self.__dict__.items() if key != "functions"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.functions = {
            function: (name, slots)
            for name, slots in self._slots.items()
            for function in functions_named(name)
        }

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.paused = 0
        for slots in self._slots.values():
            slots.reset()
        with _Functions(self):
            if self._forward is not None:
                return self._forward(*args, **kwargs)
            return type(self._owner).forward(self._owner, *args, **kwargs)

    # What torch.export asks of a forward.

    @property
    def __code__(self) -> CodeType:
        code: CodeType = type(self._owner).forward.__code__
        return code

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self._owner).forward.__get__(self._owner))


class _Functions(TorchFunctionMode):
    """Sees the functions called while a module runs."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        found = None if self._watch.paused else self._watch.functions.get(func)
        quantizer = None if found is None else found[1].next()
        if found is None or quantizer is None:
            return func(*args, **kwargs)
        if quantizer.activation == found[0]:
            return mark(quantizer, quantizer(args[0] if args else kwargs["input"]))
        return mark(quantizer, quantizer(func(*args, **kwargs)))


_ATTACHED = ("slots", "_hqod_slots", "_hqod_owned", "_hqod_watches", "forward")


class Attached:
    """The modules of a model that something was attached to, and whether they are still there.

    A module that is replaced takes it along: without a check, the layers behind would read floats
    from then on, and nothing would say so.

    Args:
        model (nn.Module): the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = {
            name: module
            for name, module in model.named_modules()
            if not module.__dict__.keys().isdisjoint(_ATTACHED)
        }
        self._links: list[tuple[dict[str, nn.Module | None], str, nn.Module]] = []

    def __getstate__(self) -> dict[str, Any]:
        # Without the links, which a copy finds again.
        return {"_modules": self._modules, "_links": []}

    def verify(self, model: nn.Module) -> None:
        """Check the model, where anything was replaced since the last time.

        A batch normalisation that was converted to a synchronized one gets what its predecessor
        had. Modules within a wrapper, as of ``torch.compile``, are still there.

        Raises:
            RuntimeError: another module was replaced.
        """
        if self._links and all(children.get(key) is m for children, key, m in self._links):
            return
        there = set(model.modules())
        for name, module in self._modules.items():
            found = _submodule(model, name)
            if module in there or found is None:
                continue
            if not isinstance(found, nn.SyncBatchNorm) or "_hqod_owned" in module.__dict__:
                raise RuntimeError(
                    f"{name}: expected the {type(module).__name__} that place_on_producers saw, "
                    f"got another module, {type(found).__name__}, without its quantizers; replace "
                    "modules before place_on_producers"
                )
            if "_hqod_slots" in module.__dict__:
                quantize_module(found, module.__dict__["_hqod_slots"])
            for watch in module.__dict__.get("_hqod_watches", ()):
                _pause_within(found, watch)
            self._modules[name] = found
        self._links = [
            (module._modules, key, child)
            for module in there
            if not isinstance(module, QATLayer)
            for key, child in module._modules.items()
            if child is not None
        ]


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def verify_attached(model: nn.Module, args: Any) -> None:
    """Forward pre-hook of a model whose quantizers were placed; see :class:`Attached`."""
    model.__dict__["_hqod_attached"].verify(model)
