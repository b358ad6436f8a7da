#!/usr/bin/env python
"""Thousands of training steps under changing shapes: does memory grow, are the bits the same?

    python benchmarks/long_run.py                    # 10,000 steps of both parts, each twice
    python benchmarks/long_run.py --steps 200 --what ops

Each part runs twice with the same seed, each time in a process of its own, and every loss and every
gradient that it gave goes into one checksum. The result is JSON: the memory of the process over the
steps, its slope, the tensors alive, and whether both checksums are the same.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

# Last, so that an installed hqod_ops goes before the one in the tree.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from bench import machine
from torch import Tensor

from hqod_ops.testing.cases import CASES, differentiable

RESULTS = Path(__file__).resolve().parent / "results"
SAMPLES = 50
"""How often in a run the memory is looked at."""
SETTLED = 0.2
"""The part of a run in which allocators and caches may fill; the slope is that of the rest."""

Step = Callable[[int], list[Tensor]]
"""Runs one step, and returns what goes into the checksum."""


def _ops(generator: torch.Generator) -> Step:
    """Every op with every form of its call, on inputs of a size that the step draws."""
    calls = [(case, variant) for case in CASES.values() for variant in case.variants]

    def step(index: int) -> list[Tensor]:
        case, variant = calls[index % len(calls)]
        size = case.sizes[int(torch.randint(len(case.sizes), (), generator=generator))]
        inputs = case.make(variant, size, seed=index)
        out = case.call(inputs, variant)
        outs = [y for y in (out if isinstance(out, (list, tuple)) else [out])]
        wanted = [y for y in outs if y.requires_grad]
        if wanted:
            torch.autograd.backward([y.sum() for y in wanted])
        grads = [x.grad for x in differentiable(case, inputs).values() if x.grad is not None]
        return [*outs, *grads]

    return step


def _detector(generator: torch.Generator) -> Step:
    """ATSS in 4 bits with the HQOD losses, as `hqod train` makes and trains it."""
    from hqod_ops.quant import QATConfig, calibrate
    from hqod_ops.training.batch import batch_images
    from hqod_ops.training.build import build_model, quantize
    from hqod_ops.training.optim import make_optimizer
    from hqod_ops.training.settings import RunConfig

    config = RunConfig(quant=QATConfig(4, 4, foreach=True))
    config = replace(
        config,
        loss=replace(config.loss, hqod=True),
        model=replace(config.model, widths=(8, 16, 32), channels=16, head_depth=1),
    )
    model, device = build_model(config, 3), torch.device("cpu")
    quantize(model, config)
    optimizer = make_optimizer(model, config.schedule)

    def batch() -> tuple[Tensor, list[dict[str, Tensor]]]:
        height, width = (32 + 8 * torch.randint(9, (2,), generator=generator)).tolist()
        images, targets = [], []
        for count in torch.randint(4, (2,), generator=generator).tolist():
            image = 0.2 * torch.rand(3, height, width, generator=generator)
            corner = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) / 2
            side = 6 + torch.rand(count, 2, generator=generator) * 12
            boxes = torch.cat([corner, corner + side], dim=1)
            labels = torch.randint(3, (count,), generator=generator)
            for (x1, y1, x2, y2), label in zip(boxes.long().tolist(), labels, strict=True):
                image[label, y1:y2, x1:x2] = 1.0
            images.append(image)
            targets.append({"boxes": boxes, "labels": labels})
        return batch_images(images, device, model.stride), targets

    calibrate(model.network, [batch()[0] for _ in range(8)], progress=False)
    model.train()

    def step(index: int) -> list[Tensor]:
        images, targets = batch()
        losses = model.losses(images, targets)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values(), torch.zeros(())).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.schedule.clip)
        optimizer.step()
        last = list(model.state_dict().values()) if index % 1000 == 999 else []
        return [*losses.values(), norm, *last]

    return step


PARTS = {"ops": _ops, "detector": _detector}


def _memory() -> int:
    """Bytes of the process that lie in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def run(what: str, steps: int, seed: int) -> dict[str, Any]:
    """One run in this process.

    Args:
        what (str): "ops" or "detector".
        steps (int): how many.
        seed (int): of everything that is drawn.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    step = PARTS[what](torch.Generator().manual_seed(seed))
    seen, started = hashlib.sha256(), time.process_time()
    memory: list[tuple[int, int]] = []
    alive: list[int] = []
    for index in range(steps):
        for x in step(index):
            seen.update(x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        if (index + 1) % max(1, steps // SAMPLES) == 0:
            alive.append(_tensors())
            memory.append((index + 1, _memory()))
    return {
        "what": what,
        "steps": steps,
        "seed": seed,
        "checksum": seen.hexdigest(),
        "cpu_seconds": round(time.process_time() - started, 1),
        "memory": memory,
        "bytes_per_1000_steps": round(1000 * _slope(memory)),
        "tensors_alive": [alive[int(SETTLED * len(alive))], alive[-1]],
    }


def _slope(memory: list[tuple[int, int]]) -> float:
    """Bytes a step, by least squares, once the run has settled."""
    rest = memory[int(SETTLED * len(memory)) :]
    x, y = torch.tensor(rest, dtype=torch.float64).T
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum().clamp(min=1))


def _twice(what: str, steps: int, seed: int) -> Iterator[dict[str, Any]]:
    for _ in range(2):
        command = [sys.executable, __file__, "--child", "--what", what]
        command += ["--steps", str(steps), "--seed", str(seed)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        yield json.loads(done.stdout)


def main(argv: list[str] | None = None) -> int:
    """The exit status: 1 where the bits of two runs differ."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--what", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--steps", type=int, default=10_000, help="default: 10000")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--output", metavar="PATH", type=Path, help="the result file to write")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        print(json.dumps(run(args.what[0], args.steps, args.seed)))
        return 0
    described, runs, same = machine.describe(), [], True
    for what in args.what:
        first, second = _twice(what, args.steps, args.seed)
        equal = first["checksum"] == second["checksum"]
        same &= equal
        runs.append({"same_bits": equal, "runs": [first, second]})
        for found in (first, second):
            start, end = found["memory"][int(SETTLED * SAMPLES)][1], found["memory"][-1][1]
            print(
                f"{what}: {found['steps']} steps, {found['cpu_seconds']:.0f} s of CPU, "
                f"{start / 2**20:.1f} MiB after a fifth, {end / 2**20:.1f} MiB at the end, "
                f"{found['bytes_per_1000_steps'] / 1024:+.1f} KiB per 1,000 steps, "
                f"tensors alive {found['tensors_alive'][0]}, then {found['tensors_alive'][1]}"
            )
        print(f"{what}: the same bits twice: {'yes' if equal else 'NO'}")
    name = Path(machine.file_name(described)).stem
    path = args.output or RESULTS / f"{name}-long-run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": described, "parts": runs}
    path.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(f"written: {path}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
