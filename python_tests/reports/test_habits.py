"""Habits around a prepared model: calibration under ``torch.inference_mode``, again with more
levels, feature extraction, checkpoints of a wrapped model, layers that are formulas.

Reports: https://github.com/quic/aimet/issues/2026 and
https://github.com/Xilinx/brevitas/issues/1245 (state made under inference_mode can neither train
nor load); https://github.com/ultralytics/ultralytics (``dfl.conv``, whose weights are 0, 1, 2...).
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from hqod_ops.quant import (
    QATConfig,
    calibrate,
    float_state_dict,
    fold_batch_norm,
    load_float_state_dict,
    parameter_groups,
    plan_qat,
    prepare_qat,
)


class Head(nn.Module):
    """Shared by so many levels."""

    def __init__(self, levels: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tower, self.out, self.levels = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), levels

    def forward(self, x: Tensor) -> list[Tensor]:
        inputs = [F.avg_pool2d(x, 2**level) for level in range(self.levels)]
        return [self.out(self.tower(level)) for level in inputs]


X = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def prepare(model: Any, **settings: Any) -> Any:
    return prepare_qat(model, QATConfig(8, 8, **settings), first=(), prediction=())


def loss(model: Any) -> Tensor:
    values: list[Tensor] = model(X)
    return torch.stack([value.square().mean() for value in values]).sum()


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("quantizer", ["lsq", "lsq_plus", "tqt", "minmax"])
def test_calibration_under_inference_mode(quantizer: str, foreach: bool) -> None:
    settings = {"act_quantizer": quantizer, "foreach": foreach}
    expected = calibrate(prepare(Head(), **settings), [X], progress=False)
    float_model = Head()
    with torch.inference_mode():
        model = calibrate(prepare(float_model, **settings), [X.clone()], progress=False)
        model(X)
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
    loss(model.train()).backward()
    model.load_state_dict({key: value.clone() for key, value in state.items()})


def test_loading_more_levels_under_inference_mode() -> None:
    state = calibrate(prepare(Head(3)), [X], progress=False).state_dict()
    model = prepare(Head(3))
    with torch.inference_mode():
        model.load_state_dict(state)
    loss(model).backward()


def test_a_pruned_model_and_folding_under_inference_mode() -> None:
    model = nn.Sequential(
        prune.l1_unstructured(nn.Conv2d(3, 8, 3, bias=False), "weight", 0.5), nn.BatchNorm2d(8)
    ).eval()
    expected = model(X)
    with torch.inference_mode():
        calibrate(prepare(fold_batch_norm(model, X)), [X], progress=False)
    assert isinstance(model[1], nn.Identity)
    # 8 bits: half a step of weights and inputs in each of 27 products.
    torch.testing.assert_close(model(X), expected, rtol=0, atol=0.1)
    model(X).sum().backward()


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("how", ["calibrate", "load"])
def test_more_levels_when_the_optimizer_has_state(make: Any, how: str) -> None:
    model = calibrate(prepare(Head(2)), [X], progress=False)
    options = {"momentum": 0.9, "lr": 1.0} if make is torch.optim.SGD else {"lr": 1e-3}
    optimizer = make(parameter_groups(model, 0.0), **options)
    for _ in range(2):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    kept = optimizer.state[model.tower.weight]
    model.levels = 3
    if how == "calibrate":
        calibrate(model, [X], progress=False)
    else:
        model.load_state_dict(calibrate(prepare(Head(3)), [X], progress=False).state_dict())
    before = model.tower.input_quantizer.scale.detach().clone()
    assert before.shape == (3,)
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.step()
    assert optimizer.state[model.tower.weight] is kept
    assert bool((model.tower.input_quantizer.scale != before).all())
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    loss(model).backward()
    optimizer.step()


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = y + self.up(self.body(y))
        out: Tensor = self.fc(y.mean((2, 3)))
        return out


@pytest.mark.require("torchvision")
@pytest.mark.parametrize("placement", ["inputs", "producers"])
@pytest.mark.parametrize("foreach", [False, True])
def test_feature_extraction(foreach: bool, placement: str) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    model = prepare(Backbone(), foreach=foreach, placement=placement)
    calibrate(model, [X], progress=False)
    extract = create_feature_extractor(model, {"body.0": "body", "fc": "out"})
    seen: list[Tensor] = []
    model.body[0].register_forward_hook(lambda *call: seen.append(call[2]))
    for mode in (True, False):
        model.train(mode)
        extract.train(mode)
        expected = model(X)
        found = extract(X)
        torch.testing.assert_close(found["out"], expected)
        assert torch.equal(found["body"], seen[-1])
    found["out"].sum().backward()
    assert model.body[0].weight.grad is not None


def test_symbolic_trace_keeps_the_layers() -> None:
    model = calibrate(prepare(Backbone()), [X], progress=False).eval()
    traced = torch.fx.symbolic_trace(model)
    assert {n.target for n in traced.graph.nodes if n.op == "call_module"} >= {
        "stem.0",
        "body.0",
        "up",
        "fc",
    }
    torch.testing.assert_close(traced(X), model(X))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model."])
def test_a_prefix_of_the_keys_is_named(prefix: str) -> None:
    state = {f"{prefix}{key}": value for key, value in Backbone().state_dict().items()}
    model = prepare(Backbone())
    with pytest.raises(ValueError, match=rf"missing: .*unknown: .*have the prefix '{prefix}'"):
        load_float_state_dict(model, state)
    load_float_state_dict(model, {key.removeprefix(prefix): v for key, v in state.items()})
    assert torch.equal(float_state_dict(model)["fc.weight"], state[f"{prefix}fc.weight"])


def test_a_layer_that_is_a_formula_is_not_planned() -> None:
    class DFL(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 1, 1, bias=False).requires_grad_(False)
            self.conv.weight.data[:] = torch.arange(16.0).view(1, 16, 1, 1)

    model = nn.ModuleDict({"dfl": DFL(), "frozen": nn.Conv2d(3, 4, 1), "fc": nn.Linear(4, 4)})
    model["frozen"].requires_grad_(False)
    plan = plan_qat(model, QATConfig(4, 4), first=(), prediction=())
    assert list(plan) == ["frozen", "fc"]


def test_data_parallel_copies_are_refused() -> None:
    """nn.DataParallel: a copy would train with the weights and counters of its original."""
    model = prepare_qat(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)),
        QATConfig(4, 4, first="0", prediction="2"),
    )
    copy = model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        copy(torch.zeros(1, 3, 4, 4))
