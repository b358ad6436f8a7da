"""The ops inside CUDA graphs and torch.compile, and how many kernels they launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import hqod_ops
from hqod_ops.testing.cases import CASES, OpCase, Variant, differentiable, leaves
from hqod_ops.testing.oracle import as_list, assert_close, assert_same_bits, run, upstream_for

pytestmark = pytest.mark.require("ext", "cuda")
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def sizes_of(case: OpCase) -> tuple[Any, ...]:
    """One block of work, and many."""
    if case.is_loss:
        return (129,), (40_000,)
    if case.name == "fake_quant":
        return (16, 8, 3, 3), (64, 33, 27, 27)
    return ((4, 3, 3, 3), (5, 4), (7, 2)), ((64, 33, 3, 3), (301, 500), (7, 2, 3))


@every_case
def test_captured_in_a_cuda_graph(case: OpCase) -> None:
    """One capture of forward and backward, replayed with other inputs, gives their results."""
    for variant in case.variants:
        for size in sizes_of(case):
            what = f"{case.name}/{variant.name} {size}"
            inputs = case.make(variant, size, device="cuda")
            wanted = differentiable(case, inputs)
            upstream = upstream_for(as_list(case.call(inputs, variant)))

            def step(
                inputs: Any = inputs, wanted: Any = wanted, upstream: Any = upstream
            ) -> list[Tensor]:
                outputs = as_list(case.call(inputs, variant))  # noqa: B023
                return [*outputs, *torch.autograd.grad(outputs, list(wanted.values()), upstream)]

            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                captured = step()
            for seed in (1, 2, 1):
                new = case.make(variant, size, device="cuda", seed=seed)
                with torch.no_grad():
                    for name, tensor in leaves(inputs).items():
                        tensor.copy_(leaves(new)[name])
                    for y in captured:
                        y.fill_(float("nan"))
                graph.replay()
                outputs, grads = run(case.call, case, new, variant, upstream)
                for got, want in zip(captured, [*outputs, *grads.values()], strict=True):
                    assert_same_bits(got.detach(), want, f"{what}, seed {seed}")


@every_case
def test_inductor_whole(case: OpCase) -> None:
    """torch.compile's default backend, without graph breaks, and with its own CUDA graphs."""
    for variant in (case.variants[0], case.variants[-1]):
        size = sizes_of(case)[0]
        inputs = case.make(variant, size, device="cuda")
        expected, expected_grads = run(case.call, case, inputs, variant)
        for mode in ("default", "reduce-overhead"):
            torch._dynamo.reset()

            def function(variant: Variant = variant, **given: Any) -> Any:
                return case.function(**given, **variant.kwargs)

            compiled = torch.compile(function, fullgraph=True, mode=mode)
            for _ in range(3):  # with CUDA graphs: a warm-up, the recording, a replay
                torch.compiler.cudagraph_mark_step_begin()
                outputs, grads = run(lambda i, v: compiled(**i), case, inputs, variant)  # noqa: B023
                for y, want in zip(outputs, expected, strict=True):
                    assert_close(y, want.double(), f"{variant.name} {mode}")
                for name, gradient in grads.items():
                    want = expected_grads[name].double()
                    assert_close(gradient, want, f"{variant.name} {mode} d{name}")
                del outputs, grads, y, gradient
    torch._dynamo.reset()


NO_WORK = ("Context Sync", "Stream Sync", "Event Sync", "Activity Buffer", "Lazy Function")
"""What a profiler may list beside kernels, copies and fills."""


def device_work(function: Callable[[], Any]) -> list[str]:
    """The names of the kernels, copies and fills that a call put on the GPU."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        function()
        torch.cuda.synchronize()
    events = [e for e in recorded.events() or [] if e.device_type == DeviceType.CUDA]
    return [e.name for e in events if not any(word in e.name for word in NO_WORK)]


def launches(case: OpCase, variant: Variant, size: Any, dtype: torch.dtype) -> list[list[str]]:
    """The GPU's work in a forward pass and in a backward pass."""
    inputs = case.make(variant, size, dtype, device="cuda")
    wanted = list(differentiable(case, inputs).values())
    outputs = as_list(case.call(inputs, variant))
    upstream = upstream_for(outputs)
    torch.autograd.grad(outputs, wanted, upstream)  # what a first call sets up is not counted
    device_work(torch.cuda.synchronize)
    kept: list[list[Tensor]] = []
    forward = device_work(lambda: kept.append(as_list(case.call(inputs, variant))))
    backward = device_work(lambda: torch.autograd.grad(kept[0], wanted, upstream))
    return [forward, backward]


