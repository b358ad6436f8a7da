"""Models whose convolutions are a subclass of ``nn.Conv2d``, with a norm or an activation around
``F.conv2d``, had no layer to quantize.

Reports: https://github.com/facebookresearch/detectron2/issues/2395 (``detectron2.layers.Conv2d``);
timm's padded and weight-standardized convolutions are of the kind.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from hqod_ops.quant import (
    QATConfig,
    Rule,
    calibrate,
    export_onnx,
    float_state_dict,
    placement,
    plan_qat,
    prepare_qat,
    summary,
)


class Wrapper(nn.Conv2d):
    """As detectron2's: norm and activation inside."""

    def __init__(self, *args: Any, norm: Any = None, activation: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


class Same(nn.Conv2d):
    """As timm's: padded by hand."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Keywords(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(weight=self.weight, input=x, bias=self.bias)


class Calls(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Adds(nn.Conv2d):
    """Adds a method and leaves the forward alone."""

    def size(self) -> int:
        return self.weight.numel()


class LoRA(nn.Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.down = nn.Parameter(torch.randn(2, self.in_features))
        self.up = nn.Parameter(torch.randn(self.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.down), self.up)


class Up(nn.ConvTranspose2d):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return F.relu(F.conv_transpose2d(x, self.weight, self.bias, self.stride))


class Standardized(nn.Conv2d):
    """The convolution has another weight than the layer."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias)


class Twice(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight) + F.conv2d(x.flip(-1), self.weight)


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LAYERS: dict[str, tuple[Any, ...]] = {
    "wrapper": (Wrapper, 3, 6, 3),
    "same": (Same, 3, 6, 2),
    "keywords": (Keywords, 3, 6, 3),
    "calls": (Calls, 3, 6, 3),
    "adds": (Adds, 3, 6, 3),
    "up": (Up, 3, 6, 2),
    "lora": (LoRA, 8, 6),
}
layers = pytest.mark.parametrize("name", LAYERS)


def make(name: str) -> Any:
    torch.manual_seed(0)
    kind, *arguments = LAYERS[name]
    if kind is Wrapper:
        return Wrapper(*arguments, norm=nn.BatchNorm2d(6), activation=nn.ReLU())
    return kind(*arguments)


def prepare(model: Any, *bits: Any, **settings: Any) -> Any:
    return prepare_qat(model, QATConfig(*bits, **settings), first=(), prediction=())


def prepared(name: str, **settings: Any) -> Any:
    return calibrate(prepare(nn.Sequential(make(name)), 4, 8, **settings), [X], progress=False)


@layers
@pytest.mark.parametrize("foreach", [False, True])
def test_the_convolution_is_quantized_and_the_rest_stays(name: str, foreach: bool) -> None:
    model = prepared(name, foreach=foreach).eval()
    plain = make(name).eval()
    layer = model[0]
    assert isinstance(layer, type(plain)) and isinstance(model, nn.Sequential)
    with torch.no_grad():
        scale = layer.weight_quantizer.effective_scale()
        plain.weight.copy_((plain.weight / scale).round().clamp(-8, 7) * scale)
    step = layer.input_quantizer.effective_scale()
    low, high = layer.input_quantizer.codes()
    if name == "lora":  # its other product has the input as it is
        on_grid = (X / step).round().clamp(low, high) * step
        expected = F.linear(on_grid, plain.weight, plain.bias)
        expected = expected + F.linear(F.linear(X, plain.down), plain.up)
    else:
        expected = plain((X / step).round().clamp(low, high) * step)
    torch.testing.assert_close(model(X), expected)
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected)


@layers
def test_plan_summary_and_rules_know_it(name: str) -> None:
    kind = LAYERS[name][0]
    plan = plan_qat(nn.Sequential(make(name)), QATConfig(4, 8), first=(), prediction=())
    assert plan["0"].type == kind.__name__ and plan["0"].weight_bits == 4
    (row,) = summary(prepared(name))
    assert (row.type, row.weight_bits, row.act_bits) == (kind.__name__, 4, 8)
    base = kind.__mro__[1].__name__
    model = prepare(nn.Sequential(make(name)), 4, 8, overrides=(Rule(type=base, weight_bits=3),))
    assert summary(model)[0].weight_bits == 3


@layers
def test_it_trains_and_is_copied(name: str) -> None:
    model = prepared(name)
    assert float_state_dict(model).keys() == nn.Sequential(make(name)).state_dict().keys()
    model(X).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model[0].parameters())
    y = model.eval()(X)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again[0]) is type(model[0]) and torch.equal(again(X), y)
        with torch.no_grad():
            again[0].weight.zero_()
    assert torch.equal(model(X), y)


@pytest.mark.parametrize("kind", [Standardized, Twice])
def test_what_computes_with_another_weight_is_named(kind: Any) -> None:
    model = nn.Sequential(kind(3, 6, 3), nn.Conv2d(6, 4, 1))
    text = rf"0 \({kind.__name__}\): its forward does not give its weight to conv2d once"
    with pytest.warns(UserWarning, match=text):
        prepare(model, 8, 8)
    assert type(model[0]) is kind


def test_a_forward_that_fails_alone_is_named() -> None:
    class Asks(nn.Conv2d):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
            return F.conv2d(x * scale, self.weight)

    model = nn.Sequential(Asks(3, 6, 3), nn.Conv2d(6, 4, 1))
    with pytest.warns(UserWarning, match=r"0 \(Asks\): its forward cannot be run alone: TypeErr"):
        prepare(model, 8, 8)


def test_looking_at_a_layer_changes_nothing() -> None:
    layer = make("wrapper").train()
    before = copy.deepcopy(layer.state_dict())
    calls: list[object] = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    plan_qat(nn.Sequential(layer), QATConfig(8, 8), first=(), prediction=())
    assert not calls and layer.training and layer.norm.training
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_pruned() -> None:
    model = nn.Sequential(prune.l1_unstructured(make("adds"), "weight", 0.5), nn.ReLU())
    calibrate(prepare(model, 8, 8), [X], progress=False)
    assert summary(model)[0].weight_zero == pytest.approx(0.5, abs=0.02)


def test_quantizers_on_the_producers() -> None:
    model = nn.Sequential(make("wrapper"), nn.ReLU(), Wrapper(6, 6, 1), nn.ReLU(), Same(6, 4, 2))
    calibrate(prepare(model, 8, 8, placement="producers"), [X], progress=False)
    assert "1" in str(placement(model))
    assert torch.isfinite(model(X)).all()


@pytest.mark.require("onnx", "onnxscript", "onnxruntime")
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "lora"])
def test_export(name: str, tmp_path: Path) -> None:
    report = export_onnx(prepared(name), X, tmp_path / "model.onnx")
    assert report.steps <= 1 and sum(report.storage.values()) == 2


def test_compiled() -> None:
    model = prepared("wrapper").eval()
    expected = model(X)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(X), expected)
