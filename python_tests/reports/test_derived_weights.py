"""A weight that is made anew in every forward pass (pruning, weight norm, spectral norm,
parametrizations) was read as the last pass had left it, and written where the next one lost it.

Reports: https://github.com/openvinotoolkit/nncf/issues/3811 (pruned weights),
https://github.com/pytorch/pytorch/issues/47588 and 48181 (a weight that a forward pre-hook makes is
folded or copied).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from hqod_ops.quant import (
    QATConfig,
    calibrate,
    export_onnx,
    float_state_dict,
    fold_batch_norm,
    load_float_state_dict,
    prepare_qat,
    summary,
)


class Mask(nn.Module):
    """A parametrization without a right inverse."""

    keep: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("keep", (weight.abs() > weight.abs().median()).float())

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.keep


def masked(layer: Any) -> Any:
    parametrize.register_parametrization(layer, "weight", Mask(layer.weight))
    return layer


def _centre(module: Any, _args: Any) -> None:
    module.weight = module.raw - module.raw.mean()


def own_hook(layer: Any) -> Any:
    """A weight that a hook of the user makes."""
    layer.raw = nn.Parameter(layer.weight.detach().clone())
    del layer.weight
    layer.weight = layer.raw.detach().clone()
    layer.register_forward_pre_hook(_centre)
    return layer


KINDS: dict[str, Callable[[Any], Any]] = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "pruned twice": lambda layer: prune.ln_structured(
        prune.l1_unstructured(layer, "weight", 0.3), "weight", 0.25, n=2, dim=0
    ),
    "weight_norm": weight_norm,
    "weight_norm of all": lambda layer: weight_norm(layer, dim=None),
    "spectral_norm": spectral_norm,
    "parametrized weight_norm": parametrizations.weight_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
    "parametrized mask": masked,
    "own hook": own_hook,
}
REFUSED = ("spectral_norm", "parametrized spectral_norm", "own hook")
X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))

kinds = pytest.mark.parametrize("kind", KINDS)
# Torch's own about weight_norm and spectral_norm: parametrizations are newer.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def network(kind: str, factor: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3)
    with torch.no_grad():
        conv.weight.mul_(factor)
    return nn.Sequential(KINDS[kind](conv), nn.ReLU(), nn.Conv2d(8, 4, 1))


def prepared(kind: str, factor: float = 1.0, foreach: bool = False) -> nn.Sequential:
    config = QATConfig(8, 8, foreach=foreach)
    model = prepare_qat(network(kind, factor), config, first=(), prediction=())
    return calibrate(model, [X], progress=False)


def steps(model: nn.Module) -> list[float]:
    """Losses of some training steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@kinds
def test_together_trains_as_one_by_one(kind: str) -> None:
    alone, together = prepared(kind), prepared(kind, foreach=True)
    assert steps(alone) == steps(together)
    states = alone.state_dict(), together.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert torch.equal(alone.eval()(X), together.eval()(X))


@kinds
def test_calibration_after_loading_sees_what_was_loaded(kind: str) -> None:
    trained = prepared(kind, 10.0)
    model = prepare_qat(network(kind), QATConfig(8, 8), first=(), prediction=())
    load_float_state_dict(model, float_state_dict(trained))
    calibrate(model, [X], progress=False)
    expected: Any = trained[0]
    found: Any = model[0]
    # A hook of the user's is not asked for buffers, and the state has all that it reads.
    assert torch.equal(found.weight_quantizer.scale, expected.weight_quantizer.scale)
    assert torch.equal(model.eval()(X), trained.eval()(X))


@kinds
def test_a_weight_loaded_is_the_one_in_the_summary(kind: str) -> None:
    model, other = prepared(kind), prepared(kind, 0.01)
    model.load_state_dict(other.state_dict())
    rows, expected = summary(model), summary(other)
    assert rows[0].weight_zero == expected[0].weight_zero
    assert rows[0].weight_clipped == expected[0].weight_clipped


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "own hook"])
def test_size_counts_the_weight_that_is_deployed(kind: str) -> None:
    """Not what it is made from: masks, norms, vectors."""
    plain = prepare_qat(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)),
        QATConfig(8, 8),
        first=(),
        prediction=(),
    )
    sizes = summary(prepared(kind)), summary(plain)
    assert sizes[0].size_mb == pytest.approx(sizes[1].size_mb)
    assert sizes[0].float_size_mb == pytest.approx(sizes[1].float_size_mb)


