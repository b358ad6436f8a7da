"""Batch normalisations folded into the layers before them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hqod_ops.quant import QATConfig, fold_batch_norm, prepare_qat


class Net(nn.Module):
    """Every kind of layer with a batch norm behind it, and batch norms that cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4, eps=1e-2)
        self.grouped = nn.ConvTranspose2d(4, 8, 2, stride=2, groups=2)
        self.grouped_norm = nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 8, 3, padding=1)  # called twice, as its norm is
        self.head_norm = nn.BatchNorm2d(8)
        self.read = nn.Conv2d(8, 8, 1)  # its output goes to a residual addition too
        self.read_norm = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 6)
        self.linear_norm = nn.BatchNorm1d(6, affine=False)
        self.last_norm = nn.BatchNorm1d(6)  # behind a ReLU

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu_()
        x = self.grouped_norm(self.grouped(x)).relu_()
        x = self.head_norm(self.head(x)) + self.head_norm(self.head(0.5 * x))
        y = self.read(x)
        assert y.shape == x.shape  # looking at a shape is no reading
        x = self.read_norm(y) + y
        x = self.linear_norm(self.linear(x.mean(dim=(2, 3))))
        out: Tensor = self.last_norm(x.relu())
        return out


def image(seed: int = 0) -> Tensor:
    return torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def made() -> Net:
    """With statistics, weights and biases as after a training."""
    torch.manual_seed(0)
    model = Net()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.3, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, -2.0, 2.0)
                nn.init.normal_(module.bias)
    return model


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers() if "running" in name}


@pytest.mark.parametrize("training", [False, True])
def test_folding_keeps_what_the_model_computes(training: bool) -> None:
    model = made().eval()
    expected = model(image())
    parameters = {id(p) for p in model.conv.parameters()}
    model.train(training)
    before = statistics(model)
    with pytest.warns(UserWarning, match=r"stay: read_norm, last_norm$"):
        fold_batch_norm(model, image(1))
    assert model.training is training and model.last_norm.training is training
    after = statistics(model)
    assert all(torch.equal(before[name], value) for name, value in after.items())
    folded = [name for name, m in model.named_modules() if type(m) is nn.Identity]
    assert folded == ["norm", "grouped_norm", "head_norm", "linear_norm"]
    assert parameters < {id(p) for p in model.conv.parameters()}  # the weight's, and a bias
    torch.testing.assert_close(model.eval()(image()), expected, rtol=1e-4, atol=1e-5)


def test_folding_what_others_share() -> None:
    """A tied weight, a layer called without its norm, an output that the model returns."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tied = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            self.tied[1].weight = self.tied[0].weight
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
            self.norms = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(4))

        def forward(self, x: Tensor) -> Any:
            x = self.tied[1](self.norms[0](self.tied[0](x)))
            x = self.norms[1](self.layers[0](x)) + self.layers[0](x)
            x = self.norms[2](self.layers[1](x)) + self.norms[2](self.layers[2](x))
            out = self.layers[3](x)
            return {"raw": out, "normal": self.norms[3](out)}

    model = Shared()
    state = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match=r"norms\.0, norms\.1, norms\.2, norms\.3$"):
        fold_batch_norm(model, torch.randn(3, 4))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.require("torchvision")
def test_folding_torchvisions_frozen_batch_norm() -> None:
    from torchvision.ops import FrozenBatchNorm2d

    model = nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4))
    for buffer in model[1].buffers():
        buffer.uniform_(0.5, 2.0)
    expected = model(image())
    fold_batch_norm(model, image())
    assert type(model[1]) is nn.Identity
    torch.testing.assert_close(model(image()), expected)


def test_folding_needs_an_example() -> None:
    model = made()
    with pytest.raises(ValueError, match="example: expected a batch"):
        prepare_qat(model, QATConfig(8, 8, first=(), prediction=(), batch_norm="fold"))
    assert type(model.conv) is nn.Conv2d and type(model.norm) is nn.BatchNorm2d


class Odd(nn.Module):
    """Two layers and their norms, with what is tested between them."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.between = between
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.other = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.reader = Reader()

    def forward(self, x: Tensor) -> Any:
        return self.other(self.second(self.between(self, self.first(x))))


class Reader(nn.Module):
    """Reads what it was not called with."""

    seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return x + self.seen


def peek(m: Any, x: Tensor) -> Tensor:
    m.reader.seen = x
    out: Tensor = m.reader(m.norm(x))
    return out


@pytest.mark.parametrize(
    ("between", "folded"),
    [
        (lambda m, x: m.norm(input=x), True),
        (lambda m, x: checkpoint(m.norm, x, use_reentrant=False), True),
        (lambda m, x: m.norm(x) if x.shape[0] * x.size(1) else x, True),
        (lambda m, x: m.norm(x) if x.sum() < 1e9 else x, False),
        (lambda m, x: m.norm(F.dropout(x, 0.5, m.training)), False),
        (lambda m, x: m.norm(x.relu_()), False),
        (lambda m, x: m.norm(x[:]), False),
        (lambda m, x: m.norm(x) + F.linear(input=x, weight=torch.eye(4)), False),
        (lambda m, x: torch.stack([m.norm(x), x])[0], False),
        (peek, False),
    ],
    ids=[
        "keyword",
        "checkpoint",
        "shape",
        "value",
        "itself",
        "inplace",
        "view",
        "late",
        "list",
        "inside",
    ],
)
def test_what_reads_a_layer(between: Any, folded: bool) -> None:
    torch.manual_seed(0)
    model = Odd(between).eval()
    for norm in (model.norm, model.other):
        assert norm.running_mean is not None
        norm.running_mean.normal_()
        nn.init.uniform_(norm.weight, 0.5, 2.0)
    x = torch.randn(3, 4)
    expected = model(x)
    if folded:
        fold_batch_norm(model, x)
    else:
        with pytest.warns(UserWarning, match="stay: norm$"):
            fold_batch_norm(model, x)
    assert isinstance(model.norm, nn.Identity) is folded and isinstance(model.other, nn.Identity)
    torch.testing.assert_close(model(x), expected)
