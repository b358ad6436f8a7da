"""Activations quantized where they are made, with ReLUs taken in."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hqod_ops import fake_quant
from hqod_ops.quant import (
    QATConfig,
    Quantizer,
    Rule,
    calibrate,
    float_state_dict,
    load_float_state_dict,
    parameter_groups,
    prepare_qat,
    summary,
)
from hqod_ops.quant.dataflow.producers import Placement, place_on_producers, placement

CONFIG = QATConfig(4, 4, first=(), prediction=())


class Block(nn.Module):
    """One ReLU called twice, a residual addition in forward."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.down = nn.Conv2d(channels, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.down(x)
        return self.relu(y)


class Net(nn.Module):
    """Two blocks, a pyramid with functions in forward, and a head shared by three levels."""

    def __init__(self) -> None:
        super().__init__()
        self.repeat = self.reentrant = False
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block1 = Block(4, 6)
        self.block2 = Block(6, 6)
        self.lateral = nn.Conv2d(6, 6, 1)
        self.smooth = nn.Conv2d(6, 6, 3, padding=1)
        self.extra = nn.Conv2d(6, 6, 1)
        self.tower = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU6())
        self.score = nn.Conv2d(6, 2, 1)
        self.box = nn.Conv2d(6, 4, 1)

    def block(self, block: nn.Module, x: Tensor) -> Tensor:
        if not self.repeat or not torch.is_grad_enabled():
            return block(x)  # type: ignore[no-any-return]
        return checkpoint(block, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        c1 = self.block(self.block1, F.relu(self.stem(x)))
        c2 = self.block(self.block2, F.max_pool2d(c1, 2))
        p1 = 1 + 0.5 * (self.lateral(c1) + F.interpolate(c2, scale_factor=2))
        levels = [self.smooth(p1) + p1, self.extra(p1.relu()), c2 + 1]
        towers = [self.tower(level) for level in levels]
        return torch.cat([f(t).flatten(1) for t in towers for f in (self.score, self.box)], dim=1)


def images(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def made(
    model: nn.Module | None = None, config: QATConfig | str = CONFIG, **options: Any
) -> tuple[nn.Module, Placement]:
    """A model with its quantizers placed and calibrated, in training mode."""
    torch.manual_seed(0)
    model = prepare_qat(Net() if model is None else model, config)
    report = place_on_producers(model, **options)
    return calibrate(model, [images(1), images(2)], progress=False).train(), report


def step(model: nn.Module, x: Tensor | None = None) -> list[Tensor]:
    """The output and all gradients."""
    model.zero_grad()
    y = model(images() if x is None else x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters())]  # type: ignore[union-attr]


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def quantized(layer: Any, x: Tensor) -> Tensor:
    """x through the quantizer of a layer's input, in the form of the op without activation."""
    arguments = layer.input_quantizer.arguments()
    return fake_quant(x, **{k: v for k, v in arguments.items() if k != "activation"})


def weight(layer: Any) -> Tensor:
    return layer.quantized_weight()  # type: ignore[no-any-return]


class TestPlacement:
    def test_report(self) -> None:
        _, report = made()
        rows = {entry.readers: (entry.producers, entry.absorbed) for entry in report.placed}
        assert rows == {
            ("block1.conv1", "block1.down"): (("Net:relu#1",), "relu"),
            ("block1.conv2",): (("block1.relu#1",), "relu"),
            ("lateral",): (("block1.relu#2",), "relu"),
            ("block2.conv1", "block2.down"): (("Net:max_pool2d",), None),
            ("block2.conv2",): (("block2.relu#1",), "relu"),
            ("smooth",): (("Net:add#2",), None),
            ("extra",): (("Net:relu#2",), "relu"),
            ("score", "box"): (("tower.1",), "relu6"),
        }
        assert report.sole_readers == ("tower.0",)
        assert report.not_placed == {"stem": "they read an argument of Net"}
        assert not report.untraced
        text = str(report)
        for piece in ("block1.relu#1", "relu6", "tower.0", "an argument of Net"):
            assert piece in text

    def test_every_reader_sees_the_quantized_tensor(self) -> None:
        """The whole network, written out with the pair of ReLU and fake_quant at each producer."""
        model, _ = made()
        ours = step(model)
        assert isinstance(model, Net)

        def conv(layer: Any, x: Tensor, **options: Any) -> Tensor:
            return F.conv2d(x, weight(layer), layer.bias, **options)

        def block(m: Any, x: Tensor) -> Tensor:
            y = quantized(m.conv2, F.relu(m.bn1(conv(m.conv1, x, padding=1))))
            return F.relu(m.bn2(conv(m.conv2, y, padding=1)) + conv(m.down, x))

        model.zero_grad()
        m: Any = model
        x = conv(m.stem, quantized(m.stem, images()), padding=1)
        c1 = quantized(m.lateral, block(m.block1, quantized(m.block1.conv1, F.relu(x))))
        c2 = block(m.block2, quantized(m.block2.conv1, F.max_pool2d(c1, 2)))
        p1 = quantized(m.smooth, 1 + 0.5 * (conv(m.lateral, c1) + F.interpolate(c2, None, 2)))
        levels = [conv(m.smooth, p1, padding=1) + p1]
        levels += [conv(m.extra, quantized(m.extra, p1.relu())), c2 + 1]
        outputs = []
        for index, level in enumerate(levels):
            first, second = m.tower[0].input_quantizer, m.score.input_quantizer
            arguments = second.arguments(index)
            arguments.pop("activation", None)
            x = fake_quant(level, **first.arguments(index))
            x = fake_quant(F.relu6(conv(m.tower[0], x, padding=1)), **arguments)
            outputs += [conv(layer, x).flatten(1) for layer in (m.score, m.box)]
        y = torch.cat(outputs, dim=1)
        y.square().sum().backward()
        expected = [y.detach(), *(p.grad for p in model.parameters())]
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("absorb", [True, False])
    def test_each_tensor_is_quantized_once(self, absorb: bool) -> None:
        model, report = made(absorb_relu=absorb)
        inputs = {name: q for name, q in model.named_modules() if name.endswith("input_quantizer")}
        calls: list[str] = []
        for name, quantizer in inputs.items():
            quantizer.register_forward_hook(lambda *_, name=name: calls.append(name))
        model(images())
        # Of the 13 layers, three share the quantizer of another; two have three levels.
        assert len(inputs) == 10 and len(calls) == 14 and len(set(calls)) == 10
        assert all((entry.absorbed is None) or absorb for entry in report.placed)

    def test_signs_are_those_of_what_is_quantized(self) -> None:
        model, _ = made()
        signs = {row.name: row.act_signed for row in summary(model)}
        assert signs["block1.conv2"] == (False,) and signs["score"] == (False,) * 3
        assert signs["stem"] == (True,)
        assert signs["box"] == signs["score"]

    def test_skip(self) -> None:
        model, report = made(skip=["block1.down", "tower.*"])
        assert report.not_placed["block1.conv1"] == report.not_placed["block1.down"] == "asked for"
        assert "tower.0" in report.not_placed
        assert {"lateral"} <= {entry.readers[0] for entry in report.placed}
        assert model.block1.conv1.input_quantizer is not model.block1.down.input_quantizer  # type: ignore[union-attr]

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="expected a model from prepare_qat"):
            place_on_producers(Net())
        model = prepare_qat(Net(), CONFIG)
        with pytest.raises(ValueError, match=r"skip: no layer .* 'towers.*'"):
            place_on_producers(model, skip="towers.*")
        calibrate(model, [images()], progress=False)
        with pytest.raises(ValueError, match="expected one that is not calibrated yet, 'stem' is"):
            place_on_producers(model)
        model, _ = made()
        with pytest.raises(ValueError, match="not placed on producers yet"):
            place_on_producers(model)

    def test_report_is_kept(self) -> None:
        model, report = made()
        assert placement(model) == placement(copy.deepcopy(model)) == report
        assert placement(prepare_qat(Net(), CONFIG)) == Placement()


