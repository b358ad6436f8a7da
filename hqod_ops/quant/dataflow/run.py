"""Passes through a model's code by running it, whatever its control flow depends on."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from hqod_ops.quant.dataflow.graph import Dataflow, Recorder


def run_dataflow(
    model: nn.Module, readers: Collection[nn.Module], run: Callable[[], object]
) -> Dataflow:
    """See who reads what in a run of a model.

    Args:
        model (nn.Module): the model.
        readers (collection of nn.Module): those of its modules whose inputs are looked at.
        run (callable): runs it; what it returns is read by others.
    """
    recorder = _Runner(model, readers)
    with recorder.hooks(model), recorder:
        result = run()
    recorder.read(result)
    recorder.finish()
    return recorder.flow


class _Runner(Recorder, TorchFunctionMode):
    """One run of a model."""

    def __init__(self, model: nn.Module, readers: Collection[nn.Module]) -> None:
        super().__init__(model, readers)
        self.graph = fx.Graph()
        # Tensors are not held; one that gets the id of another which is gone is not taken for it.
        self._nodes: dict[int, tuple[weakref.ref[Tensor], fx.Node]] = {}
        self._inside: tuple[nn.Module, Any, Any] | None = None
        """The reader that is running, with its arguments."""

    @contextmanager
    def hooks(self, model: nn.Module) -> Iterator[None]:
        """Follow the calls of the modules."""
        handles = []
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                handles.append(
                    module.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True)
                )
                handles.append(module.register_forward_hook(self._after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # Looking at a shape is no use of the values.
        if self._inside is None and any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            node = self._add("call_function", func, *self._arguments(args, kwargs))
            self._made(node, result)
        return result

    def read(self, values: Any) -> None:
        """Note that something reads these values."""
        self._add("output", "output", *self._arguments((tree_leaves(values),), {}))

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._inside is not None:
            return
        if module in self.readers:
            self._inside = module, *self._arguments(args, kwargs)
        else:
            self.enter(module)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._inside is not None:
            if self._inside[0] is module:
                _, args, kwargs = self._inside
                self._inside = None
                node = self._add("call_module", type(module).__name__, args, kwargs)
                self.note_module(node, module)
                self._made(node, output)
            return
        frame = self.frames[-1]
        self.leave()
        self.returned(frame, self._known(output) if isinstance(output, Tensor) else None)

    def _add(self, kind: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        name = getattr(target, "__name__", str(target))
        node = self.graph.create_node(kind, target, args, kwargs, name)
        self.note(node)
        return node

    def _arguments(self, args: Any, kwargs: Any) -> Any:
        """Nodes in place of tensors."""
        return tree_map_only(Tensor, self._node, (args, kwargs))

    def _known(self, value: Tensor) -> fx.Node | None:
        found = self._nodes.get(id(value))
        return found[1] if found is not None and found[0]() is value else None

    def _node(self, value: Tensor) -> fx.Node:
        node = self._known(value)
        if node is None:
            node = self._add("placeholder", "value", (), {})
            self._nodes[id(value)] = weakref.ref(value), node
        return node

    def _made(self, node: fx.Node, result: Any) -> None:
        if isinstance(result, Tensor):
            self._nodes[id(result)] = weakref.ref(result), node
            return
        for index, leaf in enumerate(tree_leaves(result)):
            if isinstance(leaf, Tensor):
                self._made(self._add("call_function", operator.getitem, (node, index), {}), leaf)