LAUNCHES: dict[str, tuple[str, str, Any, int, int]] = {
    # case, variant, size, launches forward and backward
    "hqod 16": ("hqod_loss", "default", (16,), 1, 1),
    "hqod 1024": ("hqod_loss", "default", (1024,), 1, 1),
    "hqod 1024 logits": ("hqod_loss", "logits_sum", (1024,), 1, 1),
    "hqod 16384": ("hqod_loss", "default", (16_384,), 2, 1),
    "hqod 1 M": ("hqod_loss", "default", (2**20,), 2, 1),
    "hqod none": ("hqod_loss", "none_options", (2**20,), 1, 1),
    "hiou": ("harmonious_iou_loss", "default", (70_000,), 1, 1),
    "hiou mean": ("harmonious_iou_loss", "mean_gamma0", (70_000,), 2, 1),
    "tcorr sum": ("tcorr_loss", "geometric_sum", (70_000,), 2, 1),
    "iou": ("aligned_box_iou", "default", (70_000,), 1, 1),
    "tensor": ("fake_quant", "per_tensor", (8, 64, 32, 32), 1, 2),
    "tensor, zero point": ("fake_quant", "per_tensor_zero_point", (8, 64, 32, 32), 1, 2),
    "outermost": ("fake_quant", "per_channel_axis0", (256, 256, 3, 3), 1, 2),
    "outermost, zero point": ("fake_quant", "per_channel_axis0_zero_point", (64, 99), 1, 2),
    "innermost": ("fake_quant", "per_channel_last_2bit", (512, 256), 1, 2),
    "small": ("fake_quant", "per_tensor", (17,), 1, 2),
    "activation": ("fake_quant", "per_tensor_relu", (8, 64, 32, 32), 1, 2),
    "60 tensors": (
        "fake_quant_foreach",
        "per_channel_axis0",
        tuple((8 + i, 3 + i % 4, 3, 3) for i in range(60)),
        1,
        2,
    ),
    "60 tensors, zero points": (
        "fake_quant_foreach",
        "per_tensor_zero_point",
        tuple((8 + i, 3 + i % 4, 3, 3) for i in range(60)),
        1,
        2,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", LAUNCHES)
def test_number_of_launches(name: str, dtype: torch.dtype) -> None:
    """However many samples, elements, channels or tensors there are."""
    case_name, variant_name, size, most_forward, most_backward = LAUNCHES[name]
    case = CASES[case_name]
    forward, backward = launches(case, case.variant(variant_name), size, dtype)
    assert 1 <= len(forward) <= most_forward, forward
    assert 1 <= len(backward) <= most_backward, backward


def test_half_scales_cost_no_launch() -> None:
    """A float32 scale beside a half x, the case of mixed precision, is read as it is."""
    case = CASES["fake_quant"]
    variant = case.variant("per_tensor_float_scale")
    forward, backward = launches(case, variant, (8, 64, 32, 32), torch.float16)
    assert len(forward) == 1 and len(backward) <= 2, (forward, backward)


class _Step(nn.Module):
    """A quantized layer and its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 5)
        self.weight = hqod_ops.FakeQuant(-8, 7, scale=torch.full((5,), 0.05), ch_axis=0)
        self.input = hqod_ops.FakeQuant(-8, 7, scale=0.3)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        weight, bias = self.weight(self.layer.weight), self.layer.bias
        out = nn.functional.linear(self.input(x), weight, bias)
        return hqod_ops.hqod_loss(target + out[:, :4], target, out[:, 4], logits=True)


def test_a_training_step_in_a_graph() -> None:
    """Layer, loss and optimizer captured as one, with new data for every replay, learn alike.

    The matrix product may take another algorithm in a graph: hence the slack.
    """
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(6):
        corner = torch.rand(64, 2, generator=generator) * 50
        batch = torch.randn(64, 32, generator=generator), torch.cat([corner, corner + 20], dim=1)
        batches.append([tensor.cuda() for tensor in batch])
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(_Step().cuda())
    plain, graphed = models
    start = {name: value.clone() for name, value in plain.state_dict().items()}
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in models]

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, t: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = model(x, t)
        loss.backward()
        optimizer.step()
        return loss

    held = [tensor.clone() for tensor in batches[0]]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(graphed, optimizers[1], *held)
    torch.cuda.current_stream().wait_stream(stream)
    optimizers[1].zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step(graphed, optimizers[1], *held)
    graphed.load_state_dict(start)
    for batch in batches:
        for place, value in zip(held, batch, strict=True):
            place.copy_(value)
        graph.replay()
        expected = step(plain, optimizers[0], *batch)
        assert_close(captured.detach(), expected.detach().double(), "loss", slack=100)
    for name, value in plain.state_dict().items():
        assert_close(graphed.state_dict()[name], value.double(), name, slack=100)
        assert not torch.equal(value, start[name]), f"{name} did not learn"
