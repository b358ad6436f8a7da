"""Two result files: which ratios got worse."""

from __future__ import annotations

from typing import Any

THRESHOLD = 0.05
"""A ratio that fell by more than this share is shown."""

SAME = ("device", "cores", "driver", "torch", "malloc", "clock")
"""What two results must share to be compared in earnest."""


def key(block: dict[str, Any]) -> tuple[str, str, str]:
    """What a block measures: the entry, the phase, and its threads or, on a GPU, its timing."""
    return block["name"], block["phase"], block.get("timing") or str(block["threads"])


def differences(
    old: dict[str, Any], new: dict[str, Any], names: tuple[str, ...] = SAME
) -> list[str]:
    """What of the machine is not the same in both results."""
    pairs = [(name, old["machine"].get(name), new["machine"].get(name)) for name in names]
    return [f"{name}: {a} before, {b} now" for name, a, b in pairs if a != b]


def regressions(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Ratios that fell by more than THRESHOLD, and peaks of our memory that rose by as much.

    A fall is ``clear`` where the ranges from p20 to p80 do not meet: anything less may be noise.
    """
    before = {key(block): block for block in old["blocks"]}
    found = []
    for block in new["blocks"]:
        earlier = before.get(key(block))
        if earlier is None:
            continue
        where = dict(zip(("name", "phase", "setting"), key(block), strict=True))
        for peer, ratio in block["ratio"].items():
            past = earlier["ratio"].get(peer)
            if past is not None and ratio["median"] < past["median"] * (1 - THRESHOLD):
                clear = ratio["p80"] < past["p20"]
                values = {"old": past["median"], "new": ratio["median"], "clear": clear}
                found.append({**where, "what": f"{peer} / ours", **values})
        peak, past_peak = (b.get("peak_bytes", {}).get("ours") for b in (block, earlier))
        if peak and past_peak and peak > past_peak * (1 + THRESHOLD):
            values = {"old": past_peak, "new": peak, "clear": True}
            found.append({**where, "what": "peak bytes of ours", **values})
    return found
