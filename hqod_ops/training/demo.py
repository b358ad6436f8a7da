"""The demonstration: one detector in floating point and quantized, with and without HQOD."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hqod_ops.quant.config import QATConfig
from hqod_ops.training.files import CHECKPOINT, is_finished, read_result
from hqod_ops.training.reading import to_dict
from hqod_ops.training.report import draw_report, label, write_report
from hqod_ops.training.run import Run
from hqod_ops.training.settings import (
    DataConfig,
    LossConfig,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
)

_FLOAT_LR, _QUANT_LR = 4e-3, 1e-3


@dataclass(frozen=True)
class Length:
    """How much a demonstration does."""

    train_images: int
    test_images: int
    float_epochs: int
    quant_epochs: int
    bits: tuple[int, ...] = (4, 2)
    model: ModelConfig = ModelConfig()
    batch_size: int = 8


LENGTHS: Mapping[str, Length] = {
    "quick": Length(
        train_images=128,
        test_images=32,
        float_epochs=4,
        quant_epochs=2,
        model=ModelConfig(stem=8, widths=(8, 16, 32), channels=16, head_depth=1, groups=4),
    ),
    "standard": Length(train_images=5000, test_images=500, float_epochs=6, quant_epochs=3),
    "full": Length(train_images=16000, test_images=1000, float_epochs=10, quant_epochs=5),
}
"""``hqod demo --quick``, ``hqod demo`` and ``hqod demo --full``."""


def demo_configs(length: Length, seed: int, directory: str, runs: Path) -> list[RunConfig]:
    """The runs of a demonstration: floating point first, then those that start from it.

    A quantized pair differs in nothing but the HQOD terms of its loss.

    Args:
        length (Length): how much it does.
        seed (int): of weights and order; the scenes are the same for every seed.
        directory (str): of this seed's runs, below the directory of all runs.
        runs (Path): the directory of all runs.

    Example:
        >>> from pathlib import Path
        >>> from hqod_ops.training.demo import LENGTHS, demo_configs
        >>> [c.name for c in demo_configs(LENGTHS["quick"], 0, "demo", Path("runs"))]
        ['demo/fp32', 'demo/w4', 'demo/w4-hqod', 'demo/w2', 'demo/w2-hqod']
    """
    base = RunConfig(
        name=f"{directory}/fp32",
        seed=seed,
        data=DataConfig(train_images=length.train_images, test_images=length.test_images),
        model=length.model,
        schedule=ScheduleConfig(
            epochs=length.float_epochs, batch_size=length.batch_size, lr=_FLOAT_LR
        ),
    )
    schedule = replace(base.schedule, epochs=length.quant_epochs, lr=_QUANT_LR)
    quantized = [
        replace(
            base,
            name=f"{directory}/w{bits}{'-hqod' if hqod else ''}",
            init=str(runs / base.name / CHECKPOINT),
            quant=QATConfig(bits, bits, weight_init="lsq" if bits == 2 else None),
            loss=LossConfig(hqod=hqod),
            schedule=schedule,
        )
        for bits in length.bits
        for hqod in (False, True)
    ]
    return [base, *quantized]


def run_demo(
    runs: Path,
    length: Length,
    *,
    name: str = "demo",
    seeds: Sequence[int] = (0,),
    progress: bool = True,
) -> Path:
    """Train what is not trained yet, print the table, and draw the pictures.

    Finished runs are kept and a stopped one is resumed, so the same call continues where an earlier
    one was cut off. It leaves in ``runs/name``: the runs, in ``seed0``, ``seed1``, ...;
    ``report.md`` and ``report.json``, over all seeds; and of the first seed ``harmony.png``, the
    score-IoU density of each model, and ``detections.png``.

    Args:
        runs (Path): the directory of all runs.
        length (Length): one of :data:`LENGTHS`.
        name (str): directory of the demonstration, below runs. Default: ``"demo"``
        seeds (sequence of int): a set of runs for each. Default: (0,)
        progress (bool): show progress bars where the output is a terminal. Default: True

    Returns:
        Path: the directory of the demonstration.

    Raises:
        ConfigError: the directory holds runs with other settings.
        Interrupted: Ctrl-C.
    """
    started = time.perf_counter()
    sets = [demo_configs(length, seed, f"{name}/seed{seed}", runs) for seed in seeds]
    number, count = 0, sum(map(len, sets))
    for configs in sets:
        for config in configs:
            number += 1
            _finish(config, runs, f"[{number}/{count}]", progress)
    directory = runs / name
    finished = [runs / config.name for configs in sets for config in configs]
    table = write_report(finished, directory)
    draw_report(finished, directory, progress=progress)
    print(f"\n{table}\n")
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes. Everything is in {directory}:")
    print("report.md, report.json, harmony.png, detections.png, and the runs, in seed0...")
    return directory


def _finish(config: RunConfig, runs: Path, number: str, progress: bool) -> None:
    """Train one run, unless its result is there; say in a line how it came out."""
    run = Run(config, runs, resume=True)
    what = f"{number} {label(to_dict(config))}, {config.schedule.epochs} epochs"
    if not is_finished(run.directory):
        if progress:
            print(f"{what} ...", flush=True)
        run.train(progress=progress)
    result = read_result(run.directory)
    print(
        f"{what}: AP {100 * result['AP']:.1f}, score-IoU correlation {result['pearson'] or 0:.3f}, "
        f"{result['seconds']:.0f} s",
        flush=True,
    )
