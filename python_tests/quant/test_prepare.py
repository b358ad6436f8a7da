"""prepare_qat, calibrate, training, saving and the summary, on a small network."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hqod_ops import fake_quant
from hqod_ops.quant import (
    PRESETS,
    QATConfig,
    QATConv2d,
    QATConvTranspose2d,
    QATLayer,
    QATLinear,
    Rule,
    calibrate,
    load_float_state_dict,
    parameter_groups,
    prepare_qat,
    summary,
)
from hqod_ops.quant.quantizers.lsq import SCALE_MODES


class Net(nn.Module):
    """Every kind of layer, a batch norm and a residual; control flow that tracing would lose."""

    qat_first = "stem"
    qat_prediction = ("head.*",)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=2, padding_mode="circular"), nn.ReLU()
        )
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.head = nn.ModuleDict({"cls": nn.Linear(6, 4), "box": nn.Linear(6, 2)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.body(x) + x
        x = self.up(
            x, output_size=[2 * x.shape[2] + 1, 2 * x.shape[3]] if x.shape[2] > 99 else None
        )
        x = x.relu().mean(dim=(2, 3))
        return torch.cat([self.head["cls"](x), self.head["box"](x)], dim=1)


LAYERS = ["stem", "body.0", "up", "head.cls", "head.box"]


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(count)]


def calibrated(config: QATConfig | str = "hqod_w4a4") -> Net:
    return calibrate(prepare_qat(Net(), config), batches(), progress=False)


def bits(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {row.name: (row.weight_bits, row.act_bits) for row in summary(model)}


@pytest.mark.parametrize(("preset", "body"), [("hqod_w4a4", 4), ("hqod_w2a2", 2), ("w8a8", 8)])
def test_presets(preset: str, body: int) -> None:
    expected = {name: (8, 8) for name in LAYERS} | {name: (body, body) for name in LAYERS[1:3]}
    assert bits(prepare_qat(Net(), preset)) == expected


def test_layers_become_twins_in_place() -> None:
    model = Net()
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    assert prepare_qat(model) is model
    assert type(model.stem) is QATConv2d and isinstance(model.stem, nn.Conv2d)
    assert type(model.up) is QATConvTranspose2d and isinstance(model.up, nn.ConvTranspose2d)
    assert type(model.head["cls"]) is QATLinear and isinstance(model.head["cls"], nn.Linear)
    for name, module in modules.items():
        assert model.get_submodule(name) is module
    for name, parameter in parameters.items():
        assert model.get_parameter(name) is parameter
        assert parameter.requires_grad


def test_the_model_itself_can_be_a_layer() -> None:
    conv = nn.Conv2d(3, 4, 1)
    x = torch.randn(1, 3, 4, 4)
    model = calibrate(prepare_qat(conv, "w8a8"), [x], progress=False)
    assert model is conv and isinstance(model, QATConv2d)
    assert model(x).shape == (1, 4, 4, 4)


def test_overrides_apply_in_order_after_the_edges() -> None:
    config = QATConfig(
        4,
        4,
        overrides=[
            Rule(type="Linear", weight_bits=6),
            Rule("head.box", act_bits=32),
            Rule("body.*", weight_bits=2, act_bits=3),
            Rule("u?", skip=True),
            Rule("stem", weight_bits=32, act_bits=32),
        ],
    )
    model = prepare_qat(Net(), config)
    assert bits(model) == {"body.0": (2, 3), "head.cls": (6, 8), "head.box": (6, 32)}
    assert type(model.up) is nn.ConvTranspose2d and type(model.stem) is nn.Conv2d


def test_a_later_rule_takes_back_a_skip() -> None:
    config = QATConfig(8, 8, overrides=[Rule("*", skip=True), Rule("up", skip=False)])
    assert list(bits(prepare_qat(Net(), config))) == ["up"]


def test_edges_named_by_the_caller_replace_those_of_the_model() -> None:
    model = prepare_qat(Net(), "hqod_w2a2", first=(), prediction="head.box")
    assert bits(model) == {name: (2, 2) for name in LAYERS} | {"head.box": (8, 8)}
    config = QATConfig(4, 4, first="stem", prediction=())
    assert bits(prepare_qat(Net(), config))["head.cls"] == (4, 4)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (QATConfig(overrides=[Rule("bodi.0", skip=True)]), ["overrides", "'bodi.0'", "'body.0'"]),
        (QATConfig(first="sten"), ["first", "'sten'", "'stem'"]),
        (QATConfig(prediction=["head.cls", "head.bx"]), ["prediction", "'head.bx'", "'head.box'"]),
        (QATConfig(prediction="head"), ["prediction", "container", "'head.*'"]),
    ],
)
def test_a_pattern_that_fits_nothing_names_the_closest(config: QATConfig, words: list[str]) -> None:
    model = Net()
    with pytest.raises(ValueError) as error:
        prepare_qat(model, config)
    assert all(word in str(error.value) for word in words)
    assert not any(isinstance(module, QATLayer) for module in model.modules())


def test_bad_configurations() -> None:
    for value in (1, 9, 0, 16):
        with pytest.raises(ValueError, match="weight_bits"):
            QATConfig(weight_bits=value)
        with pytest.raises(ValueError, match="act_bits"):
            Rule("x", act_bits=value)
    with pytest.raises(ValueError, match="neither"):
        Rule()
    with pytest.raises(ValueError, match=r"type.*'Conv2D'"):
        Rule(type="Conv2D")
    with pytest.raises(ValueError, match=r"weight_init.*'max'"):
        QATConfig(weight_init="max")
    with pytest.raises(ValueError, match=r"scale_mode.*'exp'"):
        QATConfig(scale_mode="exp")
    with pytest.raises(ValueError, match=r"hqod_w4a4.*'w5'"):
        prepare_qat(Net(), "w5")
    with pytest.raises(TypeError, match="dict"):
        prepare_qat(Net(), {})  # type: ignore[arg-type]


def test_models_that_cannot_be_prepared() -> None:
    with pytest.raises(ValueError, match="prepared already"):
        prepare_qat(prepare_qat(Net()))
    with pytest.raises(ValueError, match="has none"):
        prepare_qat(nn.ReLU(), "w8a8")
    with pytest.raises(ValueError, match="first: the layers with 8 bits are not known"):
        prepare_qat(nn.Sequential(nn.Conv2d(3, 4, 1)))
    with pytest.raises(ValueError, match="prepare_qat"):
        calibrate(Net(), batches())


def test_uncalibrated_model_raises_naming_the_layer() -> None:
    model = prepare_qat(Net())
    with pytest.raises(RuntimeError, match=r"stem\.input_quantizer.*never calibrated"):
        model(batches()[0])
    with pytest.raises(RuntimeError, match="never calibrated"):
        copy.deepcopy(model)(batches()[0])


def test_calibration_sees_float_activations_and_finds_their_sign() -> None:
    model = Net().eval()
    stem_inputs = torch.cat([x.flatten() for x in batches()])
    means = torch.cat([_pooled(model, x) for x in batches()])
    config = QATConfig(4, 4, act_init="minmax")
    calibrate(prepare_qat(model, config), batches(), progress=False)
    rows = {row.name: row for row in summary(model)}
    assert rows["stem"].act_signed == (True,)
    assert rows["stem"].act_scales[0] == pytest.approx(stem_inputs.abs().max().item() / 127.5)
    # After a ReLU, and from layers that are not quantized while it calibrates.
    assert rows["body.0"].act_signed == rows["head.cls"].act_signed == (False,)
    assert rows["head.cls"].act_scales[0] == pytest.approx(means.max().item() / 255, rel=1e-5)
    for name in LAYERS:
        layer = model.get_submodule(name)
        divisor = 7.5 if name in ("body.0", "up") else 127.5
        expected = layer.weight.detach().abs().max().item() / divisor
        assert rows[name].weight_scales == pytest.approx((expected,))


def _pooled(model: Net, x: Tensor) -> Tensor:
    """The input of the heads in float."""
    with torch.no_grad():
        x = model.norm(model.stem(x)).relu()
        return model.up(model.body(x) + x).relu().mean(dim=(2, 3))


def test_weight_init_lsq_and_per_channel() -> None:
    model = calibrated(QATConfig(2, 2, weight_init="lsq", per_channel=True))
    w = model.up.weight.detach()
    expected = 2 * w.abs().mean(dim=(0, 2, 3))
    rows = {row.name: row for row in summary(model)}
    assert rows["up"].weight_scales == pytest.approx(tuple(expected.tolist()))
    assert len(rows["body.0"].weight_scales) == 8


def test_calibrate_puts_modes_back_and_leaves_no_trace() -> None:
    model = prepare_qat(Net()).train()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.norm.state_dict().items()}
    calibrate(model, batches(), progress=False)
    assert model.training and model.stem.training and not model.norm.training
    assert all(torch.equal(before[k], v) for k, v in model.norm.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    again = summary(model)
    calibrate(model, batches(), progress=False)
    assert list(summary(model)) == list(again)


def test_calibrate_without_data() -> None:
    model = prepare_qat(Net())
    with pytest.raises(ValueError, match="batches: expected at least one batch"):
        calibrate(model, [], progress=False)
    with pytest.raises(ValueError, match=r"head\.box: no data reached"):
        calibrate(
            model,
            batches(),
            forward=lambda m, x: m.head["cls"](_pooled_twin(m, x)),
            progress=False,
        )
    with pytest.raises(ValueError, match=r"stem\.input_quantizer.*finite"):
        calibrate(model, [torch.full((1, 3, 8, 8), torch.nan)], progress=False)
    assert model.training
    with pytest.raises(RuntimeError, match="never calibrated"):
        model(batches()[0])


def _pooled_twin(model: Net, x: Tensor) -> Tensor:
    return model.up(model.body(model.stem(x))).mean(dim=(2, 3))


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_alone_need_no_data(bits: int) -> None:
    """Nor do the edge layers quantize inputs then; with other bits they are asked for."""
    edges = {} if bits == 8 else {"first": "stem", "prediction": "head.*"}
    config = QATConfig(bits, 32, **edges)
    model = calibrate(prepare_qat(Net(), config), [])
    assert model(batches()[0]).shape == (2, 6)
    rows = {row.name: row for row in summary(model)}
    assert rows["stem"].weight_bits == 8 and {row.act_bits for row in rows.values()} == {32}
    assert bits == 8 or str(config).splitlines()[3].split("  ", 1)[1].split() == [
        "8",
        "bits",
        "float",
    ]


def test_inputs_alone() -> None:
    config = QATConfig(32, 4, first="stem", prediction="head.*")
    rows = {row.name: row for row in summary(prepare_qat(Net(), config))}
    assert (rows["stem"].act_bits, rows["up"].act_bits) == (8, 4)
    assert {row.weight_bits for row in rows.values()} == {32}


def test_calibrate_some_steps() -> None:
    seen: list[Tensor] = []

    def forward(model: nn.Module, batch: Tensor) -> None:
        seen.append(batch)
        model(batch)

    model, given = prepare_qat(Net()), (batches()[0] for _ in range(5))
    for progress in (True, False):
        calibrate(model, given, 2, forward=forward, progress=progress)
    assert len(seen) == 4 and len(list(given)) == 1
    calibrate(model, batches(), steps=100, forward=forward)
    assert len(seen) == 4 + len(batches())
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        calibrate(model, batches(), steps=0)


def test_a_batch_that_the_model_does_not_take_names_forward() -> None:
    model = prepare_qat(Net())
    with pytest.raises(TypeError, match=r"batch: Net does not take a dict .*give forward="):
        calibrate(model, [{"image": batches()[0]}], progress=False)
    calibrate(model, [{"image": batches()[0]}], forward=lambda m, b: m(b["image"]), progress=False)


def test_calibrating_a_compiled_model_compiles_nothing() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    model = torch.compile(prepare_qat(Net()), backend=counter)
    calibrate(model, batches(), progress=False)
    assert counter.frame_count == 0 and all(row.act_scales for row in summary(model))


def test_something_else_than_a_model() -> None:
    with pytest.raises(TypeError, match="model: expected an nn.Module, got a list"):
        prepare_qat([1, 2])


def test_data_that_is_all_zero_gives_a_usable_scale_and_a_warning() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    nn.init.zeros_(model[0].weight)
    prepare_qat(model, "w8a8")
    with pytest.warns(UserWarning, match=r"0\.(weight|input)_quantizer: all values"):
        calibrate(model, [torch.zeros(1, 3, 4, 4)], progress=False)
    assert summary(model)[0].weight_scales == pytest.approx((1 / 127.5,))


def test_what_calibrate_passes_to_the_model() -> None:
    seen: list[object] = []

    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, x: object) -> Tensor:
            seen.append(x)
            return self.conv(torch.stack(x) if isinstance(x, list) else x)

    model = prepare_qat(Probe(), "w8a8")
    image, stack = torch.randn(3, 4, 4), torch.randn(2, 3, 4, 4)
    images = [image, image]
    calibrate(
        model,
        [stack, (stack, {}), [stack, torch.ones(2)], images, (images, [{}, {}])],
        progress=True,
    )
    assert [type(x) for x in seen] == [Tensor, Tensor, Tensor, list, list]
    assert all(x is stack for x in seen[:3]) and all(x is images for x in seen[3:])


def train(model: nn.Module, steps: int = 5, amp: bool = False) -> list[float]:
    optimizer = torch.optim.SGD(parameter_groups(model, weight_decay=1e-4), lr=0.05, momentum=0.9)
    target = torch.linspace(-1, 1, 6).expand(2, 6)
    x, losses = batches()[0], []
    model.train()
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = F.mse_loss(model(x).float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("amp", [False, True])
def test_training_moves_weights_and_scales(preset: str, amp: bool) -> None:
    model = calibrated(preset)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    losses = train(model, steps=30, amp=amp)
    assert losses[-1] < 0.5 * losses[0]
    for name, value in model.named_parameters():
        assert value.grad is not None and torch.isfinite(value).all(), name
        assert not torch.equal(value, before[name]), name


def test_forward_is_that_of_quantized_tensors() -> None:
    model = calibrated().eval()
    x = torch.randn(2, 8, 5, 5)
    layer = model.body[0]
    weight, inputs = layer.weight_quantizer, layer.input_quantizer
    qx = fake_quant(x, inputs.scale, quant_min=0, quant_max=15)
    qw = fake_quant(layer.weight, weight.scale, quant_min=-8, quant_max=7)
    plain = nn.Conv2d(8, 8, 3, padding=1, groups=2, padding_mode="circular")
    with torch.no_grad():
        plain.weight.copy_(qw)
        assert layer.bias is not None and plain.bias is not None
        plain.bias.copy_(layer.bias)
    torch.testing.assert_close(layer(x), plain(qx))


def test_transposed_convolution_takes_an_output_size() -> None:
    layer = nn.ConvTranspose2d(3, 4, 3, stride=2)
    x = torch.randn(1, 3, 5, 5)
    expected = layer(x, output_size=[12, 11])
    calibrate(prepare_qat(layer, "w8a8"), [x], progress=False)
    assert layer(x, output_size=[12, 11]).shape == expected.shape
    assert (layer(x, output_size=[12, 11]) - expected).abs().max() < 0.05


def test_eight_bits_stay_close_to_float() -> None:
    model = Net().eval()
    x = batches()[0]
    expected = model(x)
    calibrate(prepare_qat(model, "w8a8"), batches(), progress=False)
    assert (model(x) - expected).norm() < 0.02 * expected.norm()


def test_summary_counts_and_prints() -> None:
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 0.1, -0.2, 1.0], [-3.0, 0.5, 0.04, 2.0]]))
    prepare_qat(model, QATConfig(2, 4, first=(), prediction=()))
    assert "not calibrated" in str(summary(model))
    calibrate(model, [torch.rand(3, 4)], progress=False)
    model[0].weight_quantizer.set_scale(torch.tensor([1.0]), signed=True)
    row = summary(model)[0]
    # Codes are -2..1: the weights -3 and 2 are clipped; 0, 0.1, -0.2, 0.5 and 0.04 round to 0.
    assert (row.weight_clipped, row.weight_zero) == (2 / 8, 5 / 8)
    table = str(summary(model)).splitlines()
    assert len(table) == 4  # head, line, layer, sizes
    assert [len(summary(model)), row.type, row.act_signed] == [1, "Linear", (False,)]
    assert "25.0%" in table[2] and "62.5%" in table[2]
    assert len(summary(model)[0:1]) == 1


def test_a_checkpoint_of_another_layout_names_the_keys() -> None:
    state = calibrated().state_dict()
    model = prepare_qat(Net(), QATConfig(4, 4, overrides=[Rule("up", weight_bits=32)]))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*up\.weight_quantizer\.scale"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*head\.box\.input_quantizer\.scale"):
        model.load_state_dict(Net().state_dict())
    with pytest.raises(RuntimeError, match=r"body\.0\.weight_quantizer: code_range: .*2 bits"):
        prepare_qat(Net(), "hqod_w2a2").load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"log2_threshold"):
        prepare_qat(Net(), QATConfig(4, 4, weight_quantizer="tqt")).load_state_dict(state)
    with pytest.raises(
        ValueError, match=r"missing: .*body\.0\.bias.* and \d+ more, unknown: .*module"
    ):
        load_float_state_dict(model, {f"module.{key}": value for key, value in state.items()})


class NoReads(TorchDispatchMode):
    """Raises where a value would be read from a tensor, which on an accelerator means waiting."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            raise AssertionError(f"{func} reads a value")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", SCALE_MODES)
def test_a_step_reads_no_value(mode: str) -> None:
    model = calibrated(QATConfig(4, 4, scale_mode=mode))
    with pytest.raises(AssertionError, match="reads a value"), NoReads():
        torch.ones(1).item()
    with NoReads():
        model(batches()[0]).square().sum().backward()


def test_nothing_warns_in_the_normal_course() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(calibrated(), steps=1)


def test_a_quantized_convolution_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    model = calibrate(
        prepare_qat(nn.Conv2d(3, 4, 3), QATConfig(4, 4, first=(), prediction=())),
        batches(),
        progress=False,
    )
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for call in (model, compiled):
        model.zero_grad()
        y = call(batches()[0])
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in model.parameters())])  # type: ignore[union-attr]
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(eager, other)
