"""Small models, their data and quantized copies, for the tests of this folder."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from hqod_ops.quant import QATConfig, calibrate, prepare_qat
from hqod_ops.quant.quantizers import Quantizer


class Shared(nn.Module):
    """Batch norms, a residual block, and a head without batch norm shared by two levels."""

    qat_first = "stem"
    qat_prediction = "logits"

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 1, bias=False),
            nn.BatchNorm2d(8),
        )
        self.head = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.logits = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.norm(self.stem(x)).relu()
        x = self.block(x) + x
        levels = (x, nn.functional.avg_pool2d(x, 2))
        return [self.logits(self.head(level).relu()) for level in levels]


def images(count: int = 4, size: int = 8, seed: int = 3) -> list[Tensor]:
    """Batches of four images with a mean that is not 0."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(4, 3, size, size, generator=generator) * 2 - 0.5 for _ in range(count)]


def trained(kind: type[nn.Module] = Shared, seed: int = 0) -> Any:
    """A float model with statistics and affine parameters as after training, in eval mode."""
    torch.manual_seed(seed)
    model = kind()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = None
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
        for batch in images(8, seed=1):
            model(batch)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.1
    return model.eval()


def quantized(model: nn.Module, bits: int = 4, **options: Any) -> Any:
    """A calibrated copy."""
    config = QATConfig(bits, options.pop("act_bits", 8), per_channel=True, **options)
    return calibrate(prepare_qat(copy.deepcopy(model), config), images(), progress=False)


def unquantized(made: Any) -> Any:
    """A prepared model whose quantizers pass their inputs on."""
    for module in made.modules():
        if isinstance(module, Quantizer):
            module.enabled = False
    return made


@torch.no_grad()
def error(model: nn.Module, reference: nn.Module, batches: list[Tensor] | None = None) -> float:
    """Squared error of a model's outputs relative to their power, on images of its own."""
    noise = power = 0.0
    for batch in images(4, seed=9) if batches is None else batches:
        for y, z in zip(reference.eval()(batch), model.eval()(batch), strict=True):
            noise += (y - z).square().sum().item()
            power += (y - y.mean()).square().sum().item()
    return noise / power
