"""Commands of a trained model: quantize it, choose its bits, time its files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hqod_ops.cli.options import bits_or_float, positive


def _float_run(arguments: argparse.Namespace) -> Any:
    from hqod_ops.training.tuning.runs import FloatRun

    return FloatRun(
        arguments.checkpoint, arguments.data, arguments.images, device=arguments.device or "auto"
    )


def _quantize(arguments: argparse.Namespace) -> int:
    from hqod_ops.training import ConfigError, reading
    from hqod_ops.training.files import is_finished
    from hqod_ops.training.report import aggregate, markdown, read_results
    from hqod_ops.training.tuning.runs import quantize_run

    values = reading.read(arguments.recipe) if arguments.recipe else {}
    if arguments.bits is not None:
        values = reading.merge(values, reading.setting("quant.bits", arguments.bits))
    if "quant" not in values:
        raise ConfigError("hqod quantize: expected --bits, or --recipe with a table [quant]")
    quant = reading.from_dict({"quant": values["quant"]}).quant
    directory = arguments.runs / arguments.name
    report, _ = quantize_run(
        _float_run(arguments),
        quant,
        directory,
        learn_rounding=arguments.learn_rounding,
        progress=not arguments.quiet,
    )
    start = arguments.checkpoint
    start = start if start.is_dir() else start.parent
    shown = [start, directory] if is_finished(start) else [directory]
    print(f"{report}\n\n{markdown(aggregate(read_results(shown)))}")
    print(f"Settings, checkpoint, result and what each step changed: {directory}")
    return 0


def _sensitivity(arguments: argparse.Namespace) -> int:
    from hqod_ops.training.tuning.runs import run_sensitivity

    found = run_sensitivity(
        _float_run(arguments),
        bits=arguments.bits,
        metric=arguments.metric,
        progress=not arguments.quiet,
    )
    print(found)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        found.save(arguments.output)
        found.plot(arguments.output.with_suffix(".png"))
        print(f"Written: {arguments.output}, and a picture beside it (.png)")
    return 0


def _search(arguments: argparse.Namespace) -> int:
    from hqod_ops.quant.config import to_toml
    from hqod_ops.quant.tuning import Sensitivity, search_bits
    from hqod_ops.training import ConfigError

    budgets = ("average_bits", "size_mb", "max_drop")
    try:
        found = Sensitivity.load(arguments.sensitivity)
        config = search_bits(found, **{name: getattr(arguments, name) for name in budgets})
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{arguments.sensitivity}: {error}") from None
    text = to_toml(config).replace("[[overrides]]", "[[quant.overrides]]")
    text = f"[quant]\n{text}"
    if arguments.output is None:
        print(text, end="")
    else:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text, encoding="utf-8")
        print(f"A recipe for hqod quantize --recipe and hqod train --recipe: {arguments.output}")
    return 0


def _bench_export(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from hqod_ops.quant.export import bench_export, speed_table
    from hqod_ops.training import ConfigError

    try:
        speeds = bench_export(
            arguments.file,
            runtimes=arguments.runtime,
            size=arguments.size and tuple(arguments.size),
            threads=arguments.threads or 1,
            rounds=arguments.rounds,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if arguments.json:
        print(json.dumps([asdict(speed) for speed in speeds]))
    else:
        print(speed_table(speeds))
    return 0


def add_tuning(
    command: Callable[..., argparse.ArgumentParser],
    shared: Callable[[argparse.ArgumentParser], None],
) -> None:
    """Add the commands to a parser.

    Args:
        command (callable): ``command(name, run, summary)`` adds one.
        shared (callable): adds the options that commands share.
    """

    def float_run(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "checkpoint", type=Path, help="checkpoint of a float run, or its directory"
        )
        sub.add_argument("--data", metavar="digits|PATH", help="other images; default: the run's")
        sub.add_argument("--images", type=positive, metavar="N", help="how many of them")
        sub.add_argument("--device", help="auto, cpu, cuda, cuda:1, ...")
        shared(sub)

    tune = command("quantize", _quantize, "Quantize a trained float run without training.")
    float_run(tune)
    tune.add_argument("--name", required=True, help="directory of the new run, below --runs")
    tune.add_argument("--runs", type=Path, default=Path("runs"), help="directory of all runs")
    tune.add_argument(
        "--bits", type=bits_or_float, metavar="B", help="of weights and inputs: 2 to 8"
    )
    tune.add_argument(
        "--recipe", metavar="FILE", help="a table [quant], such as hqod search writes"
    )
    rounding = "learn whether weights are rounded up or down: better at 4 bits and less, slower"
    tune.add_argument("--learn-rounding", action="store_true", help=rounding)

    sense = command(
        "sensitivity", _sensitivity, "What each layer of a float run costs at few bits."
    )
    float_run(sense)
    sense.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8], metavar="B")
    sense.add_argument("--metric", action="store_true", help="the AP too, by the images' labels")
    sense.add_argument("--output", type=Path, metavar="FILE", help="the .json for hqod search")

    find = command("search", _search, "Bits for every layer that fit a budget, as a recipe.")
    find.add_argument("sensitivity", type=Path, help="of hqod sensitivity --output")
    budget = find.add_mutually_exclusive_group(required=True)
    budget.add_argument("--average-bits", type=float, metavar="B", help="of a weight")
    budget.add_argument("--size-mb", type=float, metavar="MB", help="of the model")
    budget.add_argument("--max-drop", type=float, metavar="AP", help="of the metric")
    find.add_argument("--output", type=Path, metavar="FILE", help="the recipe; default: printed")
    shared(find)

    bench = command("bench-export", _bench_export, "Speed of ONNX files, beside the first of them.")
    bench.add_argument("file", nargs="+", type=Path, help="such as float.onnx w4a4.onnx")
    bench.add_argument(
        "--runtime", action="append", choices=("onnxruntime", "openvino"), help="default: both"
    )
    bench.add_argument("--size", nargs=2, type=positive, metavar=("H", "W"), help="if left open")
    bench.add_argument("--rounds", type=positive, default=20, metavar="N", help="default: 20")
    bench.add_argument("--json", action="store_true", help="the same as data")
    shared(bench)
