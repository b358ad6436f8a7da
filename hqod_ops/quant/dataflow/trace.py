"""Which tensor each layer reads, and where in the code it is made: found with ``torch.fx``.

Nothing of a trace is ever run. It says who reads what; the model keeps its classes and its own
``forward``. So a trace may be rough where that does no harm: it ends where control flow depends on
data, and what was seen before is kept.
"""

from __future__ import annotations

import copy
import functools
import inspect
import operator
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from hqod_ops.quant.nn.layers import TWINS

LAYERS = tuple(TWINS)
"""The layers that are quantized; their twins are subclasses."""

_INPLACE = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
_SAME = {"truediv": "div", "concat": "cat", "concatenate": "cat"}
# Functions whose results are numbers, or are not the work of a function at run time.
_NO_TENSOR = frozenset({"getattr", "getitem", "size", "dim", "numel", "stride", "item", "tolist"})


@dataclass(frozen=True)
class Site:
    """A place in the code that makes a tensor.

    Attributes:
        owner (nn.Module): the module in whose own ``forward`` it is.
        what (nn.Module or str): the module that is called there, or the function's name
            (:func:`function_name`).
        index (int): of that module's or function's calls in one call of owner, counted from 0.
    """

    owner: nn.Module
    what: nn.Module | str
    index: int


@dataclass(frozen=True)
class Read:
    """One call of a layer.

    Attributes:
        site (Site, optional): where its input is made; None if ``problem`` says why not known.
        problem (str, optional): why the input cannot be quantized at its source.
    """

    site: Site | None
    problem: str | None = None


@dataclass
class Dataflow:
    """What the traces of a model have shown.

    Attributes:
        reads (dict of nn.Module to list of Read): the calls of every layer that was reached.
        order (list of Site): all sites, as they run.
        shared (set of Site): sites with other readers than one layer.
        kept (set of Site): in-place activations whose input is read again later, and so must be
            changed.
        calls (dict of (nn.Module, nn.Module or str) to int): how often an owner calls a module or a
            function.
        failures (dict of nn.Module to str): modules whose ``forward`` cannot be traced to its end.
    """

    reads: dict[nn.Module, list[Read]] = field(default_factory=dict)
    order: list[Site] = field(default_factory=list)
    shared: set[Site] = field(default_factory=set)
    kept: set[Site] = field(default_factory=set)
    calls: dict[tuple[nn.Module, nn.Module | str], int] = field(default_factory=dict)
    failures: dict[nn.Module, str] = field(default_factory=dict)


def function_name(name: str) -> str:
    """The name under which a function, a method and an operator of the same kind are counted.

    Example:
        >>> function_name("iadd"), function_name("__radd__"), function_name("relu_")
        ('add', 'add', 'relu')
    """
    name = name.strip("_")
    if name[:1] in ("i", "r") and name[1:] in _INPLACE:
        name = name[1:]
    return _SAME.get(name, name)


@functools.cache
def functions_named(name: str) -> tuple[Any, ...]:
    """The functions, methods and operators of torch that :func:`function_name` gives a name.

    Example:
        >>> torch.Tensor.add_ in functions_named("add"), torch.relu in functions_named("relu")
        (True, True)
    """
    spaces = (torch.Tensor, torch, nn.functional, torch._C._nn, operator)
    found = [
        getattr(space, attribute)
        for space in spaces
        for attribute in dir(space)
        if function_name(attribute) == name
    ]
    return tuple(dict.fromkeys(value for value in found if callable(value)))


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
            _add(result, missing, _trace_piece(piece))
            todo += piece.children()
    return result


def _add(result: Dataflow, missing: list[nn.Module], traces: list[_Tracer]) -> None:
    for trace in traces:
        flow = trace.flow
        result.order += flow.order
        result.shared |= flow.shared
        result.kept |= flow.kept
        result.failures.update(flow.failures)
        for key, count in flow.calls.items():
            result.calls[key] = max(count, result.calls.get(key, 0))
    for layer in missing:
        modes = [trace.flow.reads[layer] for trace in traces if layer in trace.flow.reads]
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