class TestState:
    def test_float_checkpoints_go_in_and_out(self) -> None:
        plain = Net()
        keys = list(plain.state_dict())
        model, _ = made(copy.deepcopy(plain))
        assert list(float_state_dict(model)) == keys
        assert {name for name, _ in plain.named_modules()} <= {n for n, _ in model.named_modules()}
        other, _ = made()
        load_float_state_dict(other, plain.state_dict())
        Net().load_state_dict(float_state_dict(other))
        assert all(torch.equal(plain.state_dict()[k], float_state_dict(other)[k]) for k in keys)

    def test_state_dict_has_each_scale_once(self) -> None:
        model, _ = made()
        keys = [key for key in model.state_dict() if key.endswith("input_quantizer.scale")]
        assert "block1.conv1.input_quantizer.scale" in keys
        assert "block1.down.input_quantizer.scale" not in keys and len(keys) == 10
        assert len(parameter_groups(model, 0.0)[1]["params"]) == 10 + 13
        fresh = prepare_qat(Net(), CONFIG)
        place_on_producers(fresh)
        fresh.load_state_dict(model.state_dict())
        assert_same(step(fresh.train()), step(model))

    @pytest.mark.parametrize(
        "twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copied", "pickled"]
    )
    def test_copies_are_on_their_own(self, twin: Callable[[nn.Module], nn.Module]) -> None:
        model, _ = made()
        expected = step(model)
        other = twin(model)
        assert_same(step(other), expected)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(2)
        assert_same(step(model), expected)


