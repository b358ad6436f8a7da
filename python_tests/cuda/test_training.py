"""Training on a GPU: mixed precision with and without a loss scale, and a whole quantized model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import hqod_ops
from hqod_ops.quant import calibrate, prepare_qat

pytestmark = pytest.mark.require("ext", "cuda")


class Detector(nn.Module):
    """Convolutions, of which each place of the last feature map predicts a box and a logit."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.predict = nn.Conv2d(16, 5, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.predict(self.features(images)).movedim(1, -1).reshape(-1, 5)


def quantized() -> nn.Module:
    torch.manual_seed(0)
    model = prepare_qat(Detector(), "hqod_w4a4", first="features.0", prediction="predict").cuda()
    return calibrate(model, [images()], progress=False)


def images() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)).cuda()


def loss_of(model: nn.Module) -> Tensor:
    """The fused loss with boxes that start 4 pixels off, in units of 8 pixels."""
    out = model(images())
    target = torch.tensor([10.0, 10.0, 40.0, 40.0], device="cuda").expand(len(out), 4)
    return hqod_ops.hqod_loss(target + 4 + 8 * out[:, :4].float(), target, out[:, 4].float(),
                              logits=True)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, None], ids=str)
def test_training_lowers_the_loss(dtype: torch.dtype | None) -> None:
    """float16 with a GradScaler, bfloat16, and float32; every scale learns, in float32."""
    model = quantized().train()
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype or torch.float16, enabled=dtype is not None):
            loss = loss_of(model)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert loss.dtype == torch.float32
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
    for name, value in model.named_parameters():
        assert value.isfinite().all() and value.dtype == torch.float32
        assert value.grad is not None and not torch.equal(value, start[name]), name


def test_an_overflow_reaches_the_grad_scaler() -> None:
    """With a loss scale beyond float16 the step is skipped and the scale goes down."""
    model = quantized().train()
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**60)
    with torch.autocast("cuda", torch.float16):
        loss = loss_of(model)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**59
    for name, value in model.named_parameters():
        assert torch.equal(value, start[name]), name


def test_a_quantized_step_waits_for_nothing() -> None:
    """Forward, loss, backward and optimizer of a QAT model without reading a value back."""
    model = quantized().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    batch = images()
    target = torch.tensor([10.0, 10.0, 40.0, 40.0], device="cuda").expand(256, 4)

    def step() -> None:
        optimizer.zero_grad()
        out = model(batch)
        loss = hqod_ops.hqod_loss(target + out[:, :4], target, out[:, 4], logits=True)
        loss.backward()
        optimizer.step()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
