"""What only a GPU shows: repeated runs, garbage in fresh memory, streams, syncs, several devices.

The numbers are those of the contract suite, which runs on the GPU with ``HQOD_TEST_DEVICE=cuda``.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import hqod_ops
from hqod_ops.testing.cases import (
    CASES,
    DTYPES,
    OpCase,
    Variant,
    differentiable,
    leaves,
    map_tensors,
)
from hqod_ops.testing.oracle import (
    as_list,
    assert_close,
    assert_same_bits,
    check,
    run,
    upstream_for,
)

pytestmark = pytest.mark.require("ext", "cuda")
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def sizes_of(case: OpCase) -> tuple[Any, ...]:
    """A size of one block, and one of many, with odd tails.

    No larger than float16 holds the sums over it.
    """
    if case.is_loss:
        return (33,), (20011,)
    if case.name == "fake_quant":
        return (5, 7, 3), (32, 33, 9, 9)
    return ((4, 3, 3, 3), (5, 4), (7, 2)), ((64, 33, 3, 3), (301, 250), (7, 2, 3))


def results(case: OpCase, inputs: dict[str, Any], variant: Variant) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    outputs, grads = run(case.call, case, inputs, variant)
    return {f"output {i}": y for i, y in enumerate(outputs)} | grads


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], what: str) -> None:
    for name in want:
        if not torch.equal(got[name], want[name].to(got[name].device)):  # NaN, or a difference
            assert_same_bits(got[name], want[name], f"{what} {name}")


def fill_free_memory() -> None:
    """Leave bytes of 0xFF, a NaN in every float dtype, in the memory that calls get next."""
    torch.cuda.empty_cache()
    # The allocator serves requests up to 1 MiB and larger ones from pools of their own.
    sizes = [2**20] * 4 + [64 * 2**20]
    blocks = [torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda") for size in sizes]
    del blocks


def test_library_is_the_one_for_cuda() -> None:
    assert hqod_ops.build_info()["cuda library"] == "libhqod_ops_cuda.so"


@every_dtype
@every_case
def test_same_bits_on_every_run(case: OpCase, dtype: torch.dtype) -> None:
    """Twenty runs, other work on the GPU between them, and garbage in their fresh memory."""
    noise = torch.rand(2**20, device="cuda")
    for variant in case.variants:
        for size in sizes_of(case):
            inputs = case.make(variant, size, dtype, device="cuda")
            expected = results(case, inputs, variant)
            for _ in range(20):
                noise = noise.sort().values.flip(0)
                got = results(case, inputs, variant)
                assert_same(got, expected, f"{case.name}/{variant.name} {size} {dtype}")


@every_dtype
@every_case
def test_every_element_is_written(case: OpCase, dtype: torch.dtype) -> None:
    """Fresh memory holds NaN: an element or a partial sum that nobody writes shows."""
    for variant in case.variants:
        for size in (*sizes_of(case), *case.sizes[:4]):
            for layout in case.layouts:
                inputs = case.make(variant, size, dtype, layout, device="cuda")
                with torch.no_grad():
                    upstream = upstream_for(as_list(case.call(inputs, variant)))
                fill_free_memory()
                check(case, inputs, variant, upstream, f"{size} {dtype} {layout}")


@every_case
def test_losses_with_their_gradients(case: OpCase) -> None:
    """``_<loss>_and_grad``, of which the CPU makes use, is the loss and its gradients."""
    if not case.is_loss or case.name == "aligned_box_iou":
        assert not hasattr(torch.ops.hqod, f"_{case.name}_and_grad")
        return
    both_op = getattr(torch.ops.hqod, f"_{case.name}_and_grad").default
    names = [a.name for a in both_op._schema.arguments]
    signature = inspect.signature(case.reference)
    defaults = {name: p.default for name, p in signature.parameters.items()}
    for reduction, code in (("mean", 1), ("sum", 2)):
        variant = Variant(reduction, {"reduction": reduction})
        for size in sizes_of(case):
            inputs = case.make(variant, size, device="cuda")
            fixed = defaults | {"reduction": code, "variant": 0, "wanted": 2 ** len(inputs) - 1}
            fixed |= inputs
            with torch.no_grad():
                loss, *grads = both_op(*(fixed[name] for name in names))
            want, wanted = run(case.call, case, inputs, variant, [torch.ones((), device="cuda")])
            assert_close(loss, want[0].double(), f"{case.name} {reduction}")
            for gradient, (name, expected) in zip(grads, wanted.items(), strict=True):
                assert_close(gradient, expected.double(), f"{case.name} {reduction} d{name}")


@contextlib.contextmanager
def syncs_are_errors() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_dtype
@every_case
def test_host_never_waits(case: OpCase, dtype: torch.dtype) -> None:
    """Neither forward nor backward reads a value back."""
    for variant in case.variants:
        for layout in case.layouts:
            inputs = case.make(variant, sizes_of(case)[0], dtype, layout, device="cuda")
            outputs = as_list(case.call(inputs, variant))  # what a first call sets up may wait
            upstream = upstream_for(outputs)
            wanted = list(differentiable(case, inputs).values())
            torch.autograd.grad(outputs, wanted, upstream)
            with syncs_are_errors():
                outputs = as_list(case.call(inputs, variant))
                torch.autograd.grad(outputs, wanted, upstream)
                with torch.no_grad():
                    case.call(inputs, variant)


@every_case
def test_runs_on_the_current_stream(case: OpCase) -> None:
    """Forward and backward wait for what their stream did before, and for nothing else.

    The inputs arrive late on a side stream: a launch on another one would meet the old values.
    """
    for variant in case.variants:
        size = sizes_of(case)[1]
        new = case.make(variant, size, device="cuda", seed=1)
        expected = results(case, new, variant)
        inputs = case.make(variant, size, device="cuda")
        outputs = as_list(case.call(inputs, variant))
        upstream = upstream_for(outputs)
        wanted = differentiable(case, inputs)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(20_000_000)  # some 10 ms
            with torch.no_grad():
                for name, tensor in leaves(inputs).items():
                    tensor.copy_(leaves(new)[name])
            outputs = as_list(case.call(inputs, variant))
            torch.cuda._sleep(20_000_000)
            grads = torch.autograd.grad(outputs, list(wanted.values()), upstream)
            torch.cuda.current_stream().synchronize()
        got = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
        got |= dict(zip(wanted, grads, strict=True))
        assert_same(got, expected, f"{case.name}/{variant.name}")


@every_case
def test_devices_are_not_mixed(case: OpCase) -> None:
    """Any one tensor left on the CPU is a ValueError naming both devices.

    A tensor avg_factor alone may be anywhere: torch divides by it outside of the op.
    """
    for variant in case.variants:
        inputs = case.make(variant, sizes_of(case)[0], device="cuda", requires_grad=False)
        for name in leaves(inputs):
            if name == "avg_factor":
                continue
            mixed = map_tensors(lambda x: x, inputs)
            if "[" in name:
                listed, index = name[:-1].split("[")
                mixed[listed][int(index)] = mixed[listed][int(index)].cpu()
            else:
                mixed[name] = mixed[name].cpu()
            with pytest.raises(ValueError) as info:
                case.call(mixed, variant)
            for word in ("cpu", "cuda:0"):
                assert word in str(info.value), f"{variant.name} {name}: {info.value}"


@pytest.mark.require("two_gpus")
@every_case
def test_runs_where_its_tensors_are(case: OpCase) -> None:
    """On the second GPU while the first is the current one."""
    for variant in case.variants:
        for size in sizes_of(case):
            expected = results(case, case.make(variant, size, device="cuda:0"), variant)
            with torch.cuda.device(0):
                inputs = case.make(variant, size, device="cuda:1")
                got = results(case, inputs, variant)
                assert torch.cuda.current_device() == 0
            assert all(value.device == torch.device("cuda:1") for value in got.values())
            assert_same(got, expected, f"{case.name}/{variant.name} {size}")


@contextlib.contextmanager
def little_memory(more: int) -> Iterator[None]:
    """Let this process have no more than ``more`` bytes beyond what it has."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("phase", ["forward", "backward"])
