"""benchmarks/bench_ops.py runs and writes what it says. Timings are not tested."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import bench_ops
from bench.compare import differences, regressions
from bench.entry import Entry, Inputs
from bench.measure import QUICK, DisagreementError, measure

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "bench_ops.py"


def test_quick_run_writes_its_result(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    options = ("--quick", "--filter", "overhead", "--output", str(path), "--markdown")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(SCRIPT), *options]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "| fake_quant of 16 | FB |" in done.stdout
    result = json.loads(path.read_text(encoding="utf-8"))
    names = {"device", "cores", "torch", "commit", "isa", "malloc", "clock", "load", "date"}
    assert names <= set(result["machine"])
    assert [(block["phase"], block["threads"]) for block in result["blocks"]] == [
        ("F", 1),
        ("FB", 1),
    ]
    for block in result["blocks"]:
        assert block["name"] == "overhead/fake_quant of 16"
        assert set(block["us"]) == {"ours", *block["ratio"]}
        assert set(block["ratio"]) == {"eager", "torch", "torch.neg"}
        assert block["rounds"] >= QUICK.min_rounds
        for spread in (*block["us"].values(), *block["ratio"].values()):
            assert 0 < spread["p20"] <= spread["median"] <= spread["p80"]
    # y and dx, of 16 floats each, and ds are there at the end of a backward pass.
    assert result["blocks"][1]["peak_bytes"]["ours"] >= 2 * 64 + 4


def result_with(torch_version: str, **ratios: float) -> dict[str, Any]:
    """A result of one block, with a spread of 1 % around each ratio."""
    return {
        "machine": {"device": "d", "cores": 2, "torch": torch_version},
        "blocks": [
            {
                "name": "op/1",
                "phase": "FB",
                "threads": 1,
                "ratio": {
                    peer: {"median": value, "p20": 0.99 * value, "p80": 1.01 * value}
                    for peer, value in ratios.items()
                },
                "peak_bytes": {"ours": 100},
            }
        ],
    }


def test_compare_flags_what_got_worse() -> None:
    old = result_with("2.0", eager=10.0, compile=4.0, clone=1.0)
    new = result_with("2.1", eager=9.0, compile=4.4, torch=2.0, clone=0.97)
    (found,) = regressions(old, new)
    assert (found["what"], found["old"], found["new"]) == ("eager / ours", 10.0, 9.0)
    assert found["clear"]
    assert [line.partition(":")[0] for line in differences(old, new)] == ["torch"]

    noisy = copy.deepcopy(new)
    noisy["blocks"][0]["ratio"]["eager"]["p80"] = 12.0
    assert [entry["clear"] for entry in regressions(old, noisy)] == [False]

    larger = copy.deepcopy(old)
    larger["blocks"][0]["peak_bytes"]["ours"] = 200
    assert [entry["what"] for entry in regressions(old, larger)] == ["peak bytes of ours"]


def test_peer_that_computes_something_else_is_an_error() -> None:
    def setup() -> Inputs:
        return Inputs({"x": torch.ones(8, requires_grad=True)}, torch.ones(8))

    entry = Entry(
        name="square/8",
        setup=setup,
        ours=lambda x: x * x,
        # The value of x * x at 1, with another gradient.
        peers={"eager": lambda x: x * 1},
    )
    with pytest.raises(DisagreementError, match="square/8, FB: eager differs .* gradient 1"):
        measure(entry, "FB", setup(), 1, QUICK)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--filter", "no such op"], "no entry fits --filter"),
        (["--filter", "("], "--filter: '('"),
        (["--compare", "missing.json"], "missing.json: No such file"),
        (["--markdown", str(SCRIPT)], "not a result of this program"),
        (["--cpu-time", "--threads", "2"], "expected --threads 1"),
        (["--threads", "0"], "expected at least 1, got 0"),
    ],
    ids=["filter", "regex", "missing", "no-result", "cpu-time", "threads"],
)
def test_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = bench_ops.main(["--quick", *arguments])
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert message in capsys.readouterr().err
