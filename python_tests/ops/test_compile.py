"""The native ops in torch's compilers and exporters, and as plain ``torch.ops.hqod`` operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import hqod_ops
from hqod_ops.testing.cases import CASES, OpCase, Variant, differentiable, map_tensors
from hqod_ops.testing.device import DEVICE, to_device
from hqod_ops.testing.oracle import as_list, assert_close, assert_same_bits, run, upstream_for

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
native = pytest.mark.require("ext")

Call = tuple[torch._ops.OpOverload, tuple[Any, ...]]


class _Recorder(TorchDispatchMode):
    """Keeps every call of a native op, forward or backward, with copies of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "hqod":
            kept = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, args)
            self.calls.append((func, kept))
        return func(*args, **(kwargs or {}))


def native_calls(case: OpCase, variant: Variant, size: Any, **options: Any) -> list[Call]:
    """One call of every native op behind a public op.

    Without gradients, with gradients, and with gradients of which a graph is wanted, since each may
    take a way of its own.
    """
    inputs = case.make(variant, size, **options)
    with _Recorder() as recorder:
        with torch.no_grad():
            case.call(inputs, variant)
        run(case.call, case, inputs, variant)
        outputs = as_list(case.call(inputs, variant))
        tensors = list(differentiable(case, inputs).values())
        torch.autograd.grad(outputs, tensors, upstream_for(outputs), create_graph=True)
    return list({func: (func, args) for func, args in reversed(recorder.calls)}.values())[::-1]


def small(case: OpCase) -> Any:
    if case.is_loss:
        return (7,)
    return (4, 6, 3) if case.name == "fake_quant" else ((4, 3, 3), (5, 4), (7, 2))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@native
def test_every_registered_op_is_exercised() -> None:
    """What the registry reaches is all that the library registers, so no op escapes the tests.

    A loss computes its gradients in the forward pass on the CPU alone.
    """
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("hqod::")
    }
    reached = {
        func._schema.name.split("::")[1]
        for case in CASES.values()
        for variant in case.variants
        for func, _ in native_calls(case, variant, small(case))
    }
    missed = {name for name in registered - reached if not name.startswith("_cpu_isa")}
    if DEVICE.type != "cpu":
        missed = {name for name in missed if not name.endswith("_and_grad")}
    assert not missed and reached <= registered


@native
@every_case
def test_opcheck(case: OpCase) -> None:
    """Schema, autograd registration, fake tensors and AOT dispatch of forward and backward ops."""
    variants = case.variants if case.name != "fake_quant_foreach" else case.variants[:2]
    for variant in variants:
        for func, args in native_calls(case, variant, small(case)):
            torch.library.opcheck(func, with_gradients(func, args))
    for func, args in native_calls(case, case.variants[-1], small(case), dtype=torch.bfloat16):
        torch.library.opcheck(func, with_gradients(func, args))


def with_gradients(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a differentiable op with copies that require a gradient.

    A weight is a constant to the op: the public functions multiply by one that learns.
    """
    if "::_" in func._schema.name:
        return args
    names = [argument.name for argument in func._schema.arguments]
    return tuple(
        tree_map(lambda x: x.clone().requires_grad_() if isinstance(x, Tensor) else x, arg)
        if name != "weight"
        else arg
        for name, arg in zip(names, args, strict=False)
    )


@native
@every_case
def test_fake_kernels_agree_on_layout(case: OpCase) -> None:
    """Shapes, dtypes and strides that compilers plan with are those that the kernels return."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for variant in case.variants:
        for layout in case.layouts:
            for func, args in native_calls(case, variant, small(case), layout=layout):
                real = func(*args)
                with FakeTensorMode() as mode:
                    to_fake = mode.from_tensor
                    fake = func(
                        *tree_map(lambda x: to_fake(x) if isinstance(x, Tensor) else x, args)  # noqa: B023
                    )
                flat = [torch.utils._pytree.tree_leaves(out) for out in (real, fake)]
                for a, b in zip(*flat, strict=True):
                    what = f"{func} {variant.name} {layout}"
                    assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), what


