"""Re-estimated statistics of batch normalisations."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hqod_ops.quant import LevelBatchNorm2d, calibrate, freeze_batch_norm, prepare_qat
from hqod_ops.quant.tuning import reestimate_batch_norm
from python_tests.quant.tuning.nets import error, images, quantized, trained
from python_tests.ranks import run_ranks


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in model.named_buffers() if "running" in n}


def test_statistics_are_those_of_all_values() -> None:
    norm = nn.BatchNorm1d(3).eval()
    batches = [torch.randn(count, 3, dtype=torch.float32) * 2 + 1 for count in (4, 9, 2)]
    reestimate_batch_norm(norm, batches)
    values = torch.cat(batches).double()
    # The statistics are float32.
    torch.testing.assert_close(norm.running_mean.double(), values.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), values.var(0), rtol=1e-6, atol=1e-6)
    assert norm.num_batches_tracked == 3


def test_it_lowers_the_error_of_a_quantized_model() -> None:
    model = trained()
    made = quantized(model, 2)
    before = error(made, model)
    assert reestimate_batch_norm(made, images()) is made
    assert error(made, model) < before


def test_a_float_model_keeps_its_statistics() -> None:
    model = trained()
    before = statistics(model)
    reestimate_batch_norm(model, images(8, seed=1))
    for name, value in statistics(model).items():
        # The training pass averaged variances of batches, this one has that of all values.
        torch.testing.assert_close(value, before[name], rtol=0.1, atol=0.05)


def test_with_the_float_model_the_choice_of_images_cancels() -> None:
    model = trained()
    # Nothing is quantized: the float model's own statistics come back, whatever the images.
    same = reestimate_batch_norm(copy.deepcopy(model), images(2), float_model=model)
    for name, value in statistics(same).items():
        # The variance of few values, of which one with n and one with n - 1 is divided.
        torch.testing.assert_close(value, statistics(model)[name], rtol=5e-3, atol=1e-3)
    made, other = quantized(model, 8), quantized(model, 8)
    few = images(1, seed=77)
    reestimate_batch_norm(made, few)
    reestimate_batch_norm(other, few, float_model=model)
    assert error(other, model) < 0.1 * error(made, model)


def test_modes_momentum_and_the_rest_stay() -> None:
    made = quantized(trained())
    made.train()
    made.block[1].eval()
    made.block[4].momentum = None
    modes = [m.training for m in made.modules()]
    kept = {n: v.clone() for n, v in made.state_dict().items() if "running" not in n}
    reestimate_batch_norm(made, images(), steps=2)
    assert [m.training for m in made.modules()] == modes
    assert made.norm.momentum == 0.1 and made.block[4].momentum is None
    state = made.state_dict()
    assert all(torch.equal(state[n], v) for n, v in kept.items() if "num_batches" not in n)
    assert made.norm.num_batches_tracked == 2


def test_it_is_deterministic_and_survives_copies_and_saving(tmp_path: Path) -> None:
    model = trained()
    first, second = quantized(model), quantized(model)
    copied = copy.deepcopy(reestimate_batch_norm(first, images()))
    reestimate_batch_norm(second, images())
    torch.save(first.state_dict(), tmp_path / "model.pt")
    loaded = quantized(model)
    loaded.load_state_dict(torch.load(tmp_path / "model.pt"))
    for other in (second, copied, loaded):
        assert all(torch.equal(v, statistics(other)[n]) for n, v in statistics(first).items())


def test_frozen_ones_stay() -> None:
    made = freeze_batch_norm(quantized(trained()))
    before = statistics(made)
    with pytest.warns(UserWarning, match="no batch normalisation"):
        reestimate_batch_norm(made, images())
    assert all(torch.equal(v, before[n]) for n, v in statistics(made).items())


class Levels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = LevelBatchNorm2d(4, levels=3)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.norm(self.conv(factor * x)) for factor in (1.0, 4.0)]


def test_levels_have_statistics_of_their_own() -> None:
    made = calibrate(prepare_qat(Levels(), "w8a8"), images(), progress=False)
    reestimate_batch_norm(made, images())
    small, large, unused = (norm.running_var for norm in made.norm.norms)
    assert torch.all(large > 10 * small)
    assert torch.equal(unused, torch.ones(4))  # a level that no batch reached


def test_sync_batch_norm_on_one_process() -> None:
    model = trained()
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    reestimate_batch_norm(synced, images())
    reestimate_batch_norm(model, images())
    assert all(torch.equal(v, statistics(synced)[n]) for n, v in statistics(model).items())


def test_bad_input() -> None:
    made = quantized(trained())
    before = statistics(made)
    with pytest.raises(ValueError, match="batches: expected at least one batch"):
        reestimate_batch_norm(made, [])
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        reestimate_batch_norm(made, images(), steps=0)
    assert all(torch.equal(v, before[n]) for n, v in statistics(made).items())
    with pytest.raises(ValueError, match="float_model: .* no 'norm'"):
        reestimate_batch_norm(made, images(), float_model=nn.Sequential())
    with pytest.raises(ValueError, match="block.4"):
        made.block[3].weight_quantizer = made.block[3].input_quantizer = None
        made.block[3].weight.data.fill_(torch.inf)
        reestimate_batch_norm(made, images())


def _work(rank: int) -> dict[str, Any]:
    made = nn.parallel.DistributedDataParallel(quantized(trained()))
    batches = images(5)
    # Unequal shares: one process has one batch more.
    reestimate_batch_norm(made, batches[:3] if rank else batches[3:])
    found: dict[str, Any] = statistics(made.module)
    try:
        reestimate_batch_norm(made, [torch.zeros(1)] if rank else batches)
    except Exception as error:
        found["error"] = str(error)
    return found


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    first, second = run_ranks(_work, tmp_path)
    alone = statistics(reestimate_batch_norm(quantized(trained()), images(5)))
    assert first.pop("error").startswith("re-estimation failed in process 1")
    assert "error" in second
    for name, value in first.items():
        assert torch.equal(value, second[name])
        # Sums in another order.
        torch.testing.assert_close(value, alone[name], rtol=1e-6, atol=1e-7)
