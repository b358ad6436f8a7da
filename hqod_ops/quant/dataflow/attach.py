"""Quantizers where tensors are made: behind a module, or behind a function within a ``forward``.

No class or name of the model changes. What a module carries is one object, a
:class:`PlacedForward` which stands in for its ``forward``. The modules that it calls have two hooks
besides, since functions called within them are not its own; these find their callers in the
module's ``__dict__["_hqod_callers"]``. Hooks are functions of this module, so that copies and
pickles of the model have their own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import CodeType
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from hqod_ops.quant.dataflow.graph import functions_named
from hqod_ops.quant.nn.batch_norm import FrozenStatistics, freeze_batch_norm
from hqod_ops.quant.nn.layers import QATLayer
from hqod_ops.quant.nn.upstream import observing, tag
from hqod_ops.quant.quantizers.base import Quantizer

_CALLERS = "_hqod_callers"


class CallQuantizers:
    """The quantizers behind the calls of one module or function in one call of its owner.

    Args:
        quantizers (sequence of Quantizer or None): one a call; None leaves the result as it is. All
            further calls have that of the only one.
    """

    def __init__(self, quantizers: Sequence[Quantizer | None]) -> None:
        self._quantizers = tuple(quantizers)
        self._next = 0
        self.differ = len(set(self._quantizers)) > 1
        """Whether it matters which call it is."""

    def next(self) -> Quantizer | None:
        """The quantizer behind this call."""
        if not self.differ:
            return self._quantizers[0]
        index = self._next
        self._next = index + 1
        return self._quantizers[index] if index < len(self._quantizers) else None

    def reset(self) -> None:
        """The next call is the first of a call of the owner."""
        self._next = 0


class PlacedForward:
    """``forward`` of a module with quantizers behind its calls or behind what it calls itself.

    Args:
        module (nn.Module): the module.
    """

    behind: CallQuantizers | None
    """The quantizers behind the module's own calls."""
    inner: list[CallQuantizers]
    """What counts calls of modules and functions within one call of this one."""
    paused: int
    """Within how many of the modules that it calls the program is."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._forward = module, module.__dict__.get("forward")
        self.behind, self.inner, self.paused = None, [], 0
        self.watch({})

    def watch(self, functions: Mapping[str, CallQuantizers]) -> None:
        """Quantize behind functions, by name (:func:`hqod_ops.quant.dataflow.graph.function_name`),
        that the module's ``forward`` calls itself."""
        self._named = dict(functions)
        self.functions = {
            function: quantizers
            for name, quantizers in functions.items()
            for function in functions_named(name)
        }

    def __getstate__(self) -> dict[str, Any]:
        # Without the functions: not all of them can be pickled.
        return {key: value for key, value in self.__dict__.items() if key != "functions"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.watch(self._named)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.paused = 0
        for quantizers in self.inner:
            quantizers.reset()
        quantizer = None if self.behind is None else self.behind.next()
        if quantizer is None:
            return self._call_module(*args, **kwargs)
        return _quantized(quantizer, self._call_module, args, kwargs)

    def _call_module(self, *args: Any, **kwargs: Any) -> Any:
        forward = self._forward
        if forward is None:
            forward = functools.partial(type(self._module).forward, self._module)
        if not self.functions:
            return forward(*args, **kwargs)
        with _FunctionMode(self):
            return forward(*args, **kwargs)

    def move(self, module: nn.Module) -> None:
        """Be the forward of another module, which has taken the place of the first."""
        self._module, self._forward = module, None
        module.forward = self

    # What torch.export asks of a forward.

    @property
    def __code__(self) -> CodeType:
        code: CodeType = type(self._module).forward.__code__
        return code

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self._module).forward.__get__(self._module))


