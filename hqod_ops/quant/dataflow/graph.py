"""Who makes a tensor and who reads it: what a pass through a model's code has shown.

A pass is made by tracing, with proxies (:mod:`hqod_ops.quant.dataflow.trace`), or by running, with
values (:mod:`hqod_ops.quant.dataflow.run`). Both note the same in the same graph, whose reading is
here.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from hqod_ops.quant.quantizers.base import ACTIVATIONS

INPLACE = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
"""The operators that have a form which works in place."""
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
    """One call of a reader.

    Attributes:
        site (Site, optional): where its input is made; None if ``problem`` says why not known.
        problem (str, optional): why the input cannot be quantized at its source.
    """

    site: Site | None
    problem: str | None = None


@dataclass
class Dataflow:
    """What passes through a model have shown.

    Attributes:
        reads (dict of nn.Module to list of Read): the calls of every reader that was reached.
        order (list of Site): all sites, as they run.
        readers (dict of Site to set of nn.Module or None): who reads what is made there; None is
            anything that is no reader.
        shared (set of Site): sites that are read by anything else than one call of one reader.
        reread (set of Site): in-place activations whose input is read again later, and so must be
            changed.
        calls (dict of (nn.Module, nn.Module or str) to int): how often an owner calls a module or a
            function.
        failures (dict of nn.Module to str): modules whose ``forward`` cannot be traced to its end.
    """

    reads: dict[nn.Module, list[Read]] = field(default_factory=dict)
    order: list[Site] = field(default_factory=list)
    readers: dict[Site, set[nn.Module | None]] = field(default_factory=dict)
    shared: set[Site] = field(default_factory=set)
    reread: set[Site] = field(default_factory=set)
    calls: dict[tuple[nn.Module, nn.Module | str], int] = field(default_factory=dict)
    failures: dict[nn.Module, str] = field(default_factory=dict)

    def count(self, owner: nn.Module, what: nn.Module | str, calls: int) -> None:
        """Note how often something was called in one call of its owner."""
        self.calls[owner, what] = max(calls, self.calls.get((owner, what), 0))

    def add(self, other: Dataflow) -> None:
        """Take in what another pass has shown, but for the reads."""
        self.order += other.order
        self.shared |= other.shared
        self.reread |= other.reread
        self.failures.update(other.failures)
        for site, readers in other.readers.items():
            self.readers.setdefault(site, set()).update(readers)
        for (owner, what), count in other.calls.items():
            self.count(owner, what, count)


def function_name(name: str) -> str:
    """The name under which a function, a method and an operator of the same kind are counted.

    Example:
        >>> function_name("iadd"), function_name("__radd__"), function_name("relu_")
        ('add', 'add', 'relu')
    """
    name = name.strip("_")
    if name[:1] in ("i", "r") and name[1:] in INPLACE:
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


@dataclass(eq=False)
class Frame:
    """A call of a module that the pass goes through."""

    module: nn.Module
    counts: dict[nn.Module | str, int] = field(default_factory=dict)
    problem: str | None = None
    """Why it could not be followed to its end."""


class Recorder:
    """Notes the calls of one pass as nodes of a graph; what it shows is in ``flow``.

    Args:
        root (nn.Module): the module whose code it goes through.
        readers (collection of nn.Module): those of its modules whose inputs are looked at. What
            happens within them is not.
    """

    graph: fx.Graph

    def __init__(self, root: nn.Module, readers: Collection[nn.Module]) -> None:
        super().__init__()
        self.flow = Dataflow()
        self.readers = readers
        self.frames = [Frame(root)]
        self._stacks: dict[fx.Node, tuple[Frame, ...]] = {}
        self._sites: dict[fx.Node, Site] = {}
        self._modules: dict[fx.Node, nn.Module] = {}
        self._numbers: set[fx.Node] = set()
        self.containers = {
            m
            for m in root.modules()
            if any(x in readers or activation(x) for x in m.modules() if x is not m)
        }
        """Modules with a reader or an activation in them."""

    def note(self, node: fx.Node) -> None:
        """Note a new node of the graph."""
        self._stacks[node] = tuple(self.frames)
        if node.op in ("call_function", "call_method"):
            name = function_name(_target_name(node))
            if self._is_number(node, name):
                self._numbers.add(node)
            elif name not in _NO_TENSOR:
                index = self._count(name)
                if node.op == "call_method" or node.target in functions_named(name):
                    self._sites[node] = Site(self.frames[-1].module, name, index)

    def note_module(self, node: fx.Node, module: nn.Module) -> None:
        """Note that a node is the call of a module."""
        self._modules[node] = module
        self._sites[node] = Site(self.frames[-1].module, module, self._count(module))

    def enter(self, module: nn.Module) -> Frame:
        """A call of a module begins that the pass goes through."""
        frame = Frame(module)
        self.frames.append(frame)
        return frame

    def leave(self) -> None:
        """The last call that was entered is over."""
        frame = self.frames.pop()
        for what, count in frame.counts.items():
            self.flow.count(frame.module, what, count)

    def returned(self, frame: Frame, node: fx.Node | None) -> None:
        """Note what a call that was left has returned, if that is a tensor."""
        index = self._count(frame.module)
        if frame.module in self.containers:
            return
        # What a module without readers returns is behind the module, not behind a function.
        if node is not None and frame in self._stacks[node]:
            self._sites[node] = Site(self.frames[-1].module, frame.module, index)

    def finish(self) -> None:
        """Fill ``flow`` from the graph."""
        root = self.frames[0]
        for what, count in root.counts.items():
            self.flow.count(root.module, what, count)
        order = {node: index for index, node in enumerate(self.graph.nodes)}
        self.flow.order = list(self._sites.values())
        for node, site in self._sites.items():
            readers = [self._reader(user) for user in node.users]
            self.flow.readers.setdefault(site, set()).update(readers)
            if len(readers) > 1 or None in readers:
                self.flow.shared.add(site)
            if activation(site.what) and self._rereads(node, order):
                self.flow.reread.add(site)
        for node, module in self._modules.items():
            if module in self.readers:
                self.flow.reads.setdefault(module, []).append(self._source(node, order))

    def _count(self, what: nn.Module | str) -> int:
        """Count a call; returns how many there were before."""
        counts = self.frames[-1].counts
        index = counts.get(what, 0)
        counts[what] = index + 1
        return index

    def _is_number(self, node: fx.Node, name: str) -> bool:
        if name == "getattr":
            return node.args[1] in ("shape", "ndim", "is_cuda", "device", "dtype")
        if name in _NO_TENSOR and name != "getitem":
            return True
        inputs = node.all_input_nodes
        return bool(inputs) and all(value in self._numbers for value in inputs)

    def _reader(self, node: fx.Node) -> nn.Module | None:
        module = self._modules.get(node)
        return module if module in self.readers else None

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
        if node.op not in ("call_function", "call_method"):
            return False
        name = _target_name(node)
        if name.endswith("_") and not name.endswith("__"):
            return True
        name = name.strip("_")
        if name == "setitem" or (name[:1] == "i" and name[1:] in INPLACE):
            return True
        return node.op == "call_function" and len(node.args) > 1 and _inplace_argument(node)

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
            return f"an argument of {type(self.frames[0].module).__name__}"
        if node.op == "get_attr":
            return f"the parameter or buffer {node.target}"
        if node.target is getattr:
            return f"the attribute {node.args[1]} of another value"
        if node.target is not operator.getitem:
            return f"the result of {getattr(node.target, '__name__', node.target)}"
        return "an item of another value"


def activation(what: nn.Module | str) -> str | None:
    """The name of the activation that a module or a function is, if a quantizer can take it in."""
    if isinstance(what, str):
        return what if what in ACTIVATIONS else None
    return {nn.ReLU: "relu", nn.ReLU6: "relu6"}.get(type(what))


def _target_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _inplace_argument(node: fx.Node) -> bool:
    """Whether ``inplace`` is given by position."""
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return bound.arguments.get("inplace") is True