@every_case
def test_fake_tensors(case: OpCase) -> None:
    """A training step on tensors without memory, as tools that plan memory run it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for variant in case.variants:
        with FakeTensorMode():
            outputs, grads = run(case.call, case, case.make(variant, small(case)), variant)
        expected, wanted = run(case.call, case, case.make(variant, small(case)), variant)
        for got, want in zip(outputs, expected, strict=True):
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
        for name, grad in grads.items():
            assert (grad.shape, grad.dtype) == (wanted[name].shape, wanted[name].dtype)


def compiled_matches(
    case: OpCase, variant: Variant, sizes: list[Any], compiled: Callable[..., Any], **options: Any
) -> None:
    for size in sizes:
        inputs = case.make(variant, size, **options)
        outputs, grads = run(lambda i, v: compiled(**i), case, inputs, variant)  # noqa: ARG005
        expected, expected_grads = run(case.call, case, inputs, variant)
        what = f"{case.name}/{variant.name} {size}"
        for y, want in zip(outputs, expected, strict=True):
            assert y.dtype == want.dtype
            assert_close(y, want.double(), what)
        for name, grad in grads.items():
            assert_close(grad, expected_grads[name].double(), f"{what} d{name}")


@every_case
def test_compile_without_graph_breaks(case: OpCase) -> None:
    for variant in case.variants:
        torch._dynamo.reset()

        def function(variant: Variant = variant, **inputs: Any) -> Any:
            return case.function(**inputs, **variant.kwargs)

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
        compiled_matches(case, variant, [small(case)], compiled)


@native
@every_case
def test_compile_with_dynamic_shapes(case: OpCase) -> None:
    """One compilation serves every number of samples, of elements and of channels."""
    sizes = {
        "fake_quant": [(4, 6, 3), (5, 7, 2), (9, 33, 4)],
        "fake_quant_foreach": [((4, 3, 2), (5, 7), (8, 9)), ((9, 5, 3), (6, 8), (4, 7))],
    }.get(case.name, [(7,), (33,), (1025,)])
    for variant in case.variants:
        torch._dynamo.reset()

        def function(variant: Variant = variant, **inputs: Any) -> Any:
            return case.function(**inputs, **variant.kwargs)

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
        compiled_matches(case, variant, sizes[:1], compiled)
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled_matches(case, variant, sizes[1:], compiled)


class _Head(nn.Module):
    """A layer and its loss, so that the compiler has something to fuse around the ops."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 8) * 0.3)
        self.quantize = hqod_ops.FakeQuant(-8, 7, scale=torch.full((5,), 0.1), ch_axis=0)
        self.loss = hqod_ops.HQODLoss(logits=True)

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        out = features @ self.quantize(self.weight).t()
        centre, size = out[:, :2].tanh() * 4, (out[:, 2:4] / 4).exp() * 20
        pred = torch.cat([target[:, :2] + centre, target[:, :2] + centre + size], dim=1)
        average = torch.full((), 7.0, device=out.device)
        loss = self.loss(pred, target, out[:, 4], avg_factor=average)
        return loss + hqod_ops.fake_quant_foreach(
            [out, out * 2], [self.quantize.scale[:1], self.quantize.scale[:1]],
            quant_min=-8, quant_max=7,
        )[1].square().mean()  # fmt: skip