@every_case
def test_out_of_memory_leaves_torch_usable(case: OpCase, phase: str) -> None:
    """It is an exception, and the next call, with memory there, gives the right result."""
    if case.is_loss:
        size: Any = (10_000_000,)  # 40 MB a loss: more than torch's allocator may have left over
        variant = Variant("none", {} if case.name == "aligned_box_iou" else {"reduction": "none"})
    else:
        size = (40, 250_000) if case.name == "fake_quant" else ((40, 250_000), (3, 5))
        variant = case.variant("per_channel_axis0")
    inputs = case.make(variant, size, device="cuda")
    wanted = list(differentiable(case, inputs).values())
    upstream = upstream_for(as_list(case.call(inputs, variant)))
    outputs = as_list(case.call(inputs, variant)) if phase == "backward" else []
    with little_memory(2**22), pytest.raises(RuntimeError):
        if phase == "forward":
            case.call(inputs, variant)
        else:
            torch.autograd.grad(outputs, wanted, upstream)
    torch.cuda.synchronize()
    small = case.make(variant, sizes_of(case)[0], device="cuda")
    check(case, small, variant, what="after running out of memory")
    again = as_list(case.call(inputs, variant))
    for gradient, tensor in zip(torch.autograd.grad(again, wanted, upstream), wanted, strict=True):
        assert gradient.shape == tensor.shape and gradient.isfinite().all()
