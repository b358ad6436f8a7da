"""Damage to files and values, at random from a seed: what the fuzz tests share."""

from __future__ import annotations

import copy
import random
from typing import Any

ODD: list[Any] = [
    None, True, 0, -1, 1, 2, 7, 10**30, 2**53 + 1, 0.5, 1.0, -0.0, 1e300, float("nan"),
    float("inf"), "", " ", "1", "1.0", "x", "\ud800", "\0", "a\nb", "../a.png", "/", "\\",
    "9" * 5000,
    [], [None], [1, 2, 3, 4], ["1", 2, 3, 4], [[1, 2, 3, 4, 5, 6]], {}, {"id": 1},
    {"size": [20, 40], "counts": "PPYo1"}, {"size": [20, 40], "counts": [5, -3, 10**12]},
    {"size": [0, 0], "counts": "abc"},
]  # fmt: skip


def change_value(node: Any, rng: random.Random) -> None:
    """Change something below a dict or list: another value, one less, or one twice."""
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.15:
            break
        node = node[key]
    what = rng.random()
    if what < 0.7:
        node[key] = copy.deepcopy(rng.choice(ODD))
    elif what < 0.85:
        del node[key]
    elif isinstance(node, list):
        node.append(copy.deepcopy(node[key]))
    else:
        node[rng.choice(["id", "name", "bbox", "image_id"])] = copy.deepcopy(node[key])


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Some bytes other ones, a piece missing or twice, the end cut off."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        start = rng.randrange(len(out) + 1)
        end = min(start + rng.choice((1, 1, 4, 40)), len(out))
        what = rng.randrange(4)
        if what == 0:
            out[start:end] = rng.randbytes(end - start)
        elif what == 1:
            del out[start:end]
        elif what == 2:
            out[start:start] = out[start:end]
        elif rng.random() < 0.3:
            del out[start:]
    return bytes(out)