def head_inputs(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    corner = torch.rand(n, 2, generator=generator) * 50
    features = torch.randn(n, 8, generator=generator)
    return to_device((features, torch.cat([corner, corner + 20], dim=1)))


@native
def test_inductor() -> None:
    """The default compiler, forward and backward, static and dynamic."""
    head = _Head().to(DEVICE)
    compiled = torch.compile(head, fullgraph=True, dynamic=True)
    for n in (16, 31):
        results = [
            torch.autograd.grad(module(*head_inputs(n)), list(head.parameters()))
            for module in (head, compiled)
        ]
        for want, got in zip(*results, strict=True):
            assert_close(got, want.double(), "gradient", slack=10)


@native
def test_debug_checks_are_skipped_inside_compile() -> None:
    hqod_ops.debug(True)
    compiled = torch.compile(hqod_ops.fake_quant, fullgraph=True, backend="aot_eager")
    x, scale = to_device((torch.ones(3), torch.tensor(-1.0)))
    y = compiled(x, scale, quant_min=0, quant_max=15)
    assert not y.any()


class _Call(nn.Module):
    """One call of an op as a module, which is what torch.export takes."""

    def __init__(self, case: OpCase, variant: Variant, names: tuple[str, ...]) -> None:
        super().__init__()
        self.function, self.options, self.names = case.function, dict(variant.kwargs), names

    def forward(self, *inputs: Any) -> Any:
        return self.function(**dict(zip(self.names, inputs, strict=True)), **self.options)


@native
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
@every_case
def test_export(case: OpCase, strict: bool) -> None:
    """The exported graph calls the native op, and computes the same."""
    for variant in case.variants[:: 1 if not strict else 3]:
        inputs = map_tensors(Tensor.detach, case.make(variant, small(case)))
        module, args = _Call(case, variant, tuple(inputs)), tuple(inputs.values())
        program = torch.export.export(module, args, strict=strict)
        targets = [str(node.target) for node in program.graph.nodes]
        assert any(target.startswith("hqod.") for target in targets), targets
        again = as_list(program.module()(*args))
        for got, want in zip(again, as_list(case.call(inputs, variant)), strict=True):
            assert_same_bits(got, want, variant.name)


@native
def test_export_with_a_dynamic_batch() -> None:
    """One dynamic dimension, shared by all inputs of a loss."""
    n = torch.export.Dim("n", min=2)
    for case in (case for case in CASES.values() if case.is_loss):
        for variant in case.variants:
            inputs = map_tensors(Tensor.detach, case.make(variant, (7,)))
            module = _Call(case, variant, tuple(inputs))
            shapes = (tuple({0: n} if x.dim() else None for x in inputs.values()),)
            program = torch.export.export(
                module, tuple(inputs.values()), dynamic_shapes=shapes, strict=False
            )
            inputs = map_tensors(Tensor.detach, case.make(variant, (1025,)))
            got = program.module()(*inputs.values())
            assert_close(got, case.call(inputs, variant).double(), f"{case.name} {variant.name}")


def tensors_at(args: tuple[Any, ...]) -> Iterator[tuple[int, int | None, Tensor]]:
    """Every tensor among the arguments, with its place and its place in a list."""
    for i, arg in enumerate(args):
        if isinstance(arg, Tensor):
            yield i, None, arg
        elif isinstance(arg, (list, tuple)):
            yield from ((i, j, x) for j, x in enumerate(arg) if isinstance(x, Tensor))


def replaced(args: tuple[Any, ...], i: int, j: int | None, new: Any) -> tuple[Any, ...]:
    changed = list(args)
    if j is None:
        changed[i] = new
    else:
        changed[i] = [new if k == j else x for k, x in enumerate(args[i])]
    return tuple(changed)


@native
@every_case
def test_direct_calls_are_checked(case: OpCase) -> None:
    """torch.ops.hqod takes nothing that would crash: a wrong tensor in any place is a RuntimeError.

    Every tensor of every call is replaced in turn by one of a wrong dtype, shape and device. One on
    the meta device may give results there, which have no memory to go wrong.
    """
    for variant in case.variants:
        for func, args in native_calls(case, variant, small(case)):
            func(*args)
            for i, j, x in tensors_at(args):
                name = func._schema.arguments[i].name
                wrong = {
                    "int64": x.long(),
                    "complex64": x.to(torch.complex64),
                    "float64": x.double(),
                    "meta": x.to("meta"),
                }
                if DEVICE.type != "cpu":
                    wrong["cpu"] = x.cpu()
                # Any shape of x goes with one scale for all.
                free = name in ("x", "xs") and variant.kwargs.get("ch_axis") is None
                if not (free and "::_" not in func._schema.name):
                    wrong["shape"] = x.new_zeros((x.numel() + 3,))
                    wrong["empty"] = x.new_zeros((0,))
                for kind, bad in wrong.items():
                    try:
                        result = func(*replaced(args, i, j, bad))
                    except (RuntimeError, IndexError):
                        continue
                    flat = torch.utils._pytree.tree_leaves(result)
                    if not (kind == "meta" and all(y.is_meta for y in flat)):
                        pytest.fail(f"{func} ({variant.name}) took {name} with wrong {kind}")


@native
@every_case
def test_direct_calls_check_lists_and_options(case: OpCase) -> None:
    """Lists of unequal length and codes of options that do not exist are RuntimeErrors, too."""
    for variant in case.variants:
        for func, args in native_calls(case, variant, small(case)):
            for i, arg in enumerate(args):
                name = func._schema.arguments[i].name
                if isinstance(arg, (list, tuple)) and len(arg):
                    bad: Any = list(arg)[:-1]
                elif name in ("reduction", "variant"):
                    bad = 17
                elif name == "ch_axis":
                    bad = 9
                elif name == "quant_min":
                    bad = 1000
                else:
                    continue
                with pytest.raises((RuntimeError, IndexError)):
                    func(*replaced(args, i, None, bad))
                    pytest.fail(f"{func} ({variant.name}) took {name} = {bad}")


@native
def test_autograd_through_torch_ops() -> None:
    """The plain operators are differentiable by themselves."""
    for case in CASES.values():
        variant = case.variants[0]
        (func, args), *_ = native_calls(case, variant, small(case))
        args = with_gradients(func, args)
        outputs = as_list(func(*args))
        tensors = [x for _, _, x in tensors_at(args)]
        grads = torch.autograd.grad([y.sum() for y in outputs], tensors)
        upstream = [torch.ones_like(y) for y in outputs]
        _, expected = run(case.call, case, case.make(variant, small(case)), variant, upstream)
        for got, want in zip(grads, expected.values(), strict=True):
            assert_close(got, want.double(), case.name)
