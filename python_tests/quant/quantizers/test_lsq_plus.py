"""LSQ+ alone: the paper's parametrization, and a zero point that stays a code."""

from __future__ import annotations

import pytest
import torch

from hqod_ops.quant.quantizers.learned_scale import SCALE_MODES
from hqod_ops.quant.quantizers.lsq import LSQ
from hqod_ops.quant.quantizers.lsq_plus import LSQPlus


def made(scale: float, zero: float, bits: int = 4, signed: bool = False, **options: str) -> LSQPlus:
    q = LSQPlus(bits, **options)  # type: ignore[arg-type]
    q.set_scale(torch.tensor([scale]), signed, torch.tensor([zero]))
    return q


def test_gradients_of_the_paper() -> None:
    # y = clamp((x - b) / s, n, p) s + b in the paper: outside, dy/ds = n or p and dy/db = 1.
    q = made(0.5, 3.0, bits=2)
    assert q.offset.item() == -1.5
    x = torch.tensor([-9.0, 9.0])
    q.grad_scale = None
    for value, code in zip(x, (0, 3), strict=True):
        q.zero_grad()
        y = q(value)
        y.backward()
        assert q.scale.grad is not None and q.offset.grad is not None
        assert y.item() == (code - 3) * 0.5
        assert (q.scale.grad.item(), q.offset.grad.item()) == (code, 1.0)


def test_without_an_offset_it_is_lsq() -> None:
    x, dy = torch.randn(50), torch.randn(50)
    plain, plus = LSQ(4), LSQPlus(4)
    for q in (plain, plus):
        q.set_scale(torch.tensor([0.2]), True)
        y = q(x)
        y.backward(dy)
    assert torch.equal(plain(x), plus(x))
    assert plain.scale.grad is not None and plus.scale.grad is not None
    torch.testing.assert_close(plain.scale.grad, plus.scale.grad)


@pytest.mark.parametrize("signed", [True, False])
def test_the_zero_point_stays_a_code_and_comes_back(signed: bool) -> None:
    q = made(0.5, 2.0, signed=signed)
    low, high = q.codes()
    for offset, bound in ((100.0, low), (-100.0, high)):
        with torch.no_grad():
            q.offset.fill_(offset)
        assert q.effective_zero_point().tolist() == [bound]
        # 0 is on the grid, as padding needs.
        assert q(torch.zeros(3)).tolist() == [0, 0, 0]
        q.zero_grad()
        q(torch.full((4,), -offset)).sum().backward()
        assert q.offset.grad is not None and q.offset.grad.item() > 0


@pytest.mark.parametrize("mode", SCALE_MODES)
def test_every_mode_starts_where_it_is_told(mode: str) -> None:
    for scale in (1e-6, 0.003, 0.4, 30.0):
        q = made(scale, 5.0, scale_mode=mode)
        assert q.effective_scale().item() == pytest.approx(scale, rel=1e-4)
        assert q.effective_zero_point().tolist() == [5.0]


def test_a_range_below_and_above_zero_is_used_whole() -> None:
    x = torch.nn.functional.silu(torch.linspace(-4, 4, 400))
    errors = []
    for kind in (LSQ, LSQPlus):
        q = kind(4, observer="minmax")
        q.start_observing()
        q(x)
        observed = q.observed_scale()
        q.stop_observing()
        assert observed is not None and observed.signed == [True]
        q.set_scale(*observed)
        errors.append((q(x) - x).square().mean().item())
    # SiLU's least value is -0.28: symmetric codes leave nearly half of the range without a use.
    assert errors[1] < 0.4 * errors[0]
