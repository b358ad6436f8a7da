"""The GPU's half of the benchmarks, on a stand-in for the device: all but what CUDA itself does."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import bench_ops
import gpu_table
from bench import gpu, losses, machine, quant, tables
from bench.compare import key
from bench.documents import read_block
from bench.entry import Entry
from bench.measure import DisagreementError
from bench.registry import all_entries


class StandIn(gpu.Gpu):
    """The CPU in the place of the GPU; a recorded call is called again when it is replayed."""

    def __init__(self) -> None:
        self.device, self.cache_bytes, self.recorded = torch.device("cpu"), 1000, 0

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        yield

    def turn(self, run: Callable[[], Any], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls

    def record(self, run: Callable[[], Any]) -> Callable[[], Any]:
        self.recorded += 1
        run()
        return lambda: None

    def peak_bytes(self, run: Callable[[], Any]) -> int:
        return sum(tensor.nbytes for tensor in run())


SHORT = gpu.Effort(min_rounds=2, max_rounds=2, seconds=0.0, turn=1e-6)


def measured(entry: Entry, phase: str, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    device = StandIn()
    sets = gpu.copies(entry.setup(), device.device, device.cache_bytes)
    return gpu.measure(entry, phase, sets, device, SHORT)


def small_quant(**options: Any) -> Entry:
    return quant._fake_quant((4, 8, 3, 3), 1, (0, 15), gpu=True, **options)


def test_blocks_of_every_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each phase with its timings; what waits for the device is in no graph."""
    entry = small_quant()
    expected = {"F": ["graph"], "B": ["graph"], "FB": ["stream", "graph"]}
    assert entry.phases == tuple(expected)
    for phase, timings in expected.items():
        blocks = measured(entry, phase, monkeypatch)
        assert [block["timing"] for block in blocks] == timings
        for block in blocks:
            assert json.loads(json.dumps(block)) == block
            graph = block["timing"] == "graph"
            assert set(block["us"]) == {"ours", "eager", "copy_"} | (set() if graph else {"torch"})
            assert block["copies"] == 2
            fraction = block["copy_fraction"]["median"]
            share = {"F": 1, "B": 1.5, "FB": 2.5}[phase]
            assert fraction == pytest.approx(block["ratio"]["copy_"]["median"] * share, rel=1e-2)
            assert ("peak_bytes" in block) == (block["timing"] == "stream")
        # y, dx and the gradients of 8 scales.
    assert blocks[0]["peak_bytes"]["ours"] == 2 * 288 * 4 + 8 * 4
    assert {"torch", "compile"} <= set(blocks[0]["goals"]) and not blocks[1]["goals"]


