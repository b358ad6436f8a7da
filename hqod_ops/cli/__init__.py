"""The ``hqod`` command."""

from __future__ import annotations

import argparse
import errno
import functools
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hqod_ops._version import __version__
from hqod_ops.cli.options import bits_or_float, positive
from hqod_ops.cli.overview import example, overview
from hqod_ops.cli.tuning import add_tuning

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it; after SIGTERM it is 143."""

FAILED = 1
"""Exit code when training diverged or a process that loads images died."""

BAD_INPUT = 2
"""Exit code for a wrong option, path, setting or data set."""


_OPTIONS = (
    *("name", "seed", "init", "device", "data.source", "quant.bits", "loss.hqod"),
    *("schedule.epochs", "schedule.batch_size", "schedule.lr", "schedule.accumulate"),
    *("engine.precision", "engine.compile", "data.workers", "data.unreadable", "distill.teacher"),
)
"""Settings that are options of ``hqod train`` too; each is the destination of its option."""


def _train(arguments: argparse.Namespace) -> int:
    from hqod_ops.training.engine import launcher, rank
    from hqod_ops.training.files import CONFIG, read_result
    from hqod_ops.training.report import aggregate, markdown
    from hqod_ops.training.run import Run

    config = _run_config(arguments)
    command = [*launcher(), "train", "--resume", "--name", config.name]
    command += ["--runs", str(arguments.runs)]
    arguments.hint = f"; to continue: {shlex.join(command)}"
    run = Run(config, arguments.runs, resume=arguments.resume)
    if config.init and not arguments.resume and rank() == 0:
        print(f"Starting from {config.init}")
    run.train(progress=not arguments.quiet, say=functools.partial(print, flush=True))
    if rank() > 0:
        return 0
    print(markdown(aggregate([read_result(run.directory)])))
    print(f"Settings, log, checkpoint and result: {(run.directory / CONFIG).parent}")
    return 0


def _run_config(arguments: argparse.Namespace) -> Any:
    """Settings from, in this order, the stopped run, the recipe, --set, and the options."""
    from hqod_ops.training import ConfigError, reading
    from hqod_ops.training.files import saved_settings

    values = reading.read(arguments.recipe) if arguments.recipe else {}
    for text in arguments.set:
        values = reading.merge(values, reading.assignment(text))
    for name in _OPTIONS:
        value = getattr(arguments, name)
        if value is not None:
            values = reading.merge(values, reading.setting(name, value))
    if arguments.resume:
        if "name" not in values:
            raise ConfigError("--resume: expected --name of the run to resume")
        values = reading.merge(saved_settings(arguments.runs / str(values["name"])), values)
    return reading.from_dict(values)


def _settings(arguments: argparse.Namespace) -> int:
    from hqod_ops.training.reading import describe

    print(describe())
    return 0


def _test_images(arguments: argparse.Namespace, data: Any) -> Any:
    """The test images of a run, or those that the options name in their place."""
    import dataclasses

    from hqod_ops.detection.data import DataError
    from hqod_ops.training.data import open_data

    if arguments.data is not None:
        data = dataclasses.replace(data, source=arguments.data)
    if arguments.split is not None:
        data = dataclasses.replace(data, test_split=arguments.split)
    try:
        return open_data(data)
    except DataError as error:
        if arguments.data is not None or Path(data.source).exists():
            raise
        raise DataError(f"{error}; --data names where the images are now") from None


def _eval(arguments: argparse.Namespace) -> int:
    from hqod_ops.training.build import choose_device, load_detector
    from hqod_ops.training.data import check_categories
    from hqod_ops.training.evaluate import evaluate, metric_lines

    model, config, categories = load_detector(arguments.checkpoint)
    dataset = _test_images(arguments, config.data)
    check_categories("--data", "of the model", categories, dataset.categories)
    model = model.to(choose_device(arguments.device or "auto"))
    workers, progress = config.data.workers, not (arguments.quiet or arguments.json)
    metrics, _ = evaluate(model, dataset, workers=workers, progress=progress, categories=True)
    if arguments.json:
        print(json.dumps({k: None if v != v else v for k, v in metrics.items()}))
    else:
        print(*metric_lines(metrics), sep="\n")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    import torch

    from hqod_ops.quant import NMS, detection_network, export_onnx
    from hqod_ops.training import ConfigError
    from hqod_ops.training.batch import batch_images
    from hqod_ops.training.build import load_detector
    from hqod_ops.training.files import saved_shape

    if arguments.nms and arguments.outputs == "raw":
        raise ConfigError("--nms: expected --outputs boxes, got raw")
    model, config, _ = load_detector(arguments.checkpoint)
    if not config.quantized:
        raise ConfigError(f"{arguments.checkpoint}: expected a quantized run, got one in float")
    shape = saved_shape(arguments.checkpoint)
    if shape is None or arguments.data is not None or arguments.split is not None:
        image, _ = _test_images(arguments, config.data)[0]
    else:  # any values show whether the file computes what the model does
        image = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    test, nms = config.test, None
    if arguments.nms:
        nms = NMS(test.score_threshold, test.nms_iou, test.max_detections)
    outputs = arguments.outputs or ("boxes" if nms else "raw")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        report = export_onnx(
            detection_network(model.eval(), outputs),
            batch_images([image], torch.device("cpu"), model.stride),
            arguments.out,
            opset=arguments.opset,
            nms=nms,
            target=arguments.target,
            unsigned_weights=arguments.unsigned_weights,
        )
        print(report)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{arguments.checkpoint}: {error}") from None
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from hqod_ops.training.demo import LENGTHS, run_demo

    length = next((name for name in LENGTHS if getattr(arguments, name, False)), "standard")
    run_demo(
        arguments.runs,
        LENGTHS[length],
        name=arguments.name or ("demo" if length == "standard" else f"demo-{length}"),
        seeds=arguments.seeds,
        progress=not arguments.quiet,
    )
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from hqod_ops.training.report import draw_report, write_report

    print(write_report(arguments.run, arguments.output))
    if arguments.output is not None:
        draw_report(arguments.run, arguments.output, progress=False)
        files = "report.md, report.json, harmony.png, detections.png"
        print(f"Everything is in {arguments.output}: {files}")
    return 0


def _yolo(arguments: argparse.Namespace) -> int:
    from hqod_ops.extras import requirer

    requirer("ultralytics")("ultralytics")
    from hqod_ops.integrations.ultralytics_trainer import command
    from hqod_ops.training import ConfigError

    try:
        command(arguments.mode, arguments.setting)
    except (ValueError, TypeError, SyntaxError) as error:
        raise ConfigError(f"hqod yolo {arguments.mode}: {error}") from None
    return 0


def _info(arguments: argparse.Namespace) -> int:
    import importlib.metadata

    import torch

    import hqod_ops

    information = hqod_ops.build_info()
    try:
        information["torchvision"] = importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        information["torchvision"] = "not installed; hqod_ops.detection needs it"
    information["threads"] = str(torch.get_num_threads())
    if torch.version.cuda is None:
        information["cuda"] = "no: this torch is built without CUDA"
    elif not torch.cuda.is_available():
        information["cuda"] = f"no: torch has CUDA {torch.version.cuda}, but finds no usable GPU"
    else:
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        information["cuda"] = f"{torch.version.cuda}: {names}"
    width = max(map(len, information))
    for key, value in information.items():
        print(f"{key:{width}}  {value}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hqod",
        description="Train, quantize and evaluate detectors with the HQOD losses.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hqod_ops {__version__}")
    parser.add_argument("--debug", action="store_true", help="an error with its traceback")
    commands = parser.add_subparsers(metavar="COMMAND", help="one of those below")
    summaries: dict[str, str] = {}

    def command(
        name: str, run: Callable[[argparse.Namespace], int], summary: str
    ) -> argparse.ArgumentParser:
        # Without help: argparse would list them once more, in one heap.
        sub = commands.add_parser(
            name,
            description=summary,
            epilog=f"example: {example(name)}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        summaries[name] = summary
        sub.set_defaults(command=run, hint="")
        return sub

    def shared(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--quiet", action="store_true", help="no progress bars")
        sub.add_argument("--threads", type=positive, metavar="N", help="CPU threads")

    def data(sub: argparse.ArgumentParser, meaning: str) -> None:
        sub.add_argument("--data", metavar="digits|PATH", help=meaning)
        sub.add_argument("--split", help="default: the test split of the run")

    train = command("train", _train, "Train a detector, in floating point or quantized.")
    option = train.add_argument
    option("--data", dest="data.source", metavar="digits|PATH", help="a path: COCO or VOC layout")
    option("--name", help="directory of the run, below --runs")
    option("--recipe", metavar="FILE", help="settings, TOML or JSON")
    option("--epochs", dest="schedule.epochs", type=positive, metavar="N")
    option("--batch-size", dest="schedule.batch_size", type=positive, metavar="N")
    option("--lr", dest="schedule.lr", type=float, metavar="RATE", help="highest learning rate")
    bits = "of weights and inputs: 2 to 8, or float"
    option("--bits", dest="quant.bits", type=bits_or_float, metavar="B", help=bits)
    hqod = argparse.BooleanOptionalAction
    option("--hqod", dest="loss.hqod", action=hqod, default=None, help="add the HQOD losses")
    option("--init", metavar="CHECKPOINT", help="weights of a float run to start from")
    teacher = "float run with the same network to learn from"
    option("--distill", dest="distill.teacher", metavar="CHECKPOINT", help=teacher)
    option("--seed", type=int, metavar="S")
    option("--device", help="auto, cpu, cuda, cuda:1, ...")
    parts = "parts that the images of a step come in"
    option("--accumulate", dest="schedule.accumulate", type=positive, metavar="N", help=parts)
    option("--precision", dest="engine.precision", choices=("fp32", "bf16", "fp16"))
    compiled = "torch.compile the network"
    option("--compile", dest="engine.compile", action=hqod, default=None, help=compiled)
    option("--workers", dest="data.workers", type=int, metavar="N", help="that load images")
    skip = "leave image files out that cannot be read"
    option(
        "--skip-unreadable", dest="data.unreadable", action="store_const", const="skip", help=skip
    )
    every = "any setting; hqod settings lists them all"
    option("--set", action="append", default=[], metavar="TABLE.SETTING=VALUE", help=every)
    train.add_argument("--runs", type=Path, default=Path("runs"), help="directory of all runs")
    train.add_argument("--resume", action="store_true", help="continue the run of this name")
    shared(train)

    command("settings", _settings, "Every setting of hqod train, its default and its meaning.")

    evaluate = command("eval", _eval, "Evaluate a checkpoint.")
    evaluate.add_argument("checkpoint", type=Path, help="checkpoint, or directory of a run")
    data(evaluate, "default: the data of the run")
    evaluate.add_argument("--device", help="auto, cpu, cuda, cuda:1, ...")
    evaluate.add_argument("--json", action="store_true", help="the same as data, in [0, 1]")
    shared(evaluate)

    export = command("export", _export, "Write the network of a quantized run as ONNX.")
    export.add_argument("checkpoint", type=Path, help="checkpoint, or directory of a run")
    data(export, "of the images whose size the file takes; default: that of the run's images")
    export.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .onnx file")
    export.add_argument(
        "--outputs", choices=("raw", "boxes"), help="predictions, or decoded boxes and scores"
    )
    export.add_argument(
        "--nms", action="store_true", help="boxes after suppression, by the thresholds of the run"
    )
    export.add_argument(
        "--target",
        choices=("onnxruntime", "openvino", "tensorrt", "smallest"),
        default="onnxruntime",
        help="where the file is to be fast, or small; default: onnxruntime",
    )
    export.add_argument("--opset", type=positive, metavar="N", help="highest opset to be used")
    export.add_argument(
        "--unsigned-weights",
        action="store_true",
        help="8-bit weights as uint8: exact on x86 without VNNI too",
    )

    add_tuning(command, shared)

    demo = command("demo", _demo, "FP32, then 4 and 2 bits with and without HQOD, on digits.")
    length = demo.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="under a minute: shows that it works")
    length.add_argument("--full", action="store_true", help="longer: the numbers worth quoting")
    demo.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="S")
    demo.add_argument("--name", help="directory of the demo, below --runs")
    demo.add_argument("--runs", type=Path, default=Path("runs"), help="directory of all runs")
    demo.set_defaults(hint="; the same command continues")
    shared(demo)

    report = command(
        "report", _report, "A table over finished runs: mean and deviation over seeds."
    )
    report.add_argument("run", nargs="+", type=Path, help="directories of runs, or above them")
    report.add_argument(
        "--output", type=Path, metavar="DIRECTORY", help="for the table and for pictures"
    )

    yolo = command("yolo", _yolo, "Ultralytics' train, val and predict, for quantized models.")
    yolo.add_argument("mode", choices=("train", "val", "predict"))
    own = "as of Ultralytics' yolo; for train also qat=PRESET|FILE.toml"
    yolo.add_argument("setting", nargs="+", metavar="NAME=VALUE", help=own)

    command("info", _info, "Versions, libraries, instruction set, CUDA or why not.")
    parser.epilog = overview(summaries)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; errors in what the user gave are one line.

    Args:
        argv (sequence of str, optional): the arguments. Default: None, those of the process

    Returns:
        int: exit code: 0, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM.
    """
    from hqod_ops import check_environment
    from hqod_ops.detection.data import DataError
    from hqod_ops.training import ConfigError, WorkerError

    parser = _parser()
    arguments = parser.parse_args(argv)
    if "command" not in arguments:
        parser.print_help()
        return 0
    if getattr(arguments, "threads", None):
        import torch

        torch.set_num_threads(arguments.threads)
    try:
        if arguments.command is not _info:  # which shows what is wrong
            check_environment()
        return int(arguments.command(arguments))
    except KeyboardInterrupt as stop:
        where = f" ({stop})" if str(stop) else ""
        if int(os.environ.get("RANK", 0)) == 0:  # under torchrun, all processes are stopped
            print(f"hqod: interrupted{where}{arguments.hint}", file=sys.stderr, flush=True)
        return 128 + int(getattr(stop, "signum", signal.SIGINT))
    except (ConfigError, DataError, ImportError, OSError, FloatingPointError, WorkerError) as error:
        if arguments.debug:
            raise
        return _explained(error, arguments.hint)


def _explained(error: Exception, hint: str) -> int:
    """Print an error as one line; its exit code."""
    from hqod_ops.training import WorkerError

    if isinstance(error, ModuleNotFoundError):
        print(f'hqod: {error}: pip install "hqod_ops[detection]"', file=sys.stderr)
        return BAD_INPUT
    if isinstance(error, (FloatingPointError, WorkerError)):
        print(f"hqod: {error}{hint if isinstance(error, WorkerError) else ''}", file=sys.stderr)
        return FAILED
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    print(f"hqod: {' '.join(str(error).split())}{hint if full else ''}", file=sys.stderr)
    return BAD_INPUT
