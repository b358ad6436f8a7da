"""Passes through a model's code by tracing it with ``torch.fx``.

Nothing of a trace is ever run. It says who reads what; the model keeps its classes and its own
``forward``. So a trace may be rough where that does no harm: it ends where control flow depends on
data, and what was seen before is kept.
"""

from __future__ import annotations

import copy
import inspect
import operator
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from hqod_ops.quant.dataflow.graph import INPLACE, Dataflow, Frame, Read, Recorder
from hqod_ops.quant.nn.attention import Projection
from hqod_ops.quant.nn.twins import TWINS

LAYERS = (*TWINS, Projection)
"""The layers that are quantized; their twins are subclasses."""


def trace_dataflow(model: nn.Module) -> Dataflow:
    """Trace a prepared model, as a whole and then the pieces that this did not reach.

    Both in training and in eval mode: a layer must read the same in both, if it is called in both.

    Args:
        model (nn.Module): a prepared model. It is only read.
    """
    result = Dataflow()
    todo = [model]
    while todo:
        piece = todo.pop(0)
        layers = [m for m in piece.modules() if isinstance(m, LAYERS)]
        missing = [layer for layer in layers if layer not in result.reads]
        if missing:
            add_passes(result, missing, [trace.flow for trace in _trace_piece(piece)])
            todo += piece.children()
    return result


def add_passes(result: Dataflow, missing: Iterable[nn.Module], passes: Sequence[Dataflow]) -> None:
    """Take in what passes in training and in eval mode have shown of some layers."""
    for flow in passes:
        result.add(flow)
    for layer in missing:
        modes = [flow.reads[layer] for flow in passes if layer in flow.reads]
        if not modes:
            continue
        reads = modes[0]
        if any(mode != reads for mode in modes):
            problem = next(
                (read.problem for mode in modes for read in mode if read.problem),
                "they read other tensors in training than in eval mode",
            )
            reads = [Read(None, problem)]
        result.reads[layer] = reads


def _trace_piece(piece: nn.Module) -> list[_Tracer]:
    """A trace in training mode and one in eval mode."""
    traces = []
    for mode in (True, False):
        # With optional arguments left out, and with all given: the one that gets further.
        tries = []
        for defaults in _argument_choices(piece):
            with _unchanged(piece), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the model's code about proxies
                piece.train(mode)
                tries.append(_Tracer(piece, defaults))
        traces.append(max(tries, key=lambda trace: len(trace.flow.reads)))
    return traces


@contextmanager
def _unchanged(piece: nn.Module) -> Iterator[None]:
    """Undo what running the model's code has done to its attributes, such as caches of anchors."""
    before = [(vars(m), dict(vars(m))) for m in piece.modules()]
    values = [value for _, attributes in before for value in attributes.values()]
    contents = [(value, copy.copy(value)) for value in values if type(value) in (list, dict, set)]
    try:
        yield
    finally:
        for now, then in [*before, *((v, c) for v, c in contents if not isinstance(v, list))]:
            now.clear()
            now.update(then)
        for now, then in ((v, c) for v, c in contents if isinstance(v, list)):
            now[:] = then


def _argument_choices(piece: nn.Module) -> list[dict[str, Any]]:
    parameters = inspect.signature(type(piece).forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return [defaults, {}] if defaults else [{}]


class _Proxy(fx.Proxy):
    """A value of a trace. Unlike fx's it tells ``x += y`` from ``x + y``."""

    tracer: _Tracer


def _inplace(name: str) -> Callable[[_Proxy, Any], fx.Proxy]:
    function = getattr(operator, f"i{name}")

    def method(self: _Proxy, other: Any) -> fx.Proxy:
        result: fx.Proxy = self.tracer.create_proxy("call_function", function, (self, other), {})
        return result

    return method


for _name in INPLACE:
    setattr(_Proxy, f"__i{_name}__", _inplace(_name))


class _Tracer(Recorder, fx.Tracer):
    """One trace of a piece."""

    proxy_buffer_attributes = True  # or in-place operations would change the buffers

    def __init__(self, piece: nn.Module, defaults: dict[str, Any]) -> None:
        super().__init__(piece, {m for m in piece.modules() if isinstance(m, LAYERS)})
        try:
            self.trace(piece, defaults)
        except Exception as error:  # whatever the model's own code may raise on a proxy
            self._break(self.frames[0], error)
        self.finish()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, nn.Sequential):
            return m not in self.containers
        return m in self.readers or m.__module__.startswith("torch.nn.")

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return self._opaque(m, path, args, kwargs)
        frame = self.enter(m)
        try:
            result = m.forward(*args, **kwargs)  # without hooks, which might keep the proxies
        except Exception as error:  # as above; the caller goes on with an unknown result
            self._break(frame, error)
        finally:
            self.leave()
        if frame.problem is not None:
            return self._opaque(m, path, (), {})
        self.returned(frame, result.node if isinstance(result, fx.Proxy) else None)
        return result

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        # Around its network a detector loops over its images and targets. The network does not
        # depend on what happens there, so the trace passes by; elsewhere it ends.
        return iter(()) if len(self.frames) == 1 else super().iter(obj)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        self.note(node)
        return node

    def _opaque(
        self, m: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> fx.Proxy:
        proxy: fx.Proxy = self.create_proxy("call_module", path, args, kwargs)
        self.note_module(proxy.node, m)
        return proxy

    def _break(self, frame: Frame, error: Exception) -> None:
        frame.problem = textwrap.shorten(f"{type(error).__name__}: {error}", 80, placeholder=" ...")
        if frame.module in self.containers:
            self.flow.failures.setdefault(frame.module, frame.problem)