def test_tables_show_them(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = measured(small_quant(), "FB", monkeypatch)
    speed, memory = tables.tables({"blocks": blocks})
    assert speed.columns[:4] == ["size", "phase", "timing", "ours"]
    assert [row[2] for row in speed.rows] == ["stream", "graph"]
    assert memory.rows[0][2] == "2.03"
    assert [key(block)[2] for block in blocks] == ["stream", "graph"]


def test_losses_beside_an_empty_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its results are no peer's, and its goal counts where the host's time does."""
    stream, graph = measured(losses._hqod_on_gpu(16), "FB", monkeypatch)
    assert set(stream["us"]) == {"ours", "eager", "empty op"}
    assert "empty op" in stream["goals"] and not graph["goals"]
    (backward,) = measured(losses._hqod_on_gpu(16), "B", monkeypatch)
    assert set(backward["us"]) == {"ours", "eager", "empty op"}


def test_foreach_beside_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = quant._foreach("two", [(4, 3, 3, 3), (5, 2, 1, 1)], gpu=True)
    for phase in entry.phases:
        for block in measured(entry, phase, monkeypatch):
            assert {"ours", "loop of ours", "eager"} <= set(block["us"])


def test_half_inputs_have_a_float_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = small_quant(dtype=torch.bfloat16, layout=torch.channels_last)
    args = entry.setup().args
    assert args["x"].dtype == torch.bfloat16 and args["scale"].dtype == torch.float32
    assert args["x"].is_contiguous(memory_format=torch.channels_last)
    assert entry.name == "fake_quant/4x8x3x3, axis 1, channels_last, bfloat16"
    assert entry.traffic == {"F": 4 * 288, "B": 6 * 288, "FB": 10 * 288}
    for phase in entry.phases:
        assert "eager" in measured(entry, phase, monkeypatch)[0]["ratio"]


def test_another_gradient_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = dataclasses.replace(small_quant(), peers={"eager": lambda x, scale: x * scale.mean()})
    with pytest.raises(DisagreementError, match="eager"):
        measured(entry, "FB", monkeypatch)


def test_copies_exceed_the_cache_and_share_no_memory() -> None:
    inputs = losses._hqod_inputs(16, logits=False)()  # 576 bytes, and 4 of the upstream gradient
    sets = gpu.copies(inputs, torch.device("cpu"), 1000)
    assert len(sets) == 7
    tensors = [tensor for one in sets for tensor in (*one.args.values(), one.upstream)]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
    for one in sets:
        for name, tensor in one.args.items():
            assert torch.equal(tensor, inputs.args[name])
            assert tensor.requires_grad == inputs.args[name].requires_grad
    assert len(gpu.copies(inputs, torch.device("cpu"), 10**9)) == gpu.MAX_COPIES
    assert len(gpu.copies(inputs, torch.device("cpu"), 1)) == 2


def test_calls_take_turns() -> None:
    calls: list[int] = []
    run = gpu.in_turn([lambda i=i: calls.append(i) for i in range(3)])
    for _ in range(7):
        run()
    assert calls == [0, 1, 2, 0, 1, 2, 0]


def test_names_are_unique() -> None:
    names = [entry.name for entry in all_entries("cuda")]
    assert len(set(names)) == len(names)
    for part in ("hqod_loss/N=16384", "channels_last, bfloat16", "RetinaNet-R50", "aligned_box"):
        assert any(part in name for name in names), part


@pytest.mark.require("torchvision")
def test_shapes_are_those_of_torchvision() -> None:
    from torchvision.models.detection import retinanet_resnet50_fpn

    with torch.device("meta"):
        model = retinanet_resnet50_fpn(weights=None, weights_backbone=None)
    found = [tuple(p.shape) for p in model.parameters() if p.dim() == 4]
    assert sorted(found) == sorted(quant.retinanet_shapes())


def test_gpu_options_need_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, words in (
        (["--device", "cuda"], "torch finds no CUDA device"),
        (["--device", "cuda", "--threads", "2"], "are of the CPU"),
    ):
        with pytest.raises(SystemExit):
            bench_ops.main(arguments)
        assert words in capsys.readouterr().err


def test_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the arguments to the file, which a second run completes."""
    described = machine.describe()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "Gpu", StandIn)
    monkeypatch.setattr(gpu, "FULL", SHORT)
    monkeypatch.setattr(machine, "describe", lambda device: {**described, "driver": "1"})
    path = tmp_path / "gpu.json"
    arguments = ["--device", "cuda", "--no-compile", "--update", "--output", str(path), "--filter"]
    for expression in ("aligned_box_iou", "^overhead.* FB"):
        assert bench_ops.main([*arguments, expression]) == 0
    result = json.loads(path.read_text(encoding="utf-8"))
    assert [key(block) for block in result["blocks"]] == [
        ("aligned_box_iou/4096, default", "F", "graph"),
        ("aligned_box_iou/4096, default", "FB", "stream"),
        ("aligned_box_iou/4096, default", "FB", "graph"),
        ("overhead/fake_quant of 16", "FB", "stream"),
        ("overhead/fake_quant of 16", "FB", "graph"),
    ]
    assert bench_ops.main(["--compare", str(path), *arguments, "aligned_box_iou"]) in (0, 1)


def test_update_keeps_what_was_measured_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Blocks of an earlier run stay; a result of other code is left alone."""
    path = tmp_path / "result.json"
    monkeypatch.setenv("HQOD_COMMIT", "one")
    arguments = ["--quick", "--no-compile", "--output", str(path), "--update", "--filter"]
    for expression in ("overhead.* F$", "overhead.* FB$", "overhead.* FB$"):
        assert bench_ops.main([*arguments, expression]) == 0
    blocks = json.loads(path.read_text(encoding="utf-8"))["blocks"]
    assert [block["phase"] for block in blocks] == ["F", "FB"]
    monkeypatch.setenv("HQOD_COMMIT", "two")
    assert bench_ops.main([*arguments, "overhead.* FB$"]) == 2
    assert "commit: one before, two now" in capsys.readouterr().err


def test_a_gpu_result_has_its_name() -> None:
    name = machine.file_name({"device": "NVIDIA H100 80GB HBM3", "driver": "1", "torch": "2.11"})
    assert name == "nvidia-h100-80gb-hbm3.json"


def test_the_table_in_the_documents_is_of_the_results() -> None:
    assert read_block(gpu_table.DOCUMENT, "gpu_table").strip() == gpu_table.text()


def test_what_was_measured_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry that fails takes none of those before it along."""
    path = tmp_path / "result.json"
    good = quant._overhead()
    bad = dataclasses.replace(good, name="bad", peers={"eager": lambda x, scale: x + 1})
    monkeypatch.setattr(bench_ops, "all_entries", lambda device: [good, bad])
    arguments = ["--quick", "--no-compile", "--threads", "1", "--output", str(path)]
    assert bench_ops.main(arguments) == 2
    assert {b["name"] for b in json.loads(path.read_text())["blocks"]} == {good.name}
