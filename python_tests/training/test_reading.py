"""Settings: one line for every mistake, and the words of earlier versions are understood."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchvision")

from hqod_ops.quant import QATConfig, Rule, to_toml
from hqod_ops.quant.config import FLOAT_BITS, PRESETS
from hqod_ops.training import ConfigError
from hqod_ops.training.reading import assignment, from_dict, merge, read, to_dict
from hqod_ops.training.settings import RunConfig, ScheduleConfig

FLOAT = QATConfig(FLOAT_BITS, FLOAT_BITS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedul": {}}, "schedul: no such setting; did you mean 'schedule'"),
        ({"data": {"xyz": 1}}, "data.xyz: no such setting; expected one of calibration_images, "),
        ({"quant": {"weight_bits": "four"}}, "quant.weight_bits: expected int, got 'four'"),
        ({"quant": {"bits": 1}}, r"quant.weight_bits: expected a value in \[2, 8\], or 32"),
        ({"quant": {"preset": "w3"}}, "quant.preset: no such preset; "),
        ({"quant": {"preset": ["w8a8"]}}, "quant.preset: no such preset; "),
        ({"quant": {"act_quantizer": "tpt"}}, "quant.act_quantizer: expected one of lsq, "),
        ({"quant": {"overrides": [{"patern": "*"}]}}, r"quant.overrides\[0\].patern: no such set"),
        ({"quant": {"overrides": [{"act_bits": 4}]}}, r"quant.overrides\[0\]: Rule: expected a pa"),
        ({"quant": {"overrides": 4}}, "quant.overrides: expected a list, got 4"),
        ({"quant": {"bits": 4, "weight_options": {"x": 1}}}, "quant.weight_options: "),
        ({"quant": 4}, "quant: expected a table, got 4"),
        ({"loss": {"variant": "x"}}, "loss.variant: expected one of 'official', 'geometric', got"),
        ({"model": {"widths": [8, 0.5]}}, r"model.widths\[1\]: expected int, got 0.5"),
        ({"data": {"flip": 1}}, "data.flip: expected bool, got 1"),
        ({"schedule": {"epochs": 0}}, "schedule.epochs: expected int >= 1, got 0"),
    ],
)
def test_bad_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        from_dict(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        *("schedule.lr=-1", "schedule.lr=inf", "schedule.weight_decay=-1", "schedule.warmup=-0.1"),
        *("schedule.lr=nan", "schedule.scale_lr=inf", "schedule.scale_decay=-1"),
        *("model.groups=0", "model.stem=0", "model.channels=0", "model.anchor_scale=0"),
        *("model.widths=[0,1,2]", "loss.topk=0", "test.max_detections=0", "test.nms_iou=-1"),
        *("quant.edge_bits=1", "quant.edge_bits=99", "data.calibration_images=0"),
        *("quant.calibration_images=-1", "data.workers=-1", "data.train_images=0", "seed=-1"),
    ],
)
def test_settings_out_of_range(text: str) -> None:
    name = text.partition("=")[0].replace("quant.cal", "data.cal")
    with pytest.raises(ConfigError, match=rf"^{name}(\[0\])?: expected .*, got "):
        from_dict(assignment(text))


def test_settings_survive_json() -> None:
    rules = [Rule("head.*", act_bits=8, weight_options={"grad_scale": 1.0}), Rule(type="Linear")]
    quant = QATConfig(2, 3, first="stem", prediction=(), overrides=rules, act_quantizer="lsq_plus")
    config = RunConfig(quant=quant, schedule=ScheduleConfig(steps=(3, 5)))
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert from_dict({}) == RunConfig() and not RunConfig().quantized


def test_assignments() -> None:
    assert assignment("model.widths=[8, 16]") == {"model": {"widths": [8, 16]}}
    assert assignment("loss.variant=geometric") == {"loss": {"variant": "geometric"}}
    with pytest.raises(ConfigError, match="--set: expected table.setting=value"):
        assignment("lr")


def test_every_field_of_the_toolkits_configuration_is_a_setting(tmp_path: Path) -> None:
    """A file that the toolkit writes is a recipe's [quant], and --set reaches inside."""
    rules = [Rule("head.*", act_bits=FLOAT_BITS), Rule(type="Conv2d", weight_init="mse")]
    quant = QATConfig(
        3, 5, 6, "stem", ("a", "b"), rules, True, "mse", "minmax", batch_norm="freeze", foreach=True
    )
    text = "[quant]\n" + to_toml(quant).replace("[[overrides]]", "[[quant.overrides]]")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text)
    assert from_dict(read(recipe)).quant == quant
    changed = merge(read(recipe), assignment("quant.act_options={grad_scale = 2.0}"))
    assert from_dict(changed).quant.act_options == {"grad_scale": 2.0}
    option = merge(changed, assignment("quant.act_options.grad_scale=3.0"))
    assert from_dict(option).quant.act_options == {"grad_scale": 3.0}


@pytest.mark.parametrize(
    ("quant", "expected"),
    [
        ({}, FLOAT),
        ({"edge_bits": 4}, QATConfig(FLOAT_BITS, FLOAT_BITS, 4)),
        ({"bits": 0}, FLOAT),
        ({"bits": "float"}, FLOAT),
        ({"bits": FLOAT_BITS}, FLOAT),
        ({"bits": 4}, QATConfig(4, 4)),
        ({"bits": 4, "act_bits": "float"}, QATConfig(4, FLOAT_BITS)),
        ({"weight_bits": 4}, QATConfig(4, FLOAT_BITS)),
        ({"bits": 4, "weight_init": "minmax"}, QATConfig(4, 4)),
        (
            {"bits": 4, "weight_quantizer": "tqt", "weight_init": "minmax"},
            QATConfig(4, 4, weight_quantizer="tqt", weight_init="minmax"),
        ),
        ({"preset": "tqt_w2a2"}, PRESETS["tqt_w2a2"]),
        ({"preset": "w8a8", "act_bits": 4}, QATConfig(8, 4)),
        ({"preset": "hqod_w2a2", "bits": 3}, QATConfig(3, 3, weight_init="lsq")),
        (
            {"bits": 4, "overrides": [{"pattern": "a", "act_bits": "float"}]},
            QATConfig(4, 4, overrides=[Rule("a", act_bits=FLOAT_BITS)]),
        ),
    ],
)
def test_words_for_bits(quant: dict[str, Any], expected: QATConfig) -> None:
    assert from_dict({"quant": quant}).quant == expected


def test_the_later_of_two_sources_wins() -> None:
    """Also where one says ``bits`` and the other the bits of one kind."""
    first, second = assignment("quant.act_bits=8"), assignment("quant.bits=2")
    assert from_dict(merge(first, second)).quant == QATConfig(2, 2)
    assert from_dict(merge(second, first)).quant == QATConfig(2, 8)


def test_recipes_are_valid() -> None:
    recipes = sorted((Path(__file__).parents[2] / "recipes").rglob("*.toml"))
    assert len(recipes) >= 5
    for recipe in recipes:
        from_dict(read(recipe))
