"""Calibration in eval and in training mode; layers that no data reaches."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from hqod_ops.quant import QATLayer, calibrate, prepare_qat, summary
from hqod_ops.quant.parameters import (
    float_state_dict,
    load_float_state_dict,
    parameter_groups,
    quantizer_parameters,
)


class Net(nn.Module):
    """Has a layer that runs in training only, one that never does, and one that shares a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.main = nn.Conv2d(4, 4, 1)
        self.auxiliary = nn.Conv2d(4, 2, 1)
        self.never = nn.Conv2d(4, 2, 1)
        self.copy = nn.Conv2d(4, 4, 1)
        self.copy.weight, self.copy.bias = self.main.weight, self.main.bias

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        y: Tensor = self.main(x)
        return y.sum() + self.auxiliary(x).sum() if self.training else y


class WithoutNever(Net):
    def __init__(self) -> None:
        super().__init__()
        del self.never


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(3)]


def prepared(model: nn.Module) -> Any:
    return prepare_qat(model, "w8a8")


def scales(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: layer.input_quantizer.scale.detach().clone()
        for name, layer in model.named_modules()
        if isinstance(layer, QATLayer) and layer.input_quantizer is not None
    }


@pytest.mark.parametrize("training", [True, False])
def test_what_runs_in_training_only_is_looked_at_there(training: bool) -> None:
    model = prepared(WithoutNever()).train(training)
    modes = {m: m.training for m in model.modules()}
    before = {name: value.clone() for name, value in model.norm.named_buffers()}
    state = torch.random.get_rng_state()
    calibrate(model, iter(batches()), progress=False)
    assert {m: m.training for m in model.modules()} == modes
    assert all(torch.equal(before[name], v) for name, v in model.norm.named_buffers())
    assert torch.equal(state, torch.random.get_rng_state())
    # The others have the scales of eval mode.
    other = prepared(WithoutNever())
    load_float_state_dict(other, float_state_dict(model))
    del other.auxiliary
    calibrate(other, batches(), progress=False, mode="eval")
    found = scales(model)
    assert all(torch.equal(found[name], scale) for name, scale in scales(other).items())
    model.train()(batches()[0]).backward()
    assert model.auxiliary.input_quantizer.scale.grad is not None


def test_a_copy_is_left_and_what_never_runs_is_named_with_all_others() -> None:
    model = prepared(Net())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"^never: no data reached this layer.*unseen=.float"):
        calibrate(model, batches(), progress=False)
    with pytest.raises(ValueError, match=r"^auxiliary, never: no data reached these layers"):
        calibrate(model, batches(), progress=False, mode="eval")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_unseen_layers_in_float() -> None:
    model = prepared(Net())
    with pytest.warns(UserWarning, match="^never: no data reached these layers"):
        calibrate(model, batches(), progress=False, unseen="float")
    bits = {row.name: (row.weight_bits, row.act_bits) for row in summary(model)}
    assert bits == {
        "stem": (8, 8),
        "main": (8, 8),
        "auxiliary": (8, 8),
        "never": (32, 32),
        "copy": (32, 32),
    }
    x = torch.randn(1, 4, 2, 2)
    conv = nn.functional.conv2d(x, model.never.weight, model.never.bias)
    assert torch.equal(model.never(x), conv)
    frozen = [p for p in quantizer_parameters(model) if not p.requires_grad]
    assert len(frozen) == 4
    assert all(p.requires_grad for g in parameter_groups(model, 0.1) for p in g["params"])
    # In copies, averages and states too.
    average = AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = prepared(Net())
    loaded.load_state_dict(torch.load(file))
    for twin in (loaded, copy.deepcopy(model), average.module):
        assert torch.equal(twin.never(x), conv)
        assert str(summary(twin)) == str(summary(model))
    # A calibration that reaches it takes it in again, and one that fails leaves it.
    with pytest.raises(ValueError, match="batches"):
        calibrate(loaded, [], progress=False)
    assert torch.equal(loaded.never(x), conv)

    def both(model: Any, batch: Tensor) -> None:
        model.train()(batch), model.never(model.norm(model.stem(batch)))

    calibrate(loaded, batches(), progress=False, forward=both)
    assert not torch.equal(loaded.never(x), conv)
    assert loaded.never.input_quantizer.scale.requires_grad


def test_a_model_that_does_not_run_in_training_mode() -> None:
    class Strict(Net):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise AttributeError("targets should not be none")
            return super().forward(x)

    with pytest.raises(ValueError, match="In training mode the model failed: .* targets should"):
        calibrate(prepared(Strict()), batches(), progress=False)


def test_statistics_of_the_batch() -> None:
    """Where running statistics do not fit, scales of eval mode would not fit training."""
    model = WithoutNever()
    model.norm.running_var.fill_(1e4)
    model.norm.num_batches_tracked.fill_(3)
    with pytest.warns(UserWarning, match="running statistics of 1 of 1 batch norms do not fit"):
        first = calibrate(prepared(copy.deepcopy(model)), batches(), progress=False)
    other = calibrate(prepared(copy.deepcopy(model)), batches(), progress=False, mode="train")
    assert torch.equal(other.norm.running_var, model.norm.running_var)
    assert 20 * scales(first)["main"] < scales(other)["main"]
    assert torch.equal(scales(first)["stem"], scales(other)["stem"])


def test_choices() -> None:
    with pytest.raises(ValueError, match="mode: expected one of auto, eval, train, got 'fast'"):
        calibrate(prepared(Net()), batches(), mode="fast")
    with pytest.raises(ValueError, match="unseen: expected one of error, float, got 'skip'"):
        calibrate(prepared(Net()), batches(), unseen="skip")