@kinds
def test_folding_lasts_or_is_refused_by_name(kind: str) -> None:
    model = nn.Sequential(network(kind)[0], nn.BatchNorm2d(8))
    norm: Any = model[1]
    with torch.no_grad():
        norm.running_var.uniform_(0.2, 3)
        norm.running_mean.uniform_(-1, 1)
        norm.weight.uniform_(-1, 1)
    before = model.eval()(X)
    if kind in REFUSED:
        with pytest.warns(UserWarning, match="1: the batch normalisation stays.*weight is derived"):
            fold_batch_norm(model, X)
    else:
        fold_batch_norm(model, X)
    assert isinstance(model[1], nn.BatchNorm2d) == (kind in REFUSED)
    for _ in range(2):  # the weight is made anew in each
        # Rounding of a product of two float32 numbers, and of a norm of 27.
        torch.testing.assert_close(model(X), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [parametrizations.orthogonal, parametrizations.spectral_norm])
def test_a_refused_fold_changes_nothing(make: Any) -> None:
    """An orthogonal matrix has a right inverse, which sets more than one tensor."""
    model = nn.Sequential(make(nn.Linear(6, 6)), nn.BatchNorm1d(6)).eval()
    norm: Any = model[1]
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(4, 6)
    before = model(x)
    with pytest.warns(UserWarning, match="1: the batch normalisation stays"):
        fold_batch_norm(model, x)
    torch.testing.assert_close(model(x), before)


def test_pruning_a_prepared_model() -> None:
    model = prepare_qat(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)),
        QATConfig(8, 8, foreach=True),
        first=(),
        prediction=(),
    )
    calibrate(model, [X], progress=False)
    conv: Any = model[0]
    prune.l1_unstructured(conv, "weight", 0.5)
    model(X)
    with torch.no_grad():
        conv.weight_orig.zero_()
    y = model(X)  # of the biases alone
    torch.testing.assert_close(y, y[:1, :, :1, :1].expand_as(y))


def test_a_pruned_weight_keeps_what_is_pruned_when_it_is_folded() -> None:
    model = nn.Sequential(network("pruned")[0], nn.BatchNorm2d(8)).eval()
    conv: Any = model[0]
    orig, mask = conv.weight_orig.clone(), conv.weight_mask.clone()
    fold_batch_norm(model, X)
    assert torch.equal(conv.weight_orig[mask == 0], orig[mask == 0])
    assert torch.equal(conv.weight_mask, mask)


@pytest.mark.require("onnx", "onnxscript", "onnxruntime")
@kinds
@pytest.mark.parametrize("foreach", [False, True])
def test_export_right_after_a_step(kind: str, foreach: bool, tmp_path: Path) -> None:
    model = prepared(kind, foreach=foreach)
    steps(model)
    state = copy.deepcopy(model.state_dict())
    report = export_onnx(model, X, tmp_path / "model.onnx")
    assert report.steps <= 1 and report.storage["INT8"] >= 2
    after = model.state_dict()
    assert all(torch.equal(state[key], after[key]) for key in state)
    assert steps(model)  # the model trains on


def test_a_parametrized_layer_is_quantized_and_can_lose_its_parametrization() -> None:
    model = prepared("parametrized weight_norm")
    conv: Any = model[0]
    assert {"parametrizations.weight.original0", "parametrizations.weight.original1"} <= set(
        conv.state_dict()
    )
    y = model.eval()(X)
    assert torch.equal(copy.deepcopy(model)(X), y)
    parametrize.remove_parametrizations(conv, "weight")
    assert type(conv).__name__ == "QATConv2d"
    assert torch.equal(model(X), y)
