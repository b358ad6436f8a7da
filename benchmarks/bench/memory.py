"""Peak memory of a call, counted by torch's profiler.

The profiler sees every allocation and release of torch's CPU allocator, those inside C++ operators
and compiled code included, which a ``TorchDispatchMode`` does not.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from bench.entry import Inputs


def peak_bytes(run: Callable[[], Any], inputs: Inputs) -> int:
    """Most bytes allocated at once beyond the inputs; results and gradients count."""
    for leaf in inputs.leaves():
        leaf.grad = None
    return peak_beyond(run)


def peak_beyond(run: Callable[[], Any]) -> int:
    """Most bytes allocated at once on the CPU beyond what there was before; results count."""
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as recorded:
        kept = run()
    del kept
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))
    events = [event for event in trace["traceEvents"] if event.get("name") == "[memory]"]
    events.sort(key=lambda event: event["args"]["Ev Idx"])
    peak = now = 0
    for event in events:
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak
