"""Bias correction."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hqod_ops.quant import QATConfig, calibrate, float_state_dict, prepare_qat
from hqod_ops.quant.tuning import correct_bias, reestimate_batch_norm
from python_tests.quant.tuning.nets import error, images, quantized, trained, unquantized
from python_tests.ranks import run_ranks


def test_mean_errors_vanish_and_the_error_sinks() -> None:
    model = trained()
    made = quantized(model, 2)
    before = error(made, model)
    assert correct_bias(made, model, images()) is made
    assert error(made, model) < before
    batch = torch.cat(images())
    expected, got = model(batch), made(batch)
    shift = sum((y - z).sum(dim=(0, 2, 3)) for y, z in zip(expected, got, strict=True))
    # Levels share one bias: the error over both is 0, but for the difference between batches.
    assert shift.abs().max() / sum(y.numel() for y in expected) < 1e-3


def test_biases_are_made_where_no_batch_norm_follows() -> None:
    model = trained()
    made = correct_bias(quantized(model), model, images())
    assert made.head.bias is not None and made.stem.bias is None and made.block[0].bias is None
    assert "head.bias" in float_state_dict(made)
    assert not torch.equal(made.norm.bias, model.norm.bias)


def test_it_can_follow_or_precede_reestimation() -> None:
    model = trained()
    first = correct_bias(reestimate_batch_norm(quantized(model, 3), images()), model, images())
    second = reestimate_batch_norm(correct_bias(quantized(model, 3), model, images()), images())
    plain = quantized(model, 3)
    assert error(first, model) < error(plain, model)
    assert error(second, model) < error(plain, model)


@pytest.mark.parametrize("affine", [True, False])
def test_norms_with_and_without_affine(affine: bool) -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=affine)
    model = nn.Sequential(conv, norm).eval()
    config = QATConfig(2, 8, first=(), prediction=())
    made = calibrate(prepare_qat(copy.deepcopy(model), config), images(), progress=False)
    batch = torch.cat(images())
    correct_bias(made, model, [batch])
    shift = (model(batch) - made(batch)).mean(dim=(0, 2, 3))
    torch.testing.assert_close(shift, torch.zeros(4), rtol=0, atol=1e-5)  # sums of 10^4 values


def test_transposed_and_linear_layers() -> None:
    torch.manual_seed(0)
    layers = (nn.ConvTranspose2d(3, 4, 2, stride=2, bias=False), nn.Flatten(2), nn.Linear(256, 5))
    model = nn.Sequential(*layers).eval()
    config = QATConfig(2, 4, first=(), prediction=())
    made = calibrate(prepare_qat(copy.deepcopy(model), config), images(), progress=False)
    correct_bias(made, model, [torch.cat(images())])
    shift = (model(torch.cat(images())) - made(torch.cat(images()))).mean(dim=(0, 1))
    torch.testing.assert_close(shift, torch.zeros(5), rtol=0, atol=1e-5)


def test_without_quantization_nothing_changes() -> None:
    model = trained()
    made = quantized(model)
    unquantized(made)
    before = copy.deepcopy(made.state_dict())
    correct_bias(made, model, images())
    after = made.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_bad_input() -> None:
    model = trained()
    made = quantized(model)
    other = trained()
    other.block[3] = nn.Conv2d(8, 9, 1)
    for wrong, message in (
        (other, r"weight of 'block.3' is \(9, 8, 1, 1\), not \(8, 8, 1, 1\)"),
        (nn.Sequential(), "has no 'stem'"),
    ):
        with pytest.raises(ValueError, match=message):
            correct_bias(made, wrong, images())
    with pytest.raises(ValueError, match="at least one batch"):
        correct_bias(made, model, [])
    with pytest.raises(ValueError, match="no quantized layer"):
        correct_bias(model, model, images())
    with pytest.raises(TypeError, match="float_model"):
        correct_bias(made, {}, images())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="wrapped in DistributedDataParallel"):
        wrapped: Any = object.__new__(nn.parallel.DistributedDataParallel)
        correct_bias(wrapped, model, images())


def _work(rank: int) -> dict[str, Tensor]:
    model = trained()
    batches = images(3)
    return correct_bias(quantized(model), model, batches[:1] if rank else batches[1:]).state_dict()


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    first, second = run_ranks(_work, tmp_path)
    model = trained()
    alone = correct_bias(quantized(model), model, images(3)).state_dict()
    assert first.keys() == alone.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name])
        # Sums in another order.
        torch.testing.assert_close(value, alone[name], rtol=1e-5, atol=1e-6)
