"""How the ops sit in autograd: what they save, second derivatives, determinism, memory."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hqod_ops
from hqod_ops import FakeQuant, HarmoniousIoULoss, HQODLoss, TCorrLoss, fake_quant, hqod_loss
from hqod_ops.testing.cases import CASES, DTYPES, HALF, OpCase, Variant, differentiable, leaves
from hqod_ops.testing.device import DEVICE
from hqod_ops.testing.oracle import (
    as_list,
    assert_close,
    assert_same_bits,
    check,
    run,
    upstream_for,
)

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
native = pytest.mark.require("ext")


def size_of(case: OpCase) -> tuple[Any, ...]:
    """A size with several blocks of work."""
    if case.is_loss:
        return (20011,)
    return (64, 33, 7, 7) if case.name == "fake_quant" else ((64, 33, 3, 3), (301, 50), (7, 2, 3))


@native
@every_case
def test_nothing_is_saved_beyond_the_inputs(case: OpCase) -> None:
    """What autograd keeps is the inputs' own memory, or a scalar's: backward recomputes.

    A reduced loss may keep its gradients instead: then it makes no others in backward.
    """
    for variant in case.variants:
        inputs = case.make(variant, size_of(case))
        own = {x.untyped_storage().data_ptr() for x in leaves(inputs).values()}
        saved: list[Tensor] = []

        def pack(x: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            outputs = case.call(inputs, variant)
        extra = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved
                 if x.untyped_storage().data_ptr() not in own}  # fmt: skip
        # A learned weight is multiplied outside of the fused op, whose product keeps its factors;
        # integer zero points are converted and a tensor avg_factor divided by, a few bytes each.
        allowed = 64 * len(as_list(outputs))
        if "int_zero_point" in variant.optional:
            allowed += sum(4 * v.numel() for v in leaves(inputs).values() if v.dtype == torch.int32)
        if case.is_loss and next(x for x in as_list(outputs)).dim() == 0:
            allowed += sum(x.nbytes for x in differentiable(case, inputs).values())
        if "weight" in variant.optional:
            allowed += 4 * inputs["weight"].numel()
        assert sum(extra.values()) <= allowed, f"{variant.name}: {extra}"


@native
@every_case
def test_second_derivative_is_refused(case: OpCase) -> None:
    """create_graph works; differentiating the gradient raises, for every input: no silent 0."""
    for variant in case.variants:
        inputs = case.make(variant, case.sizes[0] if not case.is_loss else (33,))
        wanted = differentiable(case, inputs)
        outputs = as_list(case.call(inputs, variant))
        upstream = [g.requires_grad_() for g in upstream_for(outputs)]
        fused = [x for name, x in wanted.items() if name not in ("weight", "avg_factor")]
        first = torch.autograd.grad(outputs, fused, upstream, create_graph=True)
        _, plain = run(case.call, case, inputs, variant, [g.detach() for g in upstream])
        for gradient, x in zip(first, fused, strict=True):
            name = next(n for n, y in wanted.items() if y is x)
            assert_close(gradient.detach(), plain[name].double(), f"{variant.name} {name}")
        for x in (*fused, *upstream):
            with pytest.raises(RuntimeError, match="not differentiable twice"):
                torch.autograd.grad([g.sum() for g in first], x, retain_graph=True,
                                    allow_unused=True)  # fmt: skip


@native
@every_case
def test_first_derivative_is_the_same_along_every_path(case: OpCase) -> None:
    """Twice with retain_graph, with create_graph, under any upstream; a freed graph is refused."""
    for variant in case.variants:
        inputs = case.make(variant, case.sizes[0] if not case.is_loss else (33,))
        wanted = list(differentiable(case, inputs).values())
        for factor in (1.0, -2.5):
            outputs = as_list(case.call(inputs, variant))
            upstream = [torch.full_like(y, factor) for y in outputs]
            retained, again, last = (
                torch.autograd.grad(outputs, wanted, upstream, retain_graph=retain)
                for retain in (True, True, False)
            )
            fresh = as_list(case.call(inputs, variant))
            created = torch.autograd.grad(fresh, wanted, upstream, create_graph=True)
            names = list(differentiable(case, inputs))
            for name, *found in zip(names, retained, again, last, created, strict=True):
                what = f"{variant.name} upstream {factor} d{name}"
                assert_same_bits(found[1], found[0], what)
                assert_same_bits(found[2], found[0], what)
                assert found[3].requires_grad, what
                assert_close(found[3].detach(), found[0].double(), what)
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                torch.autograd.grad(outputs, wanted, upstream)


@native
@every_case
def test_forward_mode_is_refused(case: OpCase) -> None:
    """An error, where an op without a rule for tangents would give zeros."""
    inputs = {
        name: [y.detach() for y in x] if isinstance(x, list) else x.detach()
        for name, x in case.make(case.variants[0], case.sizes[0]).items()
    }
    first = next(iter(inputs))

    def call(x: Tensor) -> Tensor:
        changed = [x, *inputs[first][1:]] if isinstance(inputs[first], list) else x
        return as_list(case.call({**inputs, first: changed}, case.variants[0]))[0]

    x = inputs[first][0] if isinstance(inputs[first], list) else inputs[first]
    with pytest.raises(RuntimeError, match="functorch transforms|implement the jvp"):
        torch.func.jvp(call, (x,), (torch.ones_like(x),))


@native
@pytest.mark.cpu_kernels
@every_case
def test_same_bits_for_any_number_of_threads(case: OpCase) -> None:
    for dtype in DTYPES:
        for variant in case.variants:
            inputs = case.make(variant, size_of(case), dtype)
            expected = None
            for threads in (1, 2, 4, 3, 1):
                torch.set_num_threads(threads)
                outputs, grads = run(case.call, case, inputs, variant)
                results = [*outputs, *grads.values()]
                expected = expected or results
                for got, want in zip(results, expected, strict=True):
                    what = f"{variant.name} {dtype}, {threads} threads"
                    assert torch.equal(got, want), what


def peak_bytes(function: Any) -> int:
    """The most memory that a call holds at any moment beyond what was there before."""
    if DEVICE.type == "cuda":
        function()  # what a first call sets up is not counted
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        function()
        return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], profile_memory=True) as profile:
        result = function()
    del result
    now = peak = 0
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@native
def test_memory_of_fake_quant() -> None:
    """Forward and backward hold y and dx beside x: no full-size temporary, in any dense layout."""
    case = CASES["fake_quant"]
    # The partial sums of a GPU's blocks have a size of their own, whatever that of x is.
    shape = (16, 64, 32, 32) if DEVICE.type == "cpu" else (64, 64, 64, 64)
    for layout in ("contiguous", "channels_last", "permuted"):
        for name in ("per_tensor", "per_channel_axis0_zero_point", "per_channel_last_zero_point"):
            variant = case.variant(name)
            inputs = case.make(variant, shape, layout=layout)
            size = inputs["x"].nbytes
            with torch.no_grad():
                forward = peak_bytes(lambda: case.call(inputs, variant))  # noqa: B023
            assert forward <= 1.02 * size, f"{name} {layout}: {forward / size:.2f} tensors"
            dy = torch.rand_like(inputs["x"])

            def both(inputs: Any = inputs, variant: Variant = variant, dy: Tensor = dy) -> Any:
                y = case.call(inputs, variant)
                wanted = list(differentiable(case, inputs).values())
                return y, torch.autograd.grad(y, wanted, dy)

            peak = peak_bytes(both)
            assert peak <= 2.05 * size, f"{name} {layout}: {peak / size:.2f} tensors"


@native
def test_memory_of_the_losses() -> None:
    """The fused loss holds 20 bytes a box: the gradients of pred and scores, no temporaries."""
    case, n = CASES["hqod_loss"], 200_000
    inputs = case.make(case.variants[0], (n,))
    inputs["target"].requires_grad_(False)

    def both() -> Any:
        loss = case.call(inputs, case.variants[0])
        return loss, torch.autograd.grad(loss, list(differentiable(case, inputs).values()))

    assert peak_bytes(both) <= 20.5 * n


class _Net(nn.Module):
    """All the modules in one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.fake_quant = FakeQuant(-8, 7, scale=torch.full((4,), 0.3), zero_point=0.5, ch_axis=1)
        self.fake_quant.zero_point = nn.Parameter(torch.full((4,), 0.5))
        self.hqod, self.tcorr = HQODLoss(logits=True), TCorrLoss(variant="geometric")
        self.hiou = HarmoniousIoULoss(gamma=0.5, reduction="sum")

    def forward(self, pred: Tensor, target: Tensor, logits: Tensor) -> Tensor:
        pred = self.fake_quant(pred)
        ious = hqod_ops.aligned_box_iou(pred, target)
        loss = self.hqod(pred, target, logits) + self.tcorr(logits.sigmoid(), ious)
        return loss + self.hiou(pred, target, torch.full_like(logits, 0.5))


