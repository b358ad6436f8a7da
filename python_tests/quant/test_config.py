"""Configurations: quantizers by name, what fits where, plans as tables, TOML."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from hqod_ops.quant import LSQ, PRESETS, QATConfig, QATLayer, Rule, calibrate, prepare_qat, summary
from hqod_ops.quant.config.plan import plan_qat
from hqod_ops.quant.config.toml import from_toml, load_config, save_config, to_toml
from hqod_ops.quant.quantizers.registry import QUANTIZERS


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
    )


PLAIN = QATConfig(4, 4, first=(), prediction=())
IMAGES = torch.rand(2, 3, 8, 8)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_by_name(name: str) -> None:
    kind = QUANTIZERS[name]
    settings = {
        key: name
        for key, role in (("weight_quantizer", "weight"), ("act_quantizer", "input"))
        if role in kind.roles
    }
    model = calibrate(prepare_qat(net(), dataclasses.replace(PLAIN, **settings)), [IMAGES])
    for row in summary(model):
        assert row.weight_quantizer == ("LSQ" if "weight" not in kind.roles else kind.__name__)
        assert row.act_quantizer == ("LSQ" if "input" not in kind.roles else kind.__name__)
    model(IMAGES).sum().backward()
    assert model[0].weight.grad is not None and torch.isfinite(model[0].weight.grad).all()


def test_quantizers_and_options_of_single_layers() -> None:
    config = dataclasses.replace(
        PLAIN,
        weight_options={"grad_scale": 0.5},
        overrides=[
            Rule("0", weight_quantizer="dsq", weight_options={"alpha": 0.2}),
            Rule("2", weight_quantizer="minmax", scale_mode="softplus"),
            Rule(type="Linear", act_quantizer="pact", act_init="minmax"),
        ],
    )
    model = prepare_qat(net(), config)
    weights = [model[i].weight_quantizer for i in (0, 2, 5)]
    assert [type(q).__name__ for q in weights] == ["DSQ", "MinMaxSTE", "LSQ"]
    # Options are those of one quantizer: a rule that changes it starts from the new one's own.
    assert (weights[0].initial_alpha, weights[0].grad_scale, weights[2].grad_scale) == (
        0.2,
        "lsq",
        0.5,
    )
    assert model[2].input_quantizer.scale_mode == "softplus"
    assert model[5].input_quantizer.observer == "minmax"


def test_first_scales_that_go_with_a_quantizer() -> None:
    model = prepare_qat(net(), "tqt_w4a4", first="0", prediction="5")
    names = [
        (model[i].weight_quantizer.observer, model[i].input_quantizer.observer) for i in (0, 2)
    ]
    assert names == [("power_of_two", "power_of_two_range"), ("power_of_two", "power_of_two")]
    plan = plan_qat(net(), PLAIN)
    assert (plan["0"].weight_init, plan["0"].act_init) == ("minmax", "ema_mse")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weight_quantizer": "pact"}, r"weight_quantizer: 'pact' does not quantize weights"),
        ({"act_quantizer": "dorefa"}, r"act_quantizer: 'dorefa' does not quantize inputs.*pact"),
        ({"weight_quantizer": "lqs"}, r"weight_quantizer: expected one of lsq, .*'lqs'"),
        (
            {"weight_options": {"grad": 1}},
            r"weight_options: 'lsq' has no option 'grad'.*scale_mode",
        ),
        ({"weight_options": {"bits": 3}}, r"weight_options: 'lsq' has no option 'bits'"),
        ({"act_init": "ema"}, r"act_init: expected one of .*'ema'"),
        ({"batch_norm": "off"}, r"batch_norm: expected one of train, freeze, fold, got 'off'"),
    ],
)
def test_what_does_not_fit(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        QATConfig(**settings)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: QATConfig(4.5, 4), r"weight_bits: expected an int, got the float 4\.5"),
        (lambda: QATConfig(32.0, 4), r"weight_bits: expected an int, got the float 32\.0"),
        (lambda: QATConfig(4, "4"), r"act_bits: expected an int, got the str '4'"),
        (lambda: QATConfig(edge_bits=8.0), r"edge_bits: expected an int, got the float 8\.0"),
        (
            lambda: QATConfig(overrides=["a"]),
            r"overrides: expected a sequence of Rule, got \['a'\]",
        ),
        (
            lambda: QATConfig(overrides=Rule("a")),
            r"overrides: expected a sequence of Rule, got Rule",
        ),
        (lambda: Rule(("a", "b")), r"pattern: expected one name or glob, got \('a', 'b'\)"),
        (lambda: LSQ(4.0), r"bits: expected an int, got the float 4\.0"),
        (lambda: LSQ("4"), r"bits: expected an int, got the str '4'"),
        (lambda: LSQ(4).set_scale(0.1, True), r"LSQ: scale: expected a Tensor, got 0\.1"),
    ],
)
def test_arguments_of_a_wrong_type(make: Callable[[], object], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        make()


@pytest.mark.parametrize(
    ("scale", "signed", "words"),
    [
        (torch.ones(2), True, r"shape \(3,\), got \(2,\)"),
        (torch.ones(3), [True, False], r"one scale a level, got 3 scales for 2"),
        (torch.ones(2), [True, False], r"shape \(2, 3\), got \(2,\)"),
        (torch.tensor(1.0), True, r"shape \(3,\), got \(\)"),
    ],
)
def test_scales_of_a_wrong_shape(scale: torch.Tensor, signed: bool, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LSQ(4, ch_axis=1, channels=3).set_scale(scale, signed)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (Rule("2", weight_quantizer="pact"), r"2: weight_quantizer: 'pact'"),
        (Rule("2", act_options={"alpha": 0.4}), r"2: act_options: 'lsq' has no option 'alpha'"),
        (Rule("2", weight_quantizer="lsq_plus", weight_init="lsq"), r"2: observer: .*zero point"),
        (Rule("2", weight_quantizer="dsq", weight_options={"alpha": 2.0}), r"2: alpha: .*2\.0"),
    ],
)
def test_what_does_not_fit_in_a_layer(rule: Rule, words: str) -> None:
    model = net()
    with pytest.raises(ValueError, match=words):
        prepare_qat(model, dataclasses.replace(PLAIN, overrides=[rule]))
    assert not any(isinstance(module, QATLayer) for module in model.modules())


def test_quantizers_that_are_not_used_need_not_fit() -> None:
    config = QATConfig(4, 32, first=(), prediction=(), act_quantizer="dorefa")
    assert {row.act_bits for row in summary(prepare_qat(net(), config))} == {32}


def test_the_plan_is_what_is_done() -> None:
    config = QATConfig(
        2, 3, first="0", prediction=(), per_channel=True, overrides=[Rule("5", skip=True)]
    )
    model = net()
    plan = plan_qat(model, config)
    assert not any(isinstance(module, QATLayer) for module in model.modules())
    rows = {
        row.name: (row.weight_bits, row.act_bits) for row in summary(prepare_qat(model, config))
    }
    planned = {n: (p.weight_bits, p.act_bits) for n, p in plan.items() if p.quantized}
    assert planned == rows == {"0": (8, 8), "2": (2, 3)}
    assert str(plan).splitlines() == [
        "layer  type    w bits  weight                    a bits  input",
        "-----  ------  ------  ------------------------  ------  ------------",
        "0      Conv2d       8  lsq, minmax, per channel       8  lsq, ema_mse",
        "2      Conv2d       2  lsq, minmax, per channel       3  lsq, ema_mse",
        "5      Linear   float                             float",
    ]


def test_edges_declared_by_a_part() -> None:
    class Detector(nn.Module):
        qat_first = "0"
        qat_prediction = ("5",)

        def __init__(self) -> None:
            super().__init__()
            self.add_module("0", nn.Conv2d(3, 4, 3))
            self.add_module("2", nn.Conv2d(3, 4, 3))
            self.add_module("5", nn.Conv2d(3, 4, 3))

    plan = plan_qat(nn.ModuleDict({"teacher": Detector(), "student": Detector()}))
    eight = [name for name, layer in plan.items() if layer.weight_bits == 8]
    assert eight == ["teacher.0", "teacher.5", "student.0", "student.5"]


FULL = QATConfig(
    2,
    3,
    first='a "quoted" name\\ü',
    prediction=(),
    overrides=[
        Rule("neck.*", skip=True),
        Rule(type="Linear", weight_quantizer="dsq", weight_options={"alpha": 1e-5}),
        Rule("x", act_quantizer="minmax", act_options={"symmetric": False}, per_channel=False),
    ],
    act_options={"grad_scale": "lsq", "scale_mode": "clamp"},
    batch_norm="freeze",
    foreach=True,
    placement="producers",
)


@pytest.mark.parametrize("config", [QATConfig(), FULL, *PRESETS.values()])
def test_toml_and_back(config: QATConfig, tmp_path: Path) -> None:
    assert from_toml(to_toml(config)) == config
    save_config(config, tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml") == config


def test_toml_by_hand() -> None:
    config = from_toml(
        """
        preset = "hqod_w2a2"
        foreach = true
        prediction = "head.*"
        weight_options = { grad_scale = 1 }

        [[overrides]]
        pattern = "neck.*"
        act_bits = 4
        """
    )
    assert config == QATConfig(
        2,
        2,
        weight_init="lsq",
        foreach=True,
        prediction="head.*",
        weight_options={"grad_scale": 1},
        overrides=[Rule("neck.*", act_bits=4)],
    )


def test_float_is_a_word_for_32_bits() -> None:
    config = QATConfig(4, "float", "float", overrides=[Rule("x", weight_bits="float")])  # type: ignore[arg-type]
    assert config == QATConfig(4, 32, 32, overrides=[Rule("x", weight_bits=32)])
    assert (config.act_bits, config.overrides[0].weight_bits) == (32, 32)
    text = 'weight_bits = 4\nact_bits = "float"\nedge_bits = 32\n'
    text += '[[overrides]]\npattern = "x"\nweight_bits = "float"\n'
    assert from_toml(text) == config == from_toml(to_toml(config))
    with pytest.raises(TypeError, match="act_bits: expected an int"):
        QATConfig(4, "none")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("weight_bit = 3", "weight_bit: no such setting; expected one of act_bits"),
        ('weight_bits = "3"', "weight_bits: expected int, got '3'"),
        ("weight_bits = true", "weight_bits: expected int, got True"),
        ("weight_bits = 9", "weight_bits: expected a value in"),
        ("first = [1]", "first: expected strings"),
        ('first = "float"\nplacement = "float"', "placement: expected one of inputs, producers"),
        ("overrides = 3", "overrides: expected tables"),
        ("[[overrides]]\npattern = 'x'\nbits = 4", r"overrides\[0\]\.bits: no such setting"),
        ("[[overrides]]\nact_bits = 4", "Rule: expected a pattern"),
        ("preset = 'w3'", "expected one of the presets hqod_w4a4, .*'w3'"),
        ("preset = 3", "preset: expected a string"),
        ("weight_bits = ", "."),
    ],
)
def test_bad_toml(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"config\.toml: .*{words}"):
        load_config(path)


def test_options_without_a_form_in_toml() -> None:
    with pytest.raises(TypeError, match="weight_options: expected a value that TOML has"):
        to_toml(QATConfig(weight_options={"grad_scale": torch.ones(1)}))


def test_configurations_print_as_a_table() -> None:
    lines = str(FULL).splitlines()
    assert lines[2].split("  ")[0] == "all"
    assert lines[-1].startswith("batch norm: freeze; weights quantized together; inputs where they")
    assert "float" in next(line for line in lines if line.startswith("neck.*"))
    assert any("dsq, alpha 1e-05" in line for line in lines if line.startswith("Linear"))
