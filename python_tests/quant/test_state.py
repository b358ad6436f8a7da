"""State of a QAT model: saving, loading, copies, the float state_dict, parameter groups."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from hqod_ops.quant import (
    QATConfig,
    calibrate,
    float_state_dict,
    load_float_state_dict,
    parameter_groups,
    prepare_qat,
    quantizer_parameters,
    summary,
)
from python_tests.quant.test_prepare import Net, batches, calibrated, train


def test_save_and_load_continue_alike() -> None:
    model = calibrated()
    train(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = prepare_qat(Net())
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert list(summary(other)) == list(summary(model))
    assert train(other) == train(model)
    with pytest.raises(RuntimeError, match=r"body\.0\.\w+_quantizer: code_range"):
        prepare_qat(Net(), "hqod_w2a2").load_state_dict(model.state_dict())


def test_a_deepcopy_is_independent_and_equal() -> None:
    model = calibrated()
    twin = copy.deepcopy(model)
    kept = copy.deepcopy(model.state_dict())
    losses = train(twin)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert train(model) == losses


def test_an_averaged_model_follows() -> None:
    model = calibrated()
    average = AveragedModel(model, use_buffers=True)
    train(model)
    average.update_parameters(model)
    assert torch.equal(average.module.stem.input_quantizer.scale, model.stem.input_quantizer.scale)
    average.eval()
    model.eval()
    assert torch.equal(average(batches()[0]), model(batches()[0]))


@pytest.mark.parametrize("average", [get_ema_multi_avg_fn, get_ema_avg_fn])
@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99, 0.9998])
def test_the_checkpoint_of_an_exponential_average_loads(average: Any, decay: float) -> None:
    name = "multi_avg_fn" if average is get_ema_multi_avg_fn else "avg_fn"
    for bits in (2, 4, 8):
        config = QATConfig(bits, bits, edge_bits=bits)
        model = calibrate(prepare_qat(Net(), config), batches(), progress=False)
        averaged = AveragedModel(model, use_buffers=True, **{name: average(decay)})
        for _ in range(30):
            averaged.update_parameters(model)
        other = prepare_qat(Net(), config)
        other.load_state_dict(averaged.module.state_dict())
        assert other.stem.input_quantizer.codes() == model.stem.input_quantizer.codes()
        # Whole again, so that averages of averages do not drift.
        assert torch.equal(
            other.stem.input_quantizer.code_range, model.stem.input_quantizer.code_range
        )


@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints_with_ranges_in_integers_load(assign: bool) -> None:
    model = calibrated()
    state = {
        name: value.to(torch.int32) if name.endswith("code_range") else value
        for name, value in model.state_dict().items()
    }
    other = prepare_qat(Net())
    other.load_state_dict(state, assign=assign)
    assert other.stem.input_quantizer.code_range.dtype == torch.float32
    assert list(summary(other)) == list(summary(model))


def test_float_state_goes_in_and_out() -> None:
    source, model = Net(), prepare_qat(Net())
    result = model.load_state_dict(source.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all(
        key.endswith(("quantizer.scale", "quantizer.code_range")) for key in result.missing_keys
    )
    calibrate(model, batches(), progress=False)
    back = Net()
    back.load_state_dict(float_state_dict(model))
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in source.state_dict().items())
    other = prepare_qat(Net())
    load_float_state_dict(other, source.state_dict())
    assert torch.equal(other.up.weight, source.up.weight)
    broken = dict(source.state_dict())
    broken["stem.wieght"] = broken.pop("stem.weight")
    with pytest.raises(ValueError, match=r"missing: \['stem.weight'\], unknown: \['stem.wieght'\]"):
        load_float_state_dict(other, broken)


def test_parameter_groups_part_the_scales() -> None:
    model = prepare_qat(Net())
    model.norm.requires_grad_(False)
    scales = quantizer_parameters(model)
    assert len(scales) == 10
    others, last = parameter_groups(model, weight_decay=0.1, scale_weight_decay=0.2)
    assert (others["weight_decay"], last["weight_decay"]) == (0.1, 0.2)
    assert {id(p) for p in last["params"]} == {id(p) for p in scales}
    assert {id(p) for p in others["params"]} == {
        id(p) for n, p in model.named_parameters() if "quantizer" not in n and "norm" not in n
    }


def test_an_optimizer_made_before_calibration_trains_the_scales() -> None:
    model = prepare_qat(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calibrate(model, batches(), progress=False)
    before = [scale.detach().clone() for scale in quantizer_parameters(model)]
    model(batches()[0]).square().sum().backward()
    optimizer.step()
    after = quantizer_parameters(model)
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_float_state_of_a_shared_layer() -> None:
    """A layer under two names is in the state_dict twice, quantizers and all."""

    def made() -> nn.Sequential:
        shared = nn.Conv2d(3, 3, 1)
        return nn.Sequential(shared, nn.ReLU(), shared)

    state = made().state_dict()
    model = prepare_qat(made(), "w8a8", first=(), prediction=())
    load_float_state_dict(model, state)
    saved = float_state_dict(model)
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], value) for name, value in state.items())
    made().load_state_dict(saved)
