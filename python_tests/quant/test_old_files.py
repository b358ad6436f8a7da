"""Files that version 0.1 wrote load still, and mean what they meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hqod_ops.quant
from hqod_ops.quant import load_config, prepare_qat, save_config
from hqod_ops.quant.quantizers import Quantizer

DATA = Path(__file__).parent / "data"


class Net(nn.Module):
    """One layer for every kind of quantizer; tower and head are shared by two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 1)
        self.channels = nn.Conv2d(3, 3, 1)
        self.power = nn.Conv2d(3, 3, 1)
        self.frozen = nn.Conv2d(3, 3, 1)
        self.clipped = nn.Conv2d(3, 3, 1)
        self.soft = nn.Conv2d(3, 3, 1)
        self.plain = nn.ConvTranspose2d(3, 3, 1)
        self.tower = nn.Conv2d(3, 3, 1)
        self.head = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.silu(self.channels(F.relu(self.stem(x))))
        x = F.relu(self.clipped(F.relu(self.frozen(self.power(x)))))
        x = self.plain(self.soft(x))
        return [self.head(self.tower(level)) for level in (x, 3 * x[..., :2, :2])]


def loaded(foreach: bool = False) -> tuple[Net, dict[str, Any]]:
    found = json.loads((DATA / "checkpoint_0_1.json").read_text(encoding="utf-8"))
    model = prepare_qat(Net(), load_config(DATA / "config_0_1.toml"), foreach=foreach)
    state = {name: torch.tensor(value) for name, value in found["state"].items()}
    model.load_state_dict(state)
    assert list(model.state_dict()) == list(state)
    return model.eval(), found


def test_grids() -> None:
    model, found = loaded()
    quantizers = {n: m for n, m in model.named_modules() if isinstance(m, Quantizer)}
    assert list(quantizers) == list(found["quantizers"])
    for name, levels in found["quantizers"].items():
        quantizer = quantizers[name]
        assert quantizer.levels == len(levels)
        for level, expected in enumerate(levels):
            assert list(quantizer.codes(level)) == expected["codes"]
            zero = quantizer.effective_zero_point(level)
            assert (None if zero is None else zero.tolist()) == expected["zero_point"]
            # softplus may be an ulp off on another machine; a power of two has no rounding.
            torch.testing.assert_close(
                quantizer.effective_scale(level), torch.tensor(expected["scale"]), rtol=1e-6, atol=0
            )


@pytest.mark.parametrize("foreach", [False, True])
def test_outputs(foreach: bool) -> None:
    model, found = loaded(foreach)
    for got, expected in zip(model(torch.tensor(found["image"])), found["outputs"], strict=True):
        # Sums of six products, in an order that is the machine's.
        torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_settings_are_written_as_they_were(tmp_path: Path) -> None:
    path = DATA / "config_0_1.toml"
    save_config(load_config(path), tmp_path / "again.toml")
    assert load_config(tmp_path / "again.toml") == load_config(path)
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    written = (tmp_path / "again.toml").read_text(encoding="utf-8").splitlines()
    # Settings that came later may stand between them.
    assert [line for line in written if line in lines] == lines


NAMES = [
    "DSQ",
    "DoReFa",
    "EMAMSE",
    "EMAMinMax",
    "ExportError",
    "ExportReport",
    "FLOAT_BITS",
    "LSQ",
    "LSQInit",
    "LSQPlus",
    "LayerPlan",
    "LayerSummary",
    "LevelBatchNorm2d",
    "MSE",
    "MinMax",
    "MinMaxSTE",
    "NMS",
    "OBSERVERS",
    "Observer",
    "PACT",
    "PRESETS",
    "Percentile",
    "Placement",
    "Plan",
    "PowerOfTwo",
    "PowerOfTwoRange",
    "QATConfig",
    "QATConv2d",
    "QATConvTranspose2d",
    "QATLayer",
    "QATLinear",
    "QUANTIZERS",
    "Quantizer",
    "Rule",
    "Summary",
    "TQT",
    "TQTFrozen",
    "calibrate",
    "detection_network",
    "export_onnx",
    "float_state_dict",
    "fold_batch_norm",
    "freeze_batch_norm",
    "from_toml",
    "load_config",
    "load_float_state_dict",
    "parameter_groups",
    "place_on_producers",
    "placement",
    "plan_qat",
    "prepare_qat",
    "quantizer_parameters",
    "reset_levels",
    "save_config",
    "summary",
    "to_toml",
    "use_level_batch_norm",
]
"""What ``hqod_ops.quant`` listed in 0.1."""


@pytest.mark.parametrize("name", NAMES)
def test_old_names(name: str) -> None:
    """Scripts import them from where they were."""
    assert getattr(hqod_ops.quant, name) is not None
