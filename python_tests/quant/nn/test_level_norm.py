"""Shared layers: one input scale for every call of one forward pass."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from hqod_ops.quant import (
    LevelBatchNorm2d,
    QATConfig,
    calibrate,
    prepare_qat,
    reset_levels,
    summary,
)

SIZES = (16, 8, 4)


class Pyramid(nn.Module):
    """A head shared by three levels whose inputs differ in range and sign."""

    def __init__(self, repeat: str = "none") -> None:
        super().__init__()
        self.repeat = repeat
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.tower = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.predict = nn.Conv2d(4, 2, 1)

    def head(self, x: Tensor) -> Tensor:
        return self.predict(self.tower(x))

    def features(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        pools = [nn.functional.adaptive_avg_pool2d(x, size) for size in SIZES]
        return [pools[0], 10 * pools[1].abs(), 100 * pools[2]]

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        if self.repeat == "none" or not torch.is_grad_enabled():
            outputs = [self.head(f) for f in features]
        elif self.repeat == "level":
            outputs = [checkpoint(self.head, f, use_reentrant=False) for f in features]
        elif self.repeat == "level, reentrant":
            outputs = [checkpoint(self.head, f, use_reentrant=True) for f in features]
        else:
            outputs = checkpoint(
                lambda *fs: [self.head(f) for f in fs], *features, use_reentrant=False
            )
        return torch.cat([y.flatten(1) for y in outputs], dim=1)


CONFIG = QATConfig(4, 4, first="stem", prediction="predict", act_init="minmax")


def images(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def made(repeat: str = "none", kind: type[Pyramid] = Pyramid) -> Pyramid:
    torch.manual_seed(0)
    return calibrate(prepare_qat(kind(repeat), CONFIG), [images(1), images(2)], progress=False)


def step(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    y = model(images())
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters())]  # type: ignore[union-attr]


def test_each_level_has_the_scale_and_sign_of_its_own_input() -> None:
    model = Pyramid().eval()
    with torch.no_grad():
        levels = list(zip(*(model.features(images(seed)) for seed in (1, 2)), strict=True))
    calibrate(prepare_qat(model, CONFIG), [images(1), images(2)], progress=False)
    rows = {row.name: row for row in summary(model)}
    row = rows["tower.0"]
    assert row.act_signed == (True, False, True)
    for scale, signed, inputs in zip(row.act_scales, row.act_signed, levels, strict=True):
        extent = torch.cat([x.flatten() for x in inputs]).abs().max().item()
        assert scale == pytest.approx(extent / (7.5 if signed else 15), rel=1e-5)
    assert len(row.weight_scales) == 1
    assert (rows["predict"].act_bits, len(rows["predict"].act_scales)) == (8, 3)
    assert len(rows["stem"].act_scales) == 1


def test_every_level_trains_its_scale() -> None:
    model = made()
    before = model.tower[0].input_quantizer.scale.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    step(model)
    optimizer.step()
    assert (model.tower[0].input_quantizer.scale != before).all()


def test_the_count_starts_anew_in_every_forward_pass() -> None:
    model = made()
    first = step(model)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, step(model), strict=True))
    with pytest.raises(RuntimeError):
        model(torch.randn(1, 5, 16, 16))
    model.tower(model.features(images())[0])
    assert all(torch.equal(a, b) for a, b in zip(first, step(model), strict=True))


def test_parts_of_the_model_are_called_after_a_reset() -> None:
    model = made().eval()
    whole = model(images())
    reset_levels(model)
    features = model.features(images())
    parts = [model.head(f) for f in features]
    assert torch.equal(torch.cat([y.flatten(1) for y in parts], dim=1), whole)
    with pytest.raises(RuntimeError, match=r"tower\.0\.input_quantizer: called more than 3 times"):
        model.head(features[0])


@pytest.mark.parametrize("repeat", ["level", "level, reentrant", "head"])
def test_activation_checkpointing_repeats_the_same_levels(repeat: str) -> None:
    plain = step(made())
    repeated = step(made(repeat))
    for expected, got in zip(plain, repeated, strict=True):
        torch.testing.assert_close(got, expected)


def test_checkpointing_of_levels_that_cannot_be_told_apart_is_an_error() -> None:
    class Twins(Pyramid):
        def features(self, x: Tensor) -> list[Tensor]:
            x = self.stem(x)
            return [x, 10 * x]

    with pytest.raises(RuntimeError, match="cannot tell which level"):
        step(made("level", Twins))


def test_copies_count_on_their_own() -> None:
    model = made()
    twin = copy.deepcopy(model)
    expected = step(model)
    # Each forward pass of the copy must reset the copy's counts, also between the original's.
    for other in (twin, model, twin, twin):
        assert all(torch.equal(a, b) for a, b in zip(expected, step(other), strict=True))


def test_levels_survive_saving_and_loading() -> None:
    model = made()
    other = prepare_qat(Pyramid(), CONFIG)
    optimizer = torch.optim.SGD(other.parameters(), lr=1e-3)
    other.load_state_dict(model.state_dict())
    assert list(summary(other)) == list(summary(model))
    assert all(torch.equal(a, b) for a, b in zip(step(model), step(other), strict=True))
    before = other.tower[0].input_quantizer.scale.detach().clone()
    optimizer.step()
    assert (other.tower[0].input_quantizer.scale != before).all()


def test_a_pickled_model_counts_too(tmp_path: object) -> None:
    model = made()
    path = f"{tmp_path}/model.pt"
    torch.save(model, path)
    other = torch.load(path, weights_only=False)
    assert all(torch.equal(a, b) for a, b in zip(step(model), step(other), strict=True))


def test_a_shared_head_compiles() -> None:
    model = made()
    expected = step(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(3):
        for a, b in zip(expected, step(compiled), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_reset_levels_starts_norms_of_levels_too() -> None:
    norm = LevelBatchNorm2d(3, levels=2).eval()
    nn.init.constant_(norm.norms[1].running_mean, 1.0)
    x = images()[:, :, :4, :4]
    first = norm(x)
    reset_levels(norm)
    assert torch.equal(norm(x), first)
