"""Batch normalisation trained and frozen; one for each level of a shared head."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hqod_ops.quant import QATConfig, calibrate, prepare_qat
from hqod_ops.quant.nn.batch_norm import freeze_batch_norm
from hqod_ops.quant.nn.level_norm import LevelBatchNorm2d, use_level_batch_norm
from python_tests.quant.dataflow.test_fold import image, made, statistics

CONFIG = QATConfig(8, 8, first=(), prediction=())


@pytest.mark.parametrize("affine", [False, True])
def test_frozen_statistics_are_used_and_stay(affine: bool) -> None:
    model = made().eval()
    expected, keys = model(image()), list(model.state_dict())
    freeze_batch_norm(model.train(), affine=affine).train()
    assert list(model.state_dict()) == keys
    before = statistics(model)
    assert torch.equal(model(image()), expected)
    assert all(torch.equal(before[name], value) for name, value in statistics(model).items())
    assert model.norm.weight.requires_grad is not affine
    assert isinstance(model.norm, nn.BatchNorm2d) and isinstance(model.last_norm, nn.BatchNorm1d)
    assert model.linear.training and not model.norm.training
    assert torch.equal(copy.deepcopy(model).train()(image()), expected)
    with pytest.raises(ValueError, match=r"1: expected running statistics"):
        freeze_batch_norm(
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))
        )
    synced = freeze_batch_norm(nn.Sequential(nn.SyncBatchNorm(4)))
    assert not synced.train()[0].training


@pytest.mark.parametrize("mode", ["train", "freeze", "fold"])
def test_prepare_by_choice(mode: str) -> None:
    config = QATConfig(8, 8, first=(), prediction=(), batch_norm=mode)
    model = made()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepare_qat(model, config, example=image(1) if mode == "fold" else None)
    calibrate(model, [image()], progress=False)
    expected = made().eval()(image())
    assert (model.eval()(image()) - expected).norm() < 0.1 * expected.norm()
    before = statistics(model)
    model.train()(image()).square().sum().backward()
    moved = [n for n, value in statistics(model).items() if not torch.equal(value, before[n])]
    left = {"train": 12, "freeze": 0, "fold": 4}[mode]
    assert len(moved) == left
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


class Head(nn.Module):
    """Convolutions shared by three levels of very different range."""

    def __init__(self, norm: nn.Module, repeat: bool = False) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), norm, nn.ReLU())
        self.repeat = repeat

    def forward(self, x: Tensor) -> list[Tensor]:
        inputs = [x, 10 * x[..., ::2, ::2] + 5, 100 * x[..., ::3, ::3]]
        if self.repeat:
            return [checkpoint(self.tower, level, use_reentrant=False) for level in inputs]
        return [self.tower(level) for level in inputs]


def head(repeat: bool = False) -> Head:
    torch.manual_seed(0)
    return Head(LevelBatchNorm2d(4, levels=3), repeat)


def test_every_level_has_a_norm_of_its_own() -> None:
    model, outputs = head(), head()
    with torch.no_grad():
        for _ in range(3):
            got = model(image())
        conv = outputs.tower[0]
        for level, x in enumerate([image(), 10 * image()[..., ::2, ::2] + 5]):
            alone = nn.BatchNorm2d(4)
            for _ in range(3):
                expected = alone(conv(x)).relu()
            torch.testing.assert_close(got[level], expected)
            mean = model.tower[1].norms[level].running_mean
            torch.testing.assert_close(mean, alone.running_mean)


def test_level_norms_in_a_prepared_model() -> None:
    model = calibrate(prepare_qat(head(), CONFIG), [image(), image(1)], progress=False)
    assert model.tower[0].input_quantizer.levels == 3
    expected = [y.detach() for y in model.eval()(image())]
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5, 6, 6))
    model.tower(image())  # a part alone, which leaves the count of levels in the middle
    for twin in (model, copy.deepcopy(model)):
        for first, second in zip(expected, twin(image()), strict=True):
            assert torch.equal(first, second)


def test_level_norms_under_activation_checkpointing() -> None:
    gradients = []
    for repeat in (False, True):
        model = head(repeat)
        torch.stack([y.square().mean() for y in model(image())]).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, repeated in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, repeated)


def test_norms_of_a_head_become_level_norms() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, eps=1e-3)
    nn.init.uniform_(norm.weight)
    model = Head(norm).eval()
    expected = model(image())
    use_level_batch_norm(model, "tower.*", levels=3)
    for old, new in zip(expected, model.eval()(image()), strict=True):
        assert torch.equal(old, new)
    model.tower(image())
    for old, new in zip(expected, model(image()), strict=True):
        assert torch.equal(old, new)
    group = use_level_batch_norm(nn.Sequential(nn.GroupNorm(2, 4)).double(), "0", levels=2)
    assert group[0].norms[1].weight.dtype == torch.float64
    with pytest.raises(ValueError, match=r"no BatchNorm2d or GroupNorm fits 'head\.\*'"):
        use_level_batch_norm(head(), "head.*", levels=3)
    with pytest.raises(ValueError, match="levels: expected at least 1, got 0"):
        LevelBatchNorm2d(4, levels=0)