def _quantized(quantizer: Quantizer, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What a quantizer makes of a function's result, in calibration with a tag."""
    if quantizer.activation is not None:  # and that is what the function does
        y = quantizer(args[0] if args else kwargs["input"])
    else:
        y = quantizer(function(*args, **kwargs))
    if observing(quantizer):
        tag(quantizer, y)
    return y


class _FunctionMode(TorchFunctionMode):
    """Sees the functions called while a module runs."""

    def __init__(self, forward: PlacedForward) -> None:
        super().__init__()
        self._forward = forward

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = None if self._forward.paused else self._forward.functions.get(func)
        quantizer = None if found is None else found.next()
        if quantizer is None:
            return func(*args, **(kwargs or {}))
        return _quantized(quantizer, func, args, kwargs or {})


def placed_forward(module: nn.Module) -> PlacedForward:
    """What a module carries; it gets one if it carries nothing yet."""
    found = module.__dict__.get("forward")
    if not isinstance(found, PlacedForward):
        found = module.forward = PlacedForward(module)
    return found


def pause_within(child: nn.Module, caller: PlacedForward) -> None:
    """Let functions called within a module not count as those of its caller."""
    if _CALLERS not in child.__dict__:
        child.__dict__[_CALLERS] = []
        # Outermost, so that what other hooks of the child do does not count either.
        child.register_forward_pre_hook(_pause, prepend=True)
        child.register_forward_hook(_resume)
    child.__dict__[_CALLERS].append(caller)


def _pause(child: nn.Module, args: Any) -> None:
    for caller in child.__dict__[_CALLERS]:
        caller.paused += 1


def _resume(child: nn.Module, args: Any, output: Any) -> None:
    for caller in child.__dict__[_CALLERS]:
        caller.paused -= 1


def _carries_quantizers(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("forward"), PlacedForward) or _CALLERS in module.__dict__


class ExpectedModules:
    """The modules of a model that carry something, and whether they are still there.

    A module that is replaced takes it along: without a check, the layers behind would read floats
    from then on, and nothing would say so.

    Args:
        model (nn.Module): the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = {
            name: module
            for name, module in model.named_modules()
            if _carries_quantizers(module) or isinstance(module, FrozenStatistics)
        }
        self._links: list[tuple[dict[str, nn.Module | None], str, nn.Module]] = []

    def __getstate__(self) -> dict[str, Any]:
        # Without the links, which a copy finds again.
        return {"_modules": self._modules, "_links": []}

    def verify(self, model: nn.Module) -> None:
        """Check the model, where anything was replaced since the last time.

        A batch normalisation that was converted to a synchronized one gets what its predecessor
        had: the quantizer behind it, or its frozen statistics. Modules within a wrapper, as of
        ``torch.compile``, are still there.

        Raises:
            RuntimeError: another module was replaced.
        """
        if not self._modules:
            return
        if self._links and all(children.get(key) is m for children, key, m in self._links):
            return
        there = set(model.modules())
        for name, module in self._modules.items():
            found = _submodule(model, name)
            if module in there or found is None:
                continue
            if isinstance(found, nn.SyncBatchNorm) and isinstance(module, _BatchNorm):
                _follow(module, found)
            elif _carries_quantizers(module):
                raise RuntimeError(
                    f"{name}: expected the {type(module).__name__} that place_on_producers saw, "
                    f"got another module, {type(found).__name__}, without its quantizers; replace "
                    "modules before place_on_producers"
                )
            self._modules[name] = found
        self._links = [
            (module._modules, key, child)
            for module in there
            if not isinstance(module, QATLayer)
            for key, child in module._modules.items()
            if child is not None
        ]


def _follow(old: nn.Module, new: nn.Module) -> None:
    """Give a batch normalisation what the one before its conversion carried."""
    forward = old.__dict__.get("forward")
    if isinstance(forward, PlacedForward):
        forward.move(new)
    for caller in old.__dict__.get(_CALLERS, ()):
        pause_within(new, caller)
    if isinstance(old, FrozenStatistics):
        freeze_batch_norm(new)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