def net_inputs() -> tuple[Tensor, Tensor, Tensor]:
    inputs = CASES["hqod_loss"].make(CASES["hqod_loss"].variant("logits_sum"), (40,))
    return inputs["pred"].detach() / 100, inputs["target"].detach() / 100, inputs["scores"].detach()


def net_gradients(net: nn.Module, **options: Any) -> list[Tensor]:
    pred, target, logits = net_inputs()
    pred.requires_grad_(), logits.requires_grad_()
    loss = (
        checkpoint(net, pred, target, logits, **options) if options else net(pred, target, logits)
    )
    leaves = [pred, logits, *net.parameters()]
    for leaf in leaves:
        leaf.grad = None
    loss.backward()  # reentrant checkpointing knows no torch.autograd.grad
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def test_modules_survive_copies() -> None:
    """deepcopy and pickle give a module with the same options and parameters."""
    net = _Net().to(DEVICE)
    expected = net_gradients(net)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert repr(twin) == repr(net)
        for got, want in zip(net_gradients(twin), expected, strict=True):
            assert_same_bits(got, want, "gradient of a copy")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    net = _Net().to(DEVICE)
    expected = net_gradients(net)
    for got, want in zip(net_gradients(net, use_reentrant=use_reentrant), expected, strict=True):
        assert_same_bits(got, want, "gradient under checkpointing")


