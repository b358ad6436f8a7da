"""The summary: shares of clipped and of zero values, and sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hqod_ops.quant import (
    QATConfig,
    Rule,
    calibrate,
    place_on_producers,
    prepare_qat,
    summary,
)


def test_shares_of_the_inputs_in_a_batch() -> None:
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    prepare_qat(model, QATConfig(4, 2, first=(), prediction=()))
    x = torch.tensor([[0.0, 0.4, 1.0, 2.0], [3.4, 3.6, 9.0, 0.5]])
    calibrate(model, [x], progress=False)
    model[0].input_quantizer.set_scale(torch.tensor([1.0]), signed=False)
    model.train()
    row = summary(model, x)[0]
    # Codes are 0..3: 3.6 and 9 are clipped; 0, 0.4 and, half to even, 0.5 round to 0.
    assert (row.act_clipped, row.act_zero) == ((2 / 8,), (3 / 8,))
    assert model.training
    assert summary(model)[0].act_clipped == ()
    assert summary(model, None, forward=lambda m, _: m(x))[0] == row
    table = str(summary(model, x)).splitlines()
    assert table[0].split()[-4:] == ["a", "clipped", "a", "zero"]
    assert table[2].split()[-2:] == ["25.0%", "37.5%"]


def test_shares_with_a_zero_point_a_channel_axis_and_a_transform() -> None:
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False))
    rules = [
        Rule("0", weight_quantizer="minmax", per_channel=True, act_quantizer="lsq_plus"),
        Rule("1", weight_quantizer="dorefa"),
    ]
    prepare_qat(model, QATConfig(2, 2, first=(), prediction=(), overrides=rules))
    x = torch.tensor([[-1.0, 2.0], [0.2, -9.0]])
    calibrate(model, [x], progress=False)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -4.0], [0.1, 0.3], [-0.4, 0.9]]))
        model[1].weight.copy_(torch.tensor([[20.0, -20.0, 0.1]]))
    weights = torch.tensor([1.0, 0.1, 1.0])
    model[0].weight_quantizer.set_scale(weights, signed=True)
    model[0].input_quantizer.set_scale(torch.tensor([1.0]), False, torch.tensor([1.0]))
    model[1].weight_quantizer.set_scale(torch.tensor([0.5]), signed=True)
    first, second = summary(model, x)
    # Codes -2..1 at scales 1, 0.1 and 1: -4 and 0.3 are clipped; -0.4 is 0.
    assert (first.weight_clipped, first.weight_zero) == pytest.approx((2 / 6, 1 / 6))
    # Codes 0..3 with 0 at code 1: values -1..2, of which -9 is clipped and 0.2 is 0.
    assert (first.act_clipped, first.act_zero) == ((0.25,), (0.25,))
    # tanh: 1, -1 and 0.1, in codes 2 (clipped to 1), -2 and 0.
    assert (second.weight_clipped, second.weight_zero) == pytest.approx((1 / 3, 1 / 3))
    assert (first.act_quantizer, second.weight_quantizer) == ("LSQPlus", "DoReFa")


def test_shares_of_every_level() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.layer(x), self.layer(0 * x)]

    model = prepare_qat(Head(), "w8a8")
    with pytest.warns(UserWarning, match="were 0"):
        calibrate(model, [torch.ones(2, 2)], progress=False)
    row = summary(model, torch.full((2, 2), 2.0))[0]
    assert (row.act_clipped, row.act_zero) == ((1.0, 0.0), (0.0, 1.0))


def test_sizes() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, bias=False), nn.Conv2d(8, 5, 1)
    )
    model[2].weight = nn.Parameter(torch.zeros(8, 8, 3, 3))
    tensors = [*model.parameters(), *model.buffers()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    config = QATConfig(
        4, 2, first="0", prediction=(), per_channel=True, overrides=[Rule("3", skip=True)]
    )
    prepare_qat(model, config)
    table = summary(model)
    assert table.float_size_mb == pytest.approx(size / 1e6)
    saved = 3 * 8 * 9 * 3 + 8 * 8 * 9 * 3.5
    # 8 scales for each of two weights, one for each of two inputs.
    assert table.size_mb == pytest.approx((size - saved + 4 * (16 + 2)) / 1e6)
    assert str(table).splitlines()[-1].startswith(f"{table.size_mb:.3g} MB, in float")


def test_a_batch_meets_the_error_of_an_uncalibrated_model() -> None:
    model = prepare_qat(nn.Sequential(nn.Linear(2, 2)), "w8a8")
    with pytest.raises(RuntimeError, match=r"0\.input_quantizer.*never calibrated"):
        summary(model, torch.ones(1, 2))


def test_an_absorbed_activation_is_shown() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    prepare_qat(model, QATConfig(4, 4, first=(), prediction=()))
    assert "absorbs" not in str(summary(model))
    place_on_producers(model)
    assert [row.absorbed for row in summary(model)] == ["", "relu", ""]
    assert "absorbs" in str(summary(model))
