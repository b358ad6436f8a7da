"""torch.export of QAT models: every quantizer stays one op in the graph."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from hqod_ops.quant import QATConfig, calibrate, prepare_qat
from hqod_ops.quant.dataflow.producers import place_on_producers

pytestmark = pytest.mark.require("ext")

EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Detector(nn.Module):
    """A backbone, and a head shared by two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.body(x)
        return [self.head(level) for level in (x, nn.functional.max_pool2d(x, 2))]


def calibrated(*, foreach: bool = False, producers: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = prepare_qat(Detector(), QATConfig(4, 4, edge_bits=4), foreach=foreach)
    if producers:
        place_on_producers(model)
    return calibrate(model, [EXAMPLE], progress=False).eval()


def ops(program: torch.export.ExportedProgram, prefix: str = "hqod.") -> Counter[str]:
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return Counter(str(target) for target in targets if str(target).startswith(prefix))


@pytest.mark.parametrize("strict", [False, True])
def test_quantizers_stay_one_op_each(strict: bool) -> None:
    model = calibrated()
    program = torch.export.export(model, (EXAMPLE,), strict=strict)
    # The inputs of five layer calls; the weights too, of which the head's are quantized per call.
    assert ops(program) == {"hqod.fake_quant.default": 10}
    x = EXAMPLE.flip(0)
    for ours, theirs in zip(program.module()(x), model(x), strict=True):
        assert torch.equal(ours, theirs)


def test_weights_quantized_together_are_one_op() -> None:
    model = calibrated(foreach=True)
    program = torch.export.export(model, (EXAMPLE,))
    assert ops(program) == {"hqod.fake_quant.default": 5, "hqod.fake_quant_foreach.default": 1}
    for ours, theirs in zip(program.module()(EXAMPLE), model(EXAMPLE), strict=True):
        assert torch.equal(ours, theirs)


def test_quantizers_at_the_producers() -> None:
    model = calibrated(producers=True)
    program = torch.export.export(model, (EXAMPLE,))
    assert ops(torch.export.export(calibrated(), (EXAMPLE,)), "aten.relu").total() == 3
    # The head's are taken in by its quantizer; the backbone's serves a pooling too.
    assert ops(program, "aten.relu").total() == 1
    for ours, theirs in zip(program.module()(EXAMPLE), model(EXAMPLE), strict=True):
        assert torch.equal(ours, theirs)


def test_round_trip_through_a_file_and_dynamic_batch(tmp_path: object) -> None:
    model = calibrated()
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (EXAMPLE,), dynamic_shapes=shapes)
    path = f"{tmp_path}/m.pt2"
    torch.export.save(program, path)
    x = torch.cat([EXAMPLE, EXAMPLE, EXAMPLE])
    loaded = torch.export.load(path).module()
    for ours, theirs in zip(loaded(x), model(x), strict=True):
        assert torch.equal(ours, theirs)