class TestRunning:
    def test_eval_mode_is_the_same_function(self) -> None:
        model, _ = made()
        y = model.eval()(images())
        with torch.no_grad():
            assert torch.equal(model(images()), y)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing(self, reentrant: bool) -> None:
        net = Net()
        net.repeat, net.reentrant = True, reentrant
        model, report = made(net)
        assert report == made()[1]
        repeated = step(model)
        net.repeat = False
        for a, b in zip(repeated, step(model), strict=True):
            torch.testing.assert_close(a, b)

    def test_distributed_data_parallel(self) -> None:
        model, _ = made()
        expected = step(model)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            wrapped = nn.parallel.DistributedDataParallel(model)
            assert_same(step(wrapped), expected)
        finally:
            dist.destroy_process_group()

    def test_autocast(self) -> None:
        model, _ = made()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(images())
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())  # type: ignore[arg-type]

    def test_a_failed_pass_leaves_nothing_behind(self) -> None:
        model, _ = made()
        expected = step(model)
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 3, 7, 7))  # levels do not fit: fails between the producers
        assert_same(step(model), expected)

    def test_compile(self) -> None:
        chain = Chain(lambda m, x: F.relu(1 + x))
        model, report = made(nn.Sequential(Block(3, 3), chain))
        assert [entry.absorbed for entry in report.placed] == ["relu"] * 3
        expected = step(model)
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for _ in range(3):
            for a, b in zip(expected, step(compiled), strict=True):
                torch.testing.assert_close(a, b)
        assert counter.frame_count == 1

    def test_export(self) -> None:
        model, _ = made()
        model.eval()
        program = torch.export.export(model, (images(),), strict=False)
        torch.testing.assert_close(program.module()(images(3)), model(images(3)))

    def test_disabled_quantizers_leave_the_float_model(self) -> None:
        plain = Net().eval()
        model, _ = made(copy.deepcopy(plain))
        for module in model.modules():
            if isinstance(module, Quantizer):
                module.enabled = False
        assert torch.equal(model.eval()(images()), plain(images()))

    def test_foreach(self) -> None:
        config = QATConfig(4, 4, first=(), prediction=(), foreach=True)
        for a, b in zip(step(made(config=config)[0]), step(made()[0]), strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("name", ["lsq", "lsq_plus", "pact", "dsq"])
    def test_quantizers(self, name: str) -> None:
        """One that cannot take a ReLU in gets its result."""
        config = QATConfig(4, 4, first=(), prediction=(), act_quantizer=name, act_init="minmax")
        pair, _ = made(config=config, absorb_relu=False)
        for a, b in zip(step(made(config=config)[0]), step(pair), strict=True):
            torch.testing.assert_close(a, b)


def left(model: nn.Module, config: QATConfig = CONFIG) -> dict[str, str]:
    return dict(place_on_producers(prepare_qat(model, config)).not_placed)


class Chain(nn.Module):
    """A convolution, what is tested, and two convolutions that read its result."""

    def __init__(self, between: Callable[[Chain, Tensor], Tensor]) -> None:
        super().__init__()
        self.between = between
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.relu = nn.ReLU(inplace=True)
        self.flag = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self, self.first(x))
        return self.second(x) + self.third(x)


