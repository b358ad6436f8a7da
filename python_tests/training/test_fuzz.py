"""Damaged recipes and checkpoints: a result or one clear line, never a traceback from within.

Files are changed at random, from fixed seeds, as those of data sets are in test_data_fuzz.py.
"""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")

from hqod_ops.quant import QATConfig, Rule, to_toml
from hqod_ops.training import ConfigError
from hqod_ops.training.build import build_model, load_detector, quantize
from hqod_ops.training.data import open_data
from hqod_ops.training.files import FORMAT, read_checkpoint, saved_shape
from hqod_ops.training.reading import from_dict, read, to_dict
from hqod_ops.training.settings import DataConfig, ModelConfig, RunConfig, ScheduleConfig
from hqod_ops.training.trainer import Trainer
from python_tests.mutation import change_bytes, change_value

TINY = ModelConfig(stem=8, widths=(8, 8, 16), channels=8, head_depth=1, groups=2)
CONFIG = RunConfig(
    model=TINY,
    quant=QATConfig(4, 4, overrides=[Rule("head.*", act_bits=8)]),
    schedule=ScheduleConfig(policy="step", steps=(2, 3)),
)


def fuzz(rounds: int, write: Callable[[random.Random], None], use: Callable[[], object]) -> None:
    sound = 0
    for seed in range(rounds):
        write(random.Random(seed))
        try:
            use()
            sound += 1
        except ConfigError as error:
            message = str(error)
            assert message.strip() and len(message.splitlines()) == 1, (seed, message)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
    assert 0 < sound < rounds  # files that are all refused, or all whole, would show nothing


def use_settings(path: Path) -> None:
    """They read, and what was read is what is written again."""
    config = from_dict(read(path))
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_recipe_bytes(tmp_path: Path) -> None:
    quant = to_toml(CONFIG.quant).replace("[[overrides]]", "[[quant.overrides]]")
    tables = "seed = 3\n[data]\nsource = 'photos'\n[schedule]\nlr = 1e-3\nsteps = [2, 3]\n"
    text = f"{tables}[quant]\n{quant}"
    path, sound = tmp_path / "recipe.toml", text.encode()
    path.write_text(text)
    assert from_dict(read(path)).quant == CONFIG.quant

    def write(rng: random.Random) -> None:
        path.write_bytes(change_bytes(sound, rng))

    fuzz(400, write, lambda: use_settings(path))


def test_recipe_values(tmp_path: Path) -> None:
    path = tmp_path / "config.json"

    def write(rng: random.Random) -> None:
        values = to_dict(CONFIG)
        for _ in range(rng.choice((1, 1, 2))):
            change_value(values, rng)
        path.write_text(json.dumps(values))

    fuzz(400, write, lambda: use_settings(path))


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    """A checkpoint before the first step."""
    model = build_model(CONFIG, 2)
    quantize(model, CONFIG)
    weights = dict(model.state_dict())
    return {
        "format": FORMAT,
        "config": to_dict(CONFIG),
        "categories": ["cat", "dog"],
        "image": [64, 96],
        "epoch": 0,
        "history": [{"epoch": 1, "loss": 1.0}],
        "model": weights,
    }


def use_checkpoint(path: Path) -> None:
    model, _, categories = load_detector(path)
    assert all(isinstance(name, str) for name in categories)
    shape = saved_shape(path)
    assert shape is None or min(shape) > 0
    assert not model.training


def test_checkpoint_bytes(tmp_path: Path, state: dict[str, Any]) -> None:
    path, content = tmp_path / "last.pt", io.BytesIO()
    torch.save(state, content)
    sound = content.getvalue()
    head = sound.index(b"PK", 1000) if b"PK" in sound[1000:] else len(sound)

    def write(rng: random.Random) -> None:
        # The pickle stands first; the weights behind it, most of the file, may have any value.
        if rng.random() < 0.7:
            path.write_bytes(change_bytes(sound[:head], rng) + sound[head:])
        else:
            path.write_bytes(change_bytes(sound, rng))

    fuzz(60, write, lambda: use_checkpoint(path))


def test_checkpoint_values(tmp_path: Path, state: dict[str, Any]) -> None:
    path = tmp_path / "last.pt"

    def write(rng: random.Random) -> None:
        changed = {**state, "config": copy.deepcopy(state["config"]), "model": dict(state["model"])}
        for key in ("categories", "image", "history"):
            changed[key] = copy.deepcopy(state[key])
        change_value(changed, rng)
        torch.save(changed, path)

    fuzz(80, write, lambda: use_checkpoint(path))


def test_checkpoint_to_resume(tmp_path: Path) -> None:
    """What only a resumed run reads: optimizer, schedule, random state."""
    config = RunConfig(
        data=DataConfig(size=64, train_images=2),
        model=TINY,
        device="cpu",
        schedule=ScheduleConfig(epochs=1, batch_size=2),
    )
    dataset = open_data(config.data, train=True)
    Trainer(build_model(config, 10), dataset, config, tmp_path).fit(progress=False)
    sound = read_checkpoint(tmp_path)
    keys = ("optimizer", "scheduler", "rng", "cuda_rng")
    state: dict[str, Any] = {}

    def write(rng: random.Random) -> None:
        state.update(copy.deepcopy(sound))
        part = {key: state[key] for key in keys}
        change_value(part, rng)
        state.update(part)
        for key in keys - part.keys():
            del state[key]

    fuzz(60, write, lambda: Trainer(build_model(config, 10), dataset, config, tmp_path).load(state))


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_checkpoints_run_no_code(tmp_path: Path, state: dict[str, Any]) -> None:
    """A file from somebody else is data."""
    marker, path = tmp_path / "ran", tmp_path / "last.pt"
    for number, content in enumerate((_Payload(marker), {**state, "rng": _Payload(marker)})):
        if number:
            torch.save(content, path)
        else:
            path.write_bytes(pickle.dumps(content, protocol=2))
        for reader in (read_checkpoint, load_detector):
            with pytest.raises(ConfigError, match="not a readable checkpoint"):
                reader(path)
    assert not marker.exists()
