"""What a prepared model does around its forward pass, and where it quantizes by its settings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hqod_ops.quant import (
    QATConfig,
    calibrate,
    place_on_producers,
    placement,
    prepare_qat,
    use_level_batch_norm,
)
from python_tests.quant.dataflow.test_producers import (
    Block,
    Chain,
    Net,
    assert_same,
    images,
    made,
    step,
)


def test_as_a_setting() -> None:
    model, report = made()
    config = QATConfig(4, 4, first=(), prediction=(), placement="producers")
    torch.manual_seed(0)
    other = prepare_qat(Net(), config)
    assert placement(other) == report
    assert_same(step(calibrate(other, [images(1), images(2)], progress=False).train()), step(model))
    with pytest.raises(ValueError, match="not placed on producers yet"):
        place_on_producers(prepare_qat(Net(), config))
    weights_alone = QATConfig(4, 32, first=(), prediction=(), placement="producers")
    assert not placement(prepare_qat(Net(), weights_alone)).placed


def test_one_hook_of_each_kind() -> None:
    """However much a prepared model has to do around its forward pass."""
    net = use_level_batch_norm(nn.Sequential(Block(3, 4), nn.BatchNorm2d(4)), "1", levels=1)
    config = QATConfig(
        4, 4, first=(), prediction=(), foreach=True, batch_norm="freeze", placement="producers"
    )
    model = prepare_qat(net, config)
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1


def test_hooks_of_modules_do_not_count() -> None:
    """What they call is not what the forward around them calls."""
    seen: list[Tensor] = []

    def between(m: Chain, x: Tensor) -> Tensor:
        return F.relu(x + m.relu(x.clone()))

    expected = step(made(Chain(between))[0])
    chain = Chain(between)
    chain.first.register_forward_hook(lambda m, args, y: seen.append(y.relu() + 1))
    chain.relu.register_forward_pre_hook(lambda m, args: seen.append(args[0].relu() + 1))
    assert_same(step(made(chain)[0]), expected)
    assert seen