@every_case
def test_modules_are_the_functions(case: OpCase) -> None:
    """The module of a variant returns what the function returns."""
    if case.module is None:
        assert case.name in ("aligned_box_iou", "fake_quant", "fake_quant_foreach")
        return
    for variant in case.variants:
        inputs = case.make(variant, (33,))
        got = case.module(variant)(**inputs)
        assert_same_bits(got.detach(), case.call(inputs, variant).detach(), variant.name)


@every_case
def test_autocast(case: OpCase) -> None:
    """Under autocast the losses run in float32 whatever comes in; fake_quant keeps x's dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        for variant in case.variants:
            inputs = case.make(variant, size_of(case) if not case.is_loss else (129,), dtype)
            with torch.autocast(DEVICE.type, torch.bfloat16):
                outputs, grads = run(case.call, case, inputs, variant)
            expected, expected_grads = run(case.call, case, inputs, variant)
            for y, want in zip(outputs, expected, strict=True):
                assert y.dtype == want.dtype
                assert_close(y, want.double(), f"{variant.name} {dtype}")
            for name, grad in grads.items():
                assert grad.dtype == expected_grads[name].dtype
                what = f"{variant.name} {dtype} d{name}"
                assert_close(grad, expected_grads[name].double(), what, slack=2)  # both rounded


def test_autocast_mixes_dtypes() -> None:
    """A head under autocast gives half scores beside float32 boxes, in any combination."""
    case = CASES["hqod_loss"]
    variant = case.variant("weighted")
    inputs = case.make(variant, (129,))
    for dtype in HALF:
        for halves in (("scores",), ("pred",), ("pred", "scores"), ("target", "weight")):
            mixed = {
                name: x.detach().to(dtype if name in halves else x.dtype).requires_grad_()
                for name, x in inputs.items()
            }
            wide = {name: x.detach().float().requires_grad_() for name, x in mixed.items()}
            with torch.autocast(DEVICE.type, dtype):
                outputs, grads = run(case.call, case, mixed, variant)
            expected, expected_grads = run(case.call, case, wide, variant)
            assert_same_bits(outputs[0], expected[0], f"{halves}")
            for name, grad in grads.items():
                assert grad.dtype == mixed[name].dtype
                assert_close(grad, expected_grads[name].double(), f"{halves} d{name}")
    iou_case, tcorr_case = CASES["aligned_box_iou"], CASES["tcorr_loss"]
    for other in (iou_case, tcorr_case, CASES["harmonious_iou_loss"]):
        inputs = other.make(other.variants[0], (9,))
        first = next(iter(inputs))
        inputs[first] = inputs[first].detach().bfloat16().requires_grad_()
        with pytest.raises(TypeError, match="dtype"):
            other.call(inputs, other.variants[0])
        with torch.autocast(DEVICE.type, torch.bfloat16):
            assert other.call(inputs, other.variants[0]).dtype == torch.float32


def test_autocast_of_a_quantized_layer() -> None:
    """float32 weights are quantized in float32, then cast by the layer; the scale still learns."""
    layer, quantizer = nn.Linear(8, 4).to(DEVICE), FakeQuant(-8, 7, scale=0.1).to(DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        weight = quantizer(layer.weight)
        out = nn.functional.linear(torch.randn(2, 8).to(DEVICE), weight)
        again = quantizer(out)
    assert (weight.dtype, out.dtype, again.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    again.sum().backward()
    assert quantizer.scale.grad is not None and quantizer.scale.grad.dtype == torch.float32


@native
@every_case
def test_views_of_the_output_and_in_place_use(case: OpCase) -> None:
    """The output is memory of its own, free to be written; a changed input is noticed."""
    variant = case.variants[0]
    inputs = case.make(variant, case.sizes[-3])
    own = {x.untyped_storage().data_ptr() for x in leaves(inputs).values()}
    outputs = as_list(case.call(inputs, variant))
    assert all(y.untyped_storage().data_ptr() not in own for y in outputs if y.numel())
    with torch.no_grad():
        next(iter(differentiable(case, inputs).values())).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(outputs, list(differentiable(case, inputs).values()),
                            upstream_for(outputs))  # fmt: skip


def test_from_many_python_threads() -> None:
    """Training code calls ops from data and autograd threads at once."""
    from concurrent.futures import ThreadPoolExecutor

    case = CASES["fake_quant"]
    variant = case.variant("per_channel_axis0_zero_point")
    inputs = case.make(variant, (16, 50, 20))
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(check, case, inputs, variant) for _ in range(16)]
        results = [job.result() for job in jobs]
    for _, grads in results[1:]:
        for name, grad in grads.items():
            assert_same_bits(grad, results[0][1][name], name)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_torch_func() -> None:
    """grad, vmap and jacrev; torch loops over a batch by itself."""
    target = torch.tensor([[0.0, 0.0, 4.0, 4.0], [1.0, 1.0, 3.0, 5.0]])
    pred, scores = target + 0.3, torch.tensor([0.3, 0.4])
    leaf = pred.clone().requires_grad_()
    (expected,) = torch.autograd.grad(hqod_loss(leaf, target, scores, reduction="sum"), leaf)

    def loss(p: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return hqod_loss(p, t, s, reduction="sum")

    assert torch.equal(torch.func.grad(loss)(pred, target, scores), expected)
    one = torch.func.grad(lambda p, t, s: loss(p[None], t[None], s[None]))
    assert torch.allclose(torch.func.vmap(one)(pred, target, scores), expected)
    each = torch.func.jacrev(lambda p: hqod_loss(p, target, scores, reduction="none"))(pred)
    assert torch.allclose(each.sum(0), expected)
    steps = torch.tensor([0.1, 0.2])
    ds = torch.func.grad(lambda s: fake_quant(scores, s, quant_min=-8, quant_max=7).sum())
    assert torch.allclose(
        torch.func.vmap(ds)(steps), torch.stack([ds(step) for step in steps]), atol=1e-6
    )
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        torch.func.grad(lambda p: torch.func.grad(loss)(p, target, scores).sum())(pred)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_gradients() -> None:
    pred = torch.tensor([[0.3, 0.3, 4.3, 4.3]], requires_grad=True)
    loss = hqod_loss(pred, torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([0.3]))
    upstream = torch.tensor([1.0, 2.0, -3.0])
    (batched,) = torch.autograd.grad(
        loss, pred, grad_outputs=upstream, is_grads_batched=True, retain_graph=True
    )
    (one,) = torch.autograd.grad(loss, pred)
    assert torch.allclose(batched, upstream[:, None, None] * one)


@native
@pytest.mark.numeric
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", ["fake_quant", "fake_quant_foreach"])
def test_what_is_made_again_is_the_output(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    for variant in case.variants:
        for layout in case.layouts:
            for size in case.sizes[-8:]:
                inputs = case.make(variant, size, dtype, layout)
                ys = as_list(case.call(inputs, variant))
                for y in ys:
                    node = y.grad_fn
                    again = node._forward_cls.make_again(node, y.output_nr)
                    what = f"{name}/{variant.name} {size} {dtype} {layout}"
                    assert not again.requires_grad and again.stride() == y.stride(), what
                    assert_same_bits(again, y.detach(), what)
                torch.autograd.backward(ys, upstream_for(ys))
