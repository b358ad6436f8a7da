"""The LSQ quantizer alone: values, gradients, ways to keep the scale positive, state."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from hqod_ops import fake_quant, fake_quant_foreach
from hqod_ops.quant import (
    LSQ,
    QUANTIZERS,
    QATConfig,
    calibrate,
    prepare_qat,
    quantizer_parameters,
)
from hqod_ops.quant.quantizers.lsq import EPS, SCALE_MODES

X = (-1.2, -0.9, -0.3, 0.1, 0.26, 0.59, 0.7, 1.5)


def quantizer(scale: float = 0.4, bits: int = 2, signed: bool = True, mode: str = "abs") -> LSQ:
    made = LSQ(bits, scale_mode=mode)
    made.set_scale(torch.tensor([scale]), signed=signed)
    return made


def test_numbers_of_the_official_code() -> None:
    # Made with the official code; g = 1 / sqrt(8 elements * qmax 1).
    x = torch.tensor(X, requires_grad=True)
    q = quantizer()
    y = q(x)
    y.sum().backward()
    torch.testing.assert_close(y, torch.tensor([-0.8, -0.8, -0.4, 0.0, 0.4, 0.4, 0.4, 0.4]))
    assert x.grad is not None and q.scale.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 0, 0]
    assert q.scale.grad.item() == pytest.approx(-0.132582426, rel=1e-6)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_value_and_gradients_by_hand(bits: int, signed: bool) -> None:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    x = (torch.randn(500) * 0.17 * high).requires_grad_()
    upstream = torch.randn(500)
    q = quantizer(0.13, bits, signed)
    q(x).backward(upstream)
    slope = 0.0
    for value, grad in zip(x.tolist(), upstream.tolist(), strict=True):
        # Python's round is half to even too.
        ratio = value / q.scale.item()
        code = round(ratio)
        slope += grad * (min(max(code, low), high) if not low <= code <= high else code - ratio)
    assert q.scale.grad is not None and x.grad is not None
    assert q.scale.grad.item() == pytest.approx(slope / math.sqrt(500 * high), rel=1e-4)
    codes = (x / q.scale).round()
    assert torch.equal(x.grad, upstream * ((codes >= low) & (codes <= high)))


def test_per_channel_weight() -> None:
    w = torch.randn(3, 4, 2, 2)
    q = LSQ(4, signed=True, ch_axis=0, channels=3)
    scale = torch.tensor([0.1, 0.2, 0.3])
    q.set_scale(scale, signed=True)
    y = q(w)
    y.sum().backward()
    assert q.scale.grad is not None
    for index in range(3):
        alone = quantizer(scale[index].item(), 4)
        assert torch.equal(alone(w[index]), y[index])
        alone(w[index]).sum().backward()
        assert alone.scale.grad is not None
        torch.testing.assert_close(q.scale.grad[index], alone.scale.grad[0])


@pytest.mark.parametrize("mode", SCALE_MODES)
def test_every_mode_starts_with_the_scale_it_is_given(mode: str) -> None:
    for scale in (1e-6, 0.003, 0.4, 30.0):
        q = quantizer(scale, mode=mode)
        assert q.effective_scale().item() == pytest.approx(scale, rel=1e-4)


@pytest.mark.parametrize(
    ("mode", "value", "expected", "slope"),
    [
        ("abs", -0.4, 0.4, -1.0),  # of reading it; a forward pass in training folds, see below
        ("abs", 1e-9, EPS, 0.0),
        ("clamp", -0.4, EPS, 1.0),
        ("clamp", -1e6, EPS, 1.0),
        ("clamp", 0.4, 0.4, 1.0),
        ("softplus", -3.0, math.log1p(math.exp(-3)), 1 / (1 + math.exp(3))),
        ("softplus", -20.0, EPS, 1 / (1 + math.exp(20))),
        ("raw", -0.4, -0.4, 1.0),
    ],
)
def test_positive_modes(mode: str, value: float, expected: float, slope: float) -> None:
    q = quantizer(mode=mode)
    with torch.no_grad():
        q.scale.fill_(value)
    scale = q.effective_scale()
    scale.sum().backward()
    assert scale.item() == pytest.approx(expected, rel=1e-6)
    assert q.scale.grad is not None
    assert q.scale.grad.item() == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("mode", ["abs", "clamp", "softplus"])
def test_a_scale_pushed_below_zero_stays_usable(mode: str) -> None:
    q = quantizer(mode=mode)
    optimizer = torch.optim.SGD(q.parameters(), lr=1.0)
    x = torch.randn(100)
    for _ in range(20):
        optimizer.zero_grad()
        (10 * q.effective_scale() + q(x).sum() * 0).sum().backward()
        optimizer.step()
        assert q.effective_scale().item() > 0
        assert torch.isfinite(q(x)).all()


@pytest.mark.parametrize("name", ["lsq", "lsq_plus", "dsq", "pact"])
@pytest.mark.parametrize("value", [-0.4, -1e-9, 0.0, 1e-9, 0.3])
def test_training_writes_the_positive_scale_back_as_the_official_code(
    name: str, value: float
) -> None:
    q = QUANTIZERS[name](4, signed=True)
    q.set_scale(torch.tensor([0.4, 0.5]), [True, True])
    parameter = getattr(q, q.values[0])
    with torch.no_grad():
        parameter[0] = value
    x = torch.randn(100)
    y = [q(x), q(x)]  # the second level in between, as in a shared head
    q.reset_level()
    y += [q(x), q(x)]
    folded = max(abs(value), EPS)
    assert parameter[0].item() == pytest.approx(folded, rel=1e-6)
    sum(output.square().sum() for output in y).backward()
    other = QUANTIZERS[name](4, signed=True)
    other.set_scale(torch.tensor([0.4, 0.5]), [True, True])
    with torch.no_grad():
        getattr(other, q.values[0])[0] = folded
    (2 * other(x).square().sum() + 2 * other(x).square().sum()).backward()
    assert torch.isfinite(parameter.grad).all() and parameter.grad[0] != 0
    torch.testing.assert_close(parameter.grad, getattr(other, q.values[0]).grad)


def test_reading_evaluating_and_exporting_leave_the_parameter_alone() -> None:
    q, x = quantizer(), torch.randn(2, 3)
    with torch.no_grad():
        q.scale.fill_(-0.4)
    program = torch.export.export(q, (x,))
    assert torch.equal(q.eval()(x), program.module()(x))
    assert q.effective_scale().item() == pytest.approx(0.4) and q.scale.item() < 0


def test_a_parameter_that_crosses_zero_follows_the_official_code() -> None:
    """With momentum, whose sign folding does not touch."""
    torch.manual_seed(0)
    x = torch.randn(64)
    q, v = quantizer(0.1, 4), torch.tensor([0.1], requires_grad=True)
    optimizers = [torch.optim.SGD([p], lr=0.01, momentum=0.9) for p in (q.scale, v)]
    folded = 0
    for _ in range(10):
        with torch.no_grad():
            folded += int(v.item() < 0)
            v.abs_().clamp_(min=EPS)
        pair = q(x), fake_quant(x, v, quant_min=-8, quant_max=7, grad_scale="lsq")
        for y, optimizer in zip(pair, optimizers, strict=True):
            optimizer.zero_grad()
            (50 * y.square().sum()).backward()
            optimizer.step()
        assert torch.equal(q.scale, v)
    assert folded


@pytest.mark.parametrize("foreach", [False, True])
def test_folding_compiled_and_together(foreach: bool) -> None:
    config = QATConfig(4, 4, edge_bits=4, foreach=foreach)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = calibrate(prepare_qat(model, config), [torch.randn(8, 4)], progress=False)
    with torch.no_grad():
        for scale in quantizer_parameters(model):
            scale.neg_()
    twin, x = copy.deepcopy(model), torch.randn(8, 4)
    torch._dynamo.reset()
    for run in (model, torch.compile(twin, backend="aot_eager", fullgraph=True)):
        run(x).square().sum().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a.grad, b.grad)
    assert all((scale > 0).all() for scale in quantizer_parameters(twin))


def test_uncalibrated_use_is_an_error() -> None:
    q = LSQ(4)
    q.label = "head.conv.input_quantizer"
    with pytest.raises(RuntimeError, match=r"head\.conv\.input_quantizer.*never calibrated"):
        q(torch.randn(3))
    with pytest.raises(RuntimeError, match="never calibrated"):
        copy.deepcopy(q)(torch.randn(3))
    other = LSQ(4)
    other.load_state_dict(q.state_dict())
    with pytest.raises(RuntimeError, match="never calibrated"):
        other(torch.randn(3))


def test_disabled_and_observing_quantizers_pass_x_through() -> None:
    q, x = quantizer(), torch.randn(10)
    q.enabled = False
    assert q(x) is x
    q.enabled = True
    q.start_observing()
    assert q(x) is x
    q.stop_observing()
    assert not torch.equal(q(x), x)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("shape", [(1,), (3,)])
def test_state_dict_carries_scale_sign_bits_and_levels(shape: tuple[int], assign: bool) -> None:
    q = LSQ(4)
    signs = [index % 2 == 0 for index in range(shape[0])]
    q.set_scale(torch.rand(shape) + 0.1, signed=signs)
    other = LSQ(4)
    held = other.scale
    other.load_state_dict(q.state_dict(), assign=assign)
    assert other.levels == shape[0]
    assert [other.codes(level) for level in range(other.levels)] == [
        (-8, 7) if sign else (0, 15) for sign in signs
    ]
    assert torch.equal(other.scale, q.scale)
    # An optimizer made before loading must go on training the same parameter.
    assert assign or other.scale is held
    duplicate = copy.deepcopy(other)
    assert duplicate.codes() == q.codes()
    with torch.no_grad():
        duplicate.scale.zero_()
    assert torch.equal(other.scale, q.scale)


def test_loading_an_uncalibrated_state_takes_the_calibration_back() -> None:
    q = quantizer()
    q.load_state_dict(LSQ(2).state_dict())
    assert not q.calibrated


def test_a_checkpoint_of_other_bits_or_layout_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"code_range.*\(4 bits\).*\[-2, 1\]"):
        LSQ(4).load_state_dict(quantizer(bits=2).state_dict())
    with pytest.raises(RuntimeError, match=r"code_range.*\[-8, 7\].*\[0, 15\]"):
        LSQ(4, signed=True).load_state_dict(quantizer(bits=4, signed=False).state_dict())
    per_channel = LSQ(4, signed=True, ch_axis=0, channels=3)
    per_channel.set_scale(torch.rand(3) + 0.1, signed=True)
    with pytest.raises(RuntimeError, match="expected shape"):
        LSQ(4, signed=True).load_state_dict(per_channel.state_dict())
    with pytest.raises(RuntimeError, match="all of the keys scale, code_range, got scale alone"):
        LSQ(4).load_state_dict({"scale": torch.ones(1)})
    with pytest.raises(RuntimeError, match="Missing key"):
        LSQ(4).load_state_dict({})


def test_bad_arguments() -> None:
    for bits in (1, 9):
        with pytest.raises(ValueError, match="bits"):
            LSQ(bits)
    with pytest.raises(ValueError, match=r"scale_mode.*'exp'"):
        LSQ(4, scale_mode="exp")
    with pytest.raises(ValueError, match=r"observer.*'median'"):
        LSQ(4, observer="median")
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="positive"):
            LSQ(4).set_scale(torch.tensor([bad]), signed=True)
    with pytest.raises(ValueError, match="one scale a level"):
        LSQ(4).set_scale(torch.ones(3), signed=[True, False])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_inputs_keep_their_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(64).to(dtype).requires_grad_()
    q = quantizer(bits=8)
    y = q(x)
    y.sum().backward()
    assert y.dtype == dtype and x.grad is not None and x.grad.dtype == dtype
    assert q.scale.grad is not None and q.scale.grad.dtype == torch.float32


@pytest.mark.parametrize("mode", SCALE_MODES)
def test_compiles_without_a_break(mode: str) -> None:
    q = quantizer(bits=4, mode=mode)
    x = torch.randn(4, 8)

    def run(call: object) -> tuple[Tensor, Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        q.scale.grad = None
        y = call(leaf)  # type: ignore[operator]
        (y * torch.arange(8.0)).sum().backward()
        assert leaf.grad is not None and q.scale.grad is not None
        return y.detach(), leaf.grad, q.scale.grad

    torch._dynamo.reset()
    for eager, compiled in zip(
        run(q), run(torch.compile(q, fullgraph=True, backend="aot_eager")), strict=True
    ):
        torch.testing.assert_close(eager, compiled)


def test_what_a_subclass_changes_is_not_passed_by() -> None:
    """LSQ's own short cuts, for weights together and for activations, are not a subclass's."""

    class Halved(LSQ):
        def transform(self, x: Tensor, level: int = 0) -> Tensor:
            return x / 2

    quantizer, x = Halved(4), torch.linspace(-2, 2, 33)
    quantizer.set_scale(torch.tensor([0.1]), signed=True)
    form = quantizer.foreach_form(x)
    assert form is not None and form.scale_mode is None and not quantizer.absorbs
    low, high = form.codes
    (y,) = fake_quant_foreach([form.x], [form.scale], None, quant_min=[low], quant_max=[high])
    assert torch.equal(y, quantizer(x))
    assert LSQ(4).absorbs
