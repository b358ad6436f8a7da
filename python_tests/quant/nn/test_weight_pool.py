"""All weights quantized together: the same results, once a pass, and nothing is left behind."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import hqod_ops.quant.nn.weight_pool
from hqod_ops.quant import QATConfig, Rule, calibrate, parameter_groups, prepare_qat
from hqod_ops.quant.quantizers.registry import QUANTIZERS
from python_tests.quant.nn.test_level_norm import Pyramid

WEIGHT_QUANTIZERS = [name for name, kind in QUANTIZERS.items() if "weight" in kind.roles]


class Net(nn.Module):
    """Every kind of layer; one of them is skipped when asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.side = nn.Conv2d(4, 4, 1)
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2)
        self.out = nn.Linear(6, 2)
        self.skip = False
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if not self.skip:
            x = x + self.side(x)
        if self.fail:
            raise KeyError("in the middle")
        return self.out(self.up(x.relu()).mean(dim=(2, 3)))


def image(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def made(foreach: bool, model: Callable[[], nn.Module] = Net, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = QATConfig(**{"first": (), "prediction": (), "foreach": foreach, **settings})
    return calibrate(prepare_qat(model(), config), [image(1)], progress=False)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def step(model: nn.Module, x: Tensor | None = None) -> list[Tensor | None]:
    model.zero_grad()
    y = model(image() if x is None else x)
    y.square().sum().backward()
    return [y.detach(), *gradients(model).values()]


def same(one: list[Tensor | None], other: list[Tensor | None]) -> bool:
    return all(
        a is b if a is None or b is None else torch.equal(a, b)
        for a, b in zip(one, other, strict=True)
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of weights in every call of the op."""
    found: list[int] = []
    op = hqod_ops.quant.nn.weight_pool.fake_quant_foreach

    def counting(xs: list[Tensor], *args: Any, **kwargs: Any) -> list[Tensor]:
        found.append(len(xs))
        return op(xs, *args, **kwargs)

    monkeypatch.setattr(hqod_ops.quant.nn.weight_pool, "fake_quant_foreach", counting)
    return found


@pytest.mark.parametrize("name", WEIGHT_QUANTIZERS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_results_are_those_of_one_by_one(name: str, per_channel: bool) -> None:
    settings = {"weight_quantizer": name, "per_channel": per_channel}
    assert same(step(made(False, **settings)), step(made(True, **settings)))


def test_one_call_a_step(calls: list[int]) -> None:
    model = made(True, overrides=[Rule("out", weight_bits=8)])
    step(model)
    assert calls == [4]
    step(model)
    assert calls == [4, 4]
    # Another axis, other gradients, another quantizer: a call each, or none.
    calls.clear()
    rules = [
        Rule("up", per_channel=True),
        Rule("side", weight_options={"grad_scale": 1.0}),
        Rule("out", weight_quantizer="dsq"),
    ]
    step(made(True, overrides=rules))
    assert calls == [1, 1, 1]
    step(made(False))
    assert len(calls) == 3


def test_a_skipped_layer_has_no_gradient() -> None:
    models = [made(False), made(True)]
    for model in models:
        model.skip = True
    one, together = (step(model) for model in models)
    assert same(one, together)
    assert gradients(models[1])["side.weight"] is None
    assert gradients(models[1])["side.weight_quantizer.scale"] is None


def test_two_passes_before_one_backward_pass() -> None:
    results = []
    for foreach in (False, True):
        model = made(foreach)
        first = model(image(1))
        model.skip = True
        (first + model(image(2))).sum().backward()
        results.append(list(gradients(model).values()))
    for one, together in zip(*results, strict=True):
        torch.testing.assert_close(one, together)
    assert all(gradient is not None for gradient in results[0])


def test_parts_and_failures_meet_no_old_weights() -> None:
    model = made(True)
    x = torch.randn(1, 4, 8, 8)
    model(image())
    before = model.side(x)
    with torch.no_grad():
        model.side.weight.add_(0.5)
    assert not torch.equal(model.side(x), before)
    model.fail = True
    with pytest.raises(KeyError):
        model(image())
    after = model.side(x)
    with torch.no_grad():
        model.side.weight.sub_(0.5)
    assert not torch.equal(model.side(x), after)
    model.fail = False
    torch.testing.assert_close(model(image()), made(False)(image()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("amp", [False, True])
def test_training_is_the_same(amp: bool) -> None:
    results = []
    for foreach in (False, True):
        model = made(foreach)
        optimizer = torch.optim.SGD(parameter_groups(model, weight_decay=1e-4), lr=0.01)
        for index in range(4):
            model.skip = index == 2
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                loss = model(image(index)).square().mean()
            loss.backward()
            optimizer.step()
        results.append(model.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_switched_off_and_on(frozen: bool) -> None:
    class Switching(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.set_grad_enabled(self.skip):
                x = self.stem(x)
            with torch.enable_grad():
                return self.out(self.up(x).mean(dim=(2, 3)))

    for outer in (False, True):
        results = []
        for foreach in (False, True):
            model = made(foreach, Switching, overrides=[Rule("side", skip=True)])
            model.out.weight.requires_grad_(not frozen)
            with torch.set_grad_enabled(outer):
                y = model(image())
            y.sum().backward()
            results.append([y.detach(), *gradients(model).values()])
        assert same(*results)
        assert results[0][1] is None
        assert model.out.weight_quantizer.scale.grad is not None


@pytest.mark.parametrize("repeat", ["none", "level", "level, reentrant", "head"])
def test_shared_layers_and_activation_checkpointing(repeat: str, calls: list[int]) -> None:
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    one, together = (step(made(foreach, lambda: Pyramid(repeat)), x) for foreach in (False, True))
    assert calls[-1] == 3
    for expected, got in zip(one, together, strict=True):
        # The sum over levels is taken before the gradient of the weight's quantizer, not after.
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backward", [False, True])
def test_copies_of_a_model_that_has_run(backward: bool) -> None:
    model = made(True)
    expected = step(model)
    if not backward:
        model(image())
    keys = set(made(False).state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            twin.side.weight.add_(0.5)
        assert same(step(model), expected)
        assert not same(step(twin), expected)
        assert set(twin.state_dict()) == keys
    fresh = made(True)
    fresh.load_state_dict(model.state_dict())
    assert same(step(fresh), expected)


def test_moving_average_of_a_model() -> None:
    results = []
    for foreach in (False, True):
        model = made(foreach)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(3):
            step(model)
            optimizer.step()
            average.update_parameters(model)
        results.append(average(image()))
    assert torch.equal(*results)


def test_weights_that_are_not_quantized_now() -> None:
    model = made(True, overrides=[Rule("up", weight_bits=32)])
    model.side.weight_quantizer.enabled = False
    other = made(False, overrides=[Rule("up", weight_bits=32)])
    other.side.weight_quantizer.enabled = False
    assert same(step(model), step(other))
    fresh = prepare_qat(Net(), QATConfig(4, 32, first=(), prediction=(), foreach=True))
    with pytest.raises(RuntimeError, match=r"stem\.weight_quantizer.*never calibrated"):
        fresh(image())


@pytest.mark.require("ext")  # whose op is to be seen in the graph
def test_compiled_without_a_break() -> None:
    model = made(True, Pyramid)
    x = torch.randn(2, 3, 16, 16)
    expected = step(model, x)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(3):
        for eager, got in zip(expected, step(compiled, x), strict=True):
            torch.testing.assert_close(got, eager)
    assert counter.frame_count == 2  # the weights, and the forward pass
    nodes = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert nodes.count("hqod.fake_quant_foreach.default") == 1


@pytest.mark.require("ext")  # whose op is to be seen in the graph
def test_exported() -> None:
    model = made(True).eval()
    program = torch.export.export(model, (image(),))
    assert torch.equal(program.module()(image(2)), model(image(2)))
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("hqod.fake_quant_foreach.default") == 1