@dataclass(eq=False)
class _Frame:
    """A call of a module whose ``forward`` is traced through."""

    module: nn.Module
    counts: dict[nn.Module | str, int] = field(default_factory=dict)
    problem: str | None = None


class _Proxy(fx.Proxy):
    """A value of a trace. Unlike fx's it tells ``x += y`` from ``x + y``."""

    tracer: _Tracer


def _inplace(name: str) -> Callable[[_Proxy, Any], fx.Proxy]:
    function = getattr(operator, f"i{name}")

    def method(self: _Proxy, other: Any) -> fx.Proxy:
        result: fx.Proxy = self.tracer.create_proxy("call_function", function, (self, other), {})
        return result

    return method


for _name in _INPLACE:
    setattr(_Proxy, f"__i{_name}__", _inplace(_name))


class _Tracer(fx.Tracer):
    """One trace of a piece; what it shows is in ``flow``."""

    proxy_buffer_attributes = True  # or in-place operations would change the buffers

    def __init__(self, piece: nn.Module, defaults: dict[str, Any]) -> None:
        super().__init__()
        self.flow = Dataflow()
        self._frames = [_Frame(piece)]
        self._stacks: dict[fx.Node, tuple[_Frame, ...]] = {}
        self._sites: dict[fx.Node, Site] = {}
        self._modules: dict[fx.Node, nn.Module] = {}
        self._numbers: set[fx.Node] = set()
        self._inner = {
            m
            for m in piece.modules()
            if any(isinstance(x, (*LAYERS, nn.ReLU, nn.ReLU6)) for x in m.modules() if x is not m)
        }
        try:
            self.trace(piece, defaults)
        except Exception as error:  # whatever the model's own code may raise on a proxy
            self._break(self._frames[0], error)
        self._read()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, nn.Sequential):
            return m not in self._inner
        return isinstance(m, LAYERS) or m.__module__.startswith("torch.nn.")

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
        frame = _Frame(m)
        self._frames.append(frame)
        try:
            result = m.forward(*args, **kwargs)  # without hooks, which might keep the proxies
        except Exception as error:  # as above; the caller goes on with an unknown result
            self._break(frame, error)
            result = None
        finally:
            self._frames.pop()
            for what, count in frame.counts.items():
                self.flow.calls[m, what] = max(count, self.flow.calls.get((m, what), 0))
        if frame.problem is not None:
            return self._opaque(m, path, (), {})
        index = self._count(m)
        made = isinstance(result, fx.Proxy) and frame in self._stacks[result.node]
        if made and m not in self._inner:
            # What a module without layers returns is behind the module, not behind a function.
            self._sites[result.node] = Site(self._frames[-1].module, m, index)
        return result

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        # Around its network a detector loops over its images and targets. The network does not
        # depend on what happens there, so the trace passes by; elsewhere it ends.
        return iter(()) if len(self._frames) == 1 else super().iter(obj)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, target, *args, **kwargs)
        self._stacks[node] = tuple(self._frames)
        if kind in ("call_function", "call_method"):
            name = function_name(target if isinstance(target, str) else target.__name__)
            if self._is_number(node, name):
                self._numbers.add(node)
            elif name not in _NO_TENSOR:
                count = self._count(name)
                if kind == "call_method" or target in functions_named(name):
                    self._sites[node] = Site(self._frames[-1].module, name, count)
        return node

    def _is_number(self, node: fx.Node, name: str) -> bool:
        if name == "getattr":
            return node.args[1] in ("shape", "ndim", "is_cuda", "device", "dtype")
        if name in _NO_TENSOR and name != "getitem":
            return True
        inputs = node.all_input_nodes
        return bool(inputs) and all(value in self._numbers for value in inputs)

    def _opaque(
        self, m: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> fx.Proxy:
        proxy: fx.Proxy = self.create_proxy("call_module", path, args, kwargs)
        self._modules[proxy.node] = m
        self._sites[proxy.node] = Site(self._frames[-1].module, m, self._count(m))
        return proxy

    def _count(self, what: nn.Module | str) -> int:
        """Count a call; returns how many there were before."""
        counts = self._frames[-1].counts
        index = counts.get(what, 0)
        counts[what] = index + 1
        return index

    def _break(self, frame: _Frame, error: Exception) -> None:
        frame.problem = textwrap.shorten(f"{type(error).__name__}: {error}", 80, placeholder=" ...")
        if frame.module in self._inner:
            self.flow.failures.setdefault(frame.module, frame.problem)

    def _read(self) -> None:
        """Fill ``flow`` from the graph."""
        root = self._frames[0]
        for what, count in root.counts.items():
            self.flow.calls[root.module, what] = count
        order = {node: index for index, node in enumerate(self.graph.nodes)}
        self.flow.order = list(self._sites.values())
        for node, site in self._sites.items():
            if sum(1 for _ in node.users) > 1 or not all(self._layer(user) for user in node.users):
                self.flow.shared.add(site)
            if _is_relu(site.what) and self._rereads(node, order):
                self.flow.kept.add(site)
        for node, module in self._modules.items():
            if isinstance(module, LAYERS):
                self.flow.reads.setdefault(module, []).append(self._source(node, order))

    def _layer(self, node: fx.Node) -> bool:
        return isinstance(self._modules.get(node), LAYERS)

    def _rereads(self, node: fx.Node, order: dict[fx.Node, int]) -> bool:
        """Whether a node changes its input in place, and that is read again later."""
        inputs = node.all_input_nodes
        return (
            bool(inputs)
            and self._changes(node, inputs[0])
            and any(order[user] > order[node] for user in inputs[0].users)
        )

    def _changes(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether a node changes a value in place."""
        if not node.args or node.args[0] is not value:
            return node.kwargs.get("out") is value
        if node.op == "call_module":
            return bool(getattr(self._modules[node], "inplace", False))
        if node.kwargs.get("inplace") is True:
            return True
        if node.op == "call_method":
            name = str(node.target)
            return name.endswith("_") and not name.endswith("__")
        if node.op != "call_function" or isinstance(node.target, str):
            return False
        name = node.target.__name__
        if node.target.__module__ == "_operator":
            return name == "setitem" or (name[:1] == "i" and name[1:] in _INPLACE)
        return name.endswith("_") or (len(node.args) > 1 and _inplace_argument(node))

    def _source(self, node: fx.Node, order: dict[fx.Node, int]) -> Read:
        source = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(source, fx.Node):
            return Read(None, "they read a tensor that is not in the trace")
        site, stack = self._sites.get(source), self._stacks[node]
        if site is None:
            return Read(None, f"they read {self._origin(source)}")
        if any(self._changes(user, source) and order[user] < order[node] for user in source.users):
            return Read(site, "they read a tensor that is changed in place after it was made")
        for frame in stack:
            # Behind the point where the trace of a module ended, it may be called again.
            inside = frame in self._stacks[source] and frame.module is not site.owner
            if frame.problem and (not inside or frame is stack[-1]):
                name = type(frame.module).__name__
                return Read(site, f"forward of {name} cannot be traced: {frame.problem}")
        return Read(site)

    def _origin(self, node: fx.Node) -> str:
        """What a tensor is that no module or function has made."""
        if node.op == "placeholder":
            return f"an argument of {type(self._frames[0].module).__name__}"
        if node.op == "get_attr":
            return f"the parameter or buffer {node.target}"
        if node.target is getattr:
            return f"the attribute {node.args[1]} of another value"
        if node.target is not operator.getitem:
            return f"the result of {getattr(node.target, '__name__', node.target)}"
        return "an item of another value"


def _is_relu(what: nn.Module | str) -> bool:
    return what in ("relu", "relu6") or type(what) in (nn.ReLU, nn.ReLU6)


def _inplace_argument(node: fx.Node) -> bool:
    """Whether ``inplace`` is given by position."""
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return bound.arguments.get("inplace") is True
