"""benchmarks/bench_step.py trains every variant and writes what it says. Timings are not tested."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import bench_step
from bench import quant, step

from hqod_ops import fake_quant, fake_quant_foreach, reference

pytestmark = pytest.mark.require("torchvision")
TINY = dataclasses.replace(step.QUICK, steps=1)


def test_quick_run_writes_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step, "QUICK", TINY)
    path = tmp_path / "new" / "step.json"
    assert bench_step.main(["--quick", "--amp", "off", "--output", str(path)]) == 0
    assert "eager LSQ" in capsys.readouterr().out
    result = json.loads(path.read_text(encoding="utf-8"))
    assert {"device", "torch", "commit"} <= set(result["machine"])
    assert result["settings"] == dataclasses.asdict(TINY)
    entries = {entry["variant"]: entry for entry in result["steps"]}
    assert tuple(entries) == step.VARIANTS and not any(entry["amp"] for entry in result["steps"])
    assert entries["float"]["share_added"] == entries["float"]["added_ms"]["median"] == 0
    for variant, entry in entries.items():
        assert 0 < entry["ms"]["p20"] <= entry["ms"]["median"] <= entry["ms"]["p80"]
        assert (entry["share_of_our_ops"] > 0) == variant.startswith("ours")
        # What is saved is there at the end of the forward pass, beside the model.
        assert entry["peak_bytes"] > entry["saved_bytes"] > 0
    assert entries["ours"]["peak_bytes"] < entries["eager LSQ"]["peak_bytes"]
    text = path.with_suffix(".txt").read_text(encoding="utf-8")
    assert "hqod::fake_quant" in text and "Self CPU" in text


def test_mixed_precision() -> None:
    variants = ("float", "ours")
    entries, profiles = step.measure(TINY, torch.device("cpu"), amp=True, variants=variants)
    assert [entry["variant"] for entry in entries] == list(variants)
    assert all(entry["amp"] for entry in entries) and entries[1]["share_of_our_ops"] > 0
    assert "hqod::fake_quant" in profiles["ours"] and "hqod::" not in profiles["float"]


def test_eager_ops_are_those_of_lsq() -> None:
    """In their place the public functions compute the same, without the native ops."""
    generator = torch.Generator().manual_seed(0)
    values, scale = quant.make_pair((6, 5, 3), (-8, 7), 1, generator)
    options = {"quant_min": -8, "quant_max": 7, "ch_axis": 1, "grad_scale": "lsq"}
    results = []
    for eager in (True, False):
        x = values.clone().requires_grad_()
        s = scale.clone().requires_grad_()
        ops = step.ops_of("eager LSQ") if eager else torch.enable_grad()
        with ops, torch.profiler.profile(acc_events=True) as recorded:
            y = fake_quant(x, s, **options)
            (listed,) = fake_quant_foreach([x], [s], **options)
        native = any(event.key.startswith("hqod::") for event in recorded.key_averages())
        assert native != eager
        assert torch.equal(listed, y)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), (x, s))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_eager_ops_leave_the_rest_to_the_reference() -> None:
    x, s, z = torch.randn(40), torch.tensor(0.2), torch.tensor(1.6)
    options = {"quant_min": 0, "quant_max": 15}
    with step.ops_of("eager LSQ"):
        shifted = fake_quant(x, s, z, **options)
        active = fake_quant(x, s, activation="relu", **options)
    assert torch.equal(shifted, reference.fake_quant(x, s, z, **options))
    assert torch.equal(active, reference.fake_quant(x.relu(), s, **options))


def test_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench_step.main(["--device", "cuda"])
    assert "torch finds no CUDA device" in capsys.readouterr().err