class TestCode:
    @pytest.mark.parametrize(
        ("between", "producer", "absorbed"),
        [
            (lambda m, x: m.relu(x), "relu", "relu"),
            (lambda m, x: F.relu(x, inplace=True), "Chain:relu", "relu"),
            (lambda m, x: x.relu(), "Chain:relu", "relu"),
            (lambda m, x: torch.relu_(x), "Chain:relu", "relu"),
            (lambda m, x: F.relu6(input=x), "Chain:relu6", "relu6"),
            (lambda m, x: F.hardswish(x), "Chain:hardswish", None),
            (lambda m, x: x + m.relu(x.clone()), "Chain:add#1", None),
            (lambda m, x: F.relu(1 + x - 0.1 * x.shape[0] * (x.size(1) + 1)), "Chain:relu", "relu"),
            (lambda m, x: torch.cat([x, x])[: 1 * x.size(0)] * 1, "Chain:mul", None),
            # The ReLU changes x, which is read again: it must be run.
            (lambda m, x: m.relu(x) * 1 + x, "Chain:add#1", None),
        ],
        ids=range(10),
    )
    def test_functions(self, between: Any, producer: str, absorbed: str | None) -> None:
        model, report = made(Chain(between))
        (entry,) = report.placed
        assert entry.producers == (producer,) and entry.absorbed == absorbed
        m: Any = model
        ours = step(model)
        model.zero_grad()
        x = F.conv2d(quantized(m.first, images()), weight(m.first), m.first.bias)
        x = quantized(m.second, between(m, x) if producer != "relu" else F.relu(x))
        y = F.conv2d(x, weight(m.second), m.second.bias)
        y = y + F.conv2d(x, weight(m.third), m.third.bias)
        y.square().sum().backward()
        for a, b in zip(ours, [y.detach(), *(p.grad for p in m.parameters())], strict=True):
            torch.testing.assert_close(a, b)

    def test_an_in_place_relu_whose_input_is_read_again_is_run(self) -> None:
        def between(m: Chain, x: Tensor) -> Tensor:
            y = m.relu(x)
            m.kept = x  # type: ignore[assignment]
            return y if m.flag else y + 0 * x

        class Rereading(Chain):
            def forward(self, x: Tensor) -> Tensor:
                x = self.first(x)
                y = self.relu(x)
                return self.second(y) + self.third(y) + x

        model, report = made(Rereading(between))
        (entry,) = report.placed
        assert entry.producers == ("relu",) and entry.absorbed is None
        m: Any = model
        x = F.relu(F.conv2d(quantized(m.first, images()), weight(m.first), m.first.bias))
        z = quantized(m.second, x)
        expected = F.conv2d(z, weight(m.second), m.second.bias) + x
        expected = expected + F.conv2d(z, weight(m.third), m.third.bias)
        torch.testing.assert_close(model(images()), expected)

    @pytest.mark.parametrize(
        ("between", "reason"),
        [
            (lambda m, x: x if x.sum() > 0 else -x, "cannot be traced"),
            (lambda m, x: x.chunk(1)[0], "an item of another value"),
            (lambda m, x: m.first.weight.sum(0)[None] * 0 + x.add_(1) * 0 + x, "changed in place"),
            (lambda m, x: x.sub_(1) * 0 + 1 if m.training else x, "training"),
        ],
        ids=["data", "item", "in place", "mode"],
    )
    def test_what_is_left(self, between: Any, reason: str) -> None:
        if reason == "changed in place":

            class Changing(Chain):
                def forward(self, x: Tensor) -> Tensor:
                    x = self.first(x)
                    x.add_(1)
                    return self.second(x) + self.third(x)

            found = left(Changing(between))
        else:
            found = left(Chain(between))
        assert set(found) == {"first", "second", "third"}
        assert reason in found["second"] and found["second"] == found["third"]

    def test_layers_that_differ_keep_their_own(self) -> None:
        def between(m: Chain, x: Tensor) -> Tensor:
            return m.relu(x)  # type: ignore[no-any-return]

        found = left(Chain(between), QATConfig(4, 4, first=(), prediction="third"))
        assert found["second"] == "second and third quantize the same tensor otherwise"
        rules = [Rule("third", act_bits=32)]
        found = left(Chain(between), QATConfig(4, 4, first=(), prediction=(), overrides=rules))
        assert found["second"] == "third reads the same tensor in float"
        rules = [Rule("third", skip=True)]
        found = left(Chain(between), QATConfig(4, 4, first=(), prediction=(), overrides=rules))
        assert found["second"] == "third reads the same tensor in float"

    def test_a_relu_of_several_modules_becomes_one_for_each(self) -> None:
        relu = nn.ReLU()
        towers = [nn.Sequential(nn.Conv2d(3, 3, 1), relu, nn.Conv2d(3, 3, 1)) for _ in range(2)]
        model = nn.Sequential(*towers)
        assert not {"0.2", "1.2"} & set(left(model))
        assert model[0][1] is relu and model[1][1] is not relu

    def test_calibration_finds_what_a_trace_got_wrong(self) -> None:
        def between(m: Chain, x: Tensor) -> Tensor:
            y = m.relu(x)
            return 2 * x if m.flag else y  # type: ignore[no-any-return]

        model = prepare_qat(Chain(between), CONFIG)
        place_on_producers(model)
        model.flag = True
        with pytest.raises(RuntimeError, match="second: expected an input from relu, as when"):
            calibrate(model, [images()], progress=False)

    def test_tracing_leaves_no_trace(self) -> None:
        """Neither in the attributes that a forward pass sets, nor in the modes of modules."""

        class Counting(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("count", torch.zeros(()))

            def forward(self, x: Tensor) -> Tensor:
                self.count += 1  # type: ignore[operator]
                return x + 1

        def between(m: Any, x: Tensor) -> Tensor:
            m.cache = x
            m.seen.append(x)
            m.table["x"] = x
            return m.counting(x)  # type: ignore[no-any-return]

        model: Any = Chain(between)
        model.seen, model.table, model.counting = [1], {"y": 2}, Counting()
        model.relu.eval()
        hooked: list[Any] = []
        model.counting.register_forward_hook(lambda *args: hooked.append(args))
        report = place_on_producers(prepare_qat(model, CONFIG))
        assert report.placed[0].producers == ("counting",)
        assert "cache" not in vars(model) and model.seen == [1] and model.table == {"y": 2}
        assert model.training and not model.relu.training
        assert model.counting.count == 0 and not hooked
