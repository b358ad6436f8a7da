"""Attention and transformers: three quarters of ``nn.MultiheadAttention`` stayed in float without a
word, and in evaluation torch's fast path passed by the quantizers of the layers around it.

Reports: https://github.com/pytorch/pytorch/issues/118165 (``in_proj_weight`` is not quantized),
128413 and 132700 (the fast path reads the weights of the layers itself).
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
    load_float_state_dict,
    parameter_groups,
    plan_qat,
    prepare_qat,
    summary,
)
from hqod_ops.quant.quantizers import Quantizer

PARTS = ["in_proj_q", "in_proj_k", "in_proj_v", "out_proj"]


def prepare(model: Any, *bits: Any, **settings: Any) -> Any:
    return prepare_qat(model, QATConfig(*bits, **settings), first=(), prediction=())


class Encoder(nn.Module):
    """Tokens of an image, an encoder, a head."""

    def __init__(self, layers: int = 0, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        settings = {"batch_first": True, "dropout": 0.0} | settings
        layer = nn.TransformerEncoderLayer(16, 4, 32, **settings)
        self.stem = nn.Conv2d(3, 16, 3)
        self.body = nn.TransformerEncoder(layer, layers) if layers else layer
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        y: Tensor = self.head(self.body(tokens, src_key_padding_mask=padding))
        return y


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PADDING = torch.arange(36)[None] >= torch.tensor([36, 30, 20, 10])[:, None]


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("bits", [(2, 32), (32, 4), (4, 4)])
def test_evaluation_is_quantized_without_gradients_too(
    layers: int, padding: Tensor | None, foreach: bool, bits: tuple[int, int]
) -> None:
    model = prepare(Encoder(layers), *bits, foreach=foreach)
    calibrate(model, [X], progress=False)
    for module in (model, copy.deepcopy(model)):
        module.eval()
        expected = module(X, padding)
        with torch.no_grad():
            assert torch.equal(module(X, padding), expected)
        with torch.inference_mode():
            assert torch.equal(module(X, padding), expected)


def test_a_weight_that_is_read_past_its_layer_is_named() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.stem(x).mean((2, 3)), self.head.weight)

    with pytest.warns(UserWarning, match="^head: the weight has a quantizer, but no call"):
        calibrate(prepare(Reads(), 4, 32), [X], progress=False)
    with pytest.raises(ValueError, match="^head: no data reached.*reads its weight"):
        calibrate(prepare(Reads(), 4, 4), [X], progress=False)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"kdim": 12, "vdim": 20},
    {"kdim": 12, "vdim": 20, "bias": False, "batch_first": True},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("batched", [True, False], ids=["batch", "single"])
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "output"])
@pytest.mark.parametrize("masked", [None, "bool", "float", "heads"])
def test_attention_without_rounding_is_torchs(
    options: dict[str, Any], batched: bool, need_weights: bool, masked: str | None
) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, **options).double()
    query = torch.randn(5, 3, 16, dtype=torch.float64)
    key = torch.randn(7, 3, options.get("kdim", 16), dtype=torch.float64)
    value = torch.randn(7, 3, options.get("vdim", 16), dtype=torch.float64)
    inputs = [query, key, value]
    if not batched:
        inputs = [x[:, 0] for x in inputs]
    elif options.get("batch_first"):
        inputs = [x.transpose(0, 1) for x in inputs]
    call: dict[str, Any] = {"need_weights": need_weights}
    if masked is not None:
        allowed = torch.rand(5, 7) < 0.7
        allowed[:, 0] = True
        padding = torch.arange(7) > torch.tensor([6, 5, 3])[:, None]
        mask, padded = ~allowed, padding if batched else padding[0]
        if masked == "heads":
            mask = mask.repeat((12 if batched else 4), 1, 1)
            call["average_attn_weights"] = False
        if masked == "float":
            mask, padded = (
                torch.zeros(m.shape, dtype=torch.float64).masked_fill(m, -torch.inf)
                for m in (mask, padded)
            )
        call |= {"attn_mask": mask, "key_padding_mask": padded}
    expected = attention(*inputs, **call)
    prepared = prepare(copy.deepcopy(attention), 8, 8)
    for module in prepared.modules():
        if isinstance(module, Quantizer):
            module.enabled = False
    found = prepared(*inputs, **call)
    torch.testing.assert_close(found, expected)  # in float64: 1e-7


def test_all_projections_are_quantized_at_the_bits_of_linear_layers() -> None:
    plan = plan_qat(Encoder(), QATConfig(4, 8), first=(), prediction=())
    names = [f"body.self_attn.{part}" for part in PARTS]
    assert [name for name in plan if "self_attn" in name] == names
    assert all((plan[name].weight_bits, plan[name].act_bits) == (4, 8) for name in names)
    rows = {row.name: row for row in summary(prepare(Encoder(), 4, 8))}
    assert all((rows[name].weight_bits, rows[name].act_bits) == (4, 8) for name in names)
    rule = Rule(type="Linear", weight_bits=3)
    plan = plan_qat(Encoder(), QATConfig(4, 8, overrides=(rule,)), first=(), prediction=())
    assert [plan[name].weight_bits for name in names] == [3, 3, 3, 3]


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_weights_and_inputs_lie_on_their_grids(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, **options)
    sizes = 16, options.get("kdim", 16), options.get("vdim", 16)
    inputs = [torch.randn(5, 3, size) for size in sizes]
    model = prepare(copy.deepcopy(attention), 4, 8)
    calibrate(model, [inputs], forward=lambda m, x: m(*x), progress=False)
    tables = attention.in_proj_weight
    weights = (
        tables.chunk(3)
        if tables is not None
        else (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
    )
    bias = attention.in_proj_bias
    parts: list[Any] = [None] * 3 if bias is None else list(bias.chunk(3))
    for name, weight, part, x in zip(PARTS, weights, parts, inputs, strict=False):
        layer = getattr(model, name)
        w_scale = layer.weight_quantizer.effective_scale()
        x_scale = layer.input_quantizer.effective_scale()
        low, high = layer.input_quantizer.codes()
        on_grid = F.linear(
            (x / x_scale).round().clamp(low, high) * x_scale,
            (weight / w_scale).round().clamp(-8, 7) * w_scale,
            part,
        )
        torch.testing.assert_close(layer(x), on_grid)


def test_training_checkpoints_and_copies() -> None:
    model = prepare(Encoder(), 4, 4)
    reference = Encoder()
    assert float_state_dict(model).keys() == reference.state_dict().keys()
    load_float_state_dict(model, reference.state_dict())
    calibrate(model, [X], progress=False)
    before = model.body.self_attn.in_proj_weight.detach().clone()
    optimizer = torch.optim.SGD(parameter_groups(model, 0.0), lr=0.1)
    model(X).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.dim() > 1)
    optimizer.step()
    moved = (model.body.self_attn.in_proj_weight != before).reshape(3, -1).any(dim=1)
    assert moved.tolist() == [True, True, True]
    other = prepare(Encoder(), 4, 4)
    other.load_state_dict(model.state_dict())
    y = model.eval()(X)
    for again in (other.eval(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(X), y)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.body.self_attn.in_proj_weight.zero_()
    assert not torch.equal(twin(X), y) and torch.equal(model(X), y)


def test_together_as_one_by_one() -> None:
    models = [
        calibrate(prepare(Encoder(), 4, 4, foreach=f), [X], progress=False) for f in (False, True)
    ]
    for model in models:
        model(X).square().mean().backward()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_pruned_projection() -> None:
    model = Encoder()
    prune.l1_unstructured(model.body.self_attn, "in_proj_weight", 0.5)
    calibrate(prepare(model, 8, 8), [X], progress=False)
    rows = {row.name: row for row in summary(model)}
    zero = sum(rows[f"body.self_attn.{part}"].weight_zero or 0 for part in PARTS[:3]) / 3
    assert zero == pytest.approx(0.5, abs=0.02)  # and what rounds to 0


def test_what_is_skipped_stays_torchs() -> None:
    skip = Rule("body.self_attn.*", skip=True)
    model = prepare(Encoder(), 4, 4, overrides=(skip,))
    assert type(model.body.self_attn) is nn.MultiheadAttention
    calibrate(model, [X], progress=False)
    y = model.eval()(X)
    with torch.no_grad():
        torch.testing.assert_close(model(X), y)


def test_a_subclass_of_attention_is_named() -> None:
    class Odd(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model = nn.ModuleList([Odd(16, 4), nn.Linear(4, 4)])
    with pytest.warns(UserWarning, match=r"0 \(Odd\): it is a subclass of MultiheadAttention"):
        plan = plan_qat(model, QATConfig(8, 8), first=(), prediction=())
    assert list(plan) == ["1"]


@pytest.mark.require("onnx", "onnxscript", "onnxruntime")
def test_export(tmp_path: Path) -> None:
    model = calibrate(prepare(Encoder(), 8, 8), [X], progress=False).eval()
    report = export_onnx(model, X, tmp_path / "model.onnx")
    assert report.steps <= 1
    # 4 projections, 2 linear layers, the stem and the head; each with an input.
    assert report.storage["INT8"] + report.storage["UINT8"] == 16


def test_compiled() -> None:
    model = calibrate(prepare(Encoder(), 8, 8), [X], progress=False).eval()
    expected = model(X)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(X), expected)
