"""Results of many runs in one table, and in pictures."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import Subset

from hqod_ops.detection.harmony import HarmonyReport
from hqod_ops.detection.plots import draw_detections, plot_harmony
from hqod_ops.quant.config import FLOAT_BITS
from hqod_ops.training import ConfigError
from hqod_ops.training.build import load_detector
from hqod_ops.training.data import open_data
from hqod_ops.training.evaluate import HEADINGS, predict
from hqod_ops.training.files import HARMONY, RESULT, read_result

COLUMNS = {"AP": 100.0, "AP50": 100.0, "AP75": 100.0, "pearson": 1.0, "gap": 1.0}
"""Columns of the table and the factor their values are shown with."""

FIDELITY = {"score_shift": 1.0, "f1": 100.0}
"""Columns that need the float run: :meth:`hqod_ops.detection.harmony.HarmonyReport.fidelity`."""

_SHOWN = 8
"""Test images in the picture of detections."""

_SHOWN_SCORE = 0.25


def find_runs(paths: Iterable[str | Path]) -> list[Path]:
    """Directories of finished runs: those given, and those found below the ones given.

    Raises:
        ConfigError: there is none at or below a path.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        below = sorted(result.parent for result in path.rglob(RESULT))
        if not below:
            raise ConfigError(f"{path}: expected a finished run there or below, found none")
        found += below
    return list(dict.fromkeys(found))


def label(config: Mapping[str, Any]) -> str:
    """What a run is called in a table: its bits and its loss.

    Example:
        >>> from hqod_ops.training.reading import to_dict
        >>> from hqod_ops.training.settings import RunConfig
        >>> from hqod_ops.training.report import label
        >>> label(to_dict(RunConfig()))
        'FP32'
    """
    quant, loss = config["quant"], config["loss"]
    name = _quantized(quant)
    if loss["hqod"]:
        name += " + HQOD"
        if loss["variant"] != "official":
            name += f" ({loss['variant']})"
    return name + _taught(config.get("distill", {})) + _tuned(config.get("tuning", {}))


def _taught(distill: Mapping[str, Any]) -> str:
    """Whether it learned from a float model."""
    if not distill.get("teacher"):
        return ""
    return ", distilled" + ", no labels" * (not distill["labels"])


def _tuned(tuning: Mapping[str, Any]) -> str:
    """What was done beside training."""
    if not tuning.get("post_training"):
        return ""
    return ", post-training" + ", learned rounding" * bool(tuning["learn_rounding"])


def _quantized(quant: Mapping[str, Any]) -> str:
    bits, quantizers = (
        list(dict.fromkeys(quant[f"{kind}_{what}"] for kind in ("weight", "act")))
        for what in ("bits", "quantizer")
    )
    if bits == [FLOAT_BITS]:
        return "mixed bits" if quant["overrides"] else "FP32"
    width = f"{bits[0]}-bit" if len(bits) == 1 else f"W{bits[0]}A{bits[1]}"
    return f"{width} {'/'.join(quantizers).upper().replace('_PLUS', '+').replace('_', ' ')}"


def aggregate(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sample standard deviation over the runs that differ in their seed alone.

    Args:
        results (sequence of mapping): what :func:`hqod_ops.training.files.read_result` gives.

    Returns:
        list of dict: one for each group in order of appearance: ``label`` (with the names of its
        runs, where another group has the same), ``seeds``, ``runs`` (number of runs), and for each
        metric ``{"mean": ..., "std": ...}``, None without a value and, for std, with one; those of
        :data:`FIDELITY` where the results have them.

    Example:
        >>> from hqod_ops.training.reading import to_dict
        >>> from hqod_ops.training.settings import RunConfig
        >>> from hqod_ops.training.report import aggregate
        >>> metrics = {"AP": 0.5, "AP50": 0.8, "AP75": 0.6, "pearson": 0.7, "gap": 0.2}
        >>> runs = [{**metrics, "AP": ap, "config": to_dict(RunConfig(seed=s))}
        ...         for s, ap in enumerate((0.4, 0.5, 0.6))]
        >>> row = aggregate(runs)[0]
        >>> row["label"], row["seeds"], round(row["AP"]["mean"], 3), round(row["AP"]["std"], 3)
        ('FP32', [0, 1, 2], 0.5, 0.1)
    """
    rows = []
    for name, members in _by_settings(results).items():
        runs = [results[i] for i in members]
        row: dict[str, Any] = {
            "label": name,
            "seeds": [run["config"]["seed"] for run in runs],
            "runs": len(runs),
        }
        for column in _columns(results):
            values = [run[column] for run in runs if run.get(column) is not None]
            row[column] = {
                "mean": statistics.fmean(values) if values else None,
                "std": statistics.stdev(values) if len(values) > 1 else None,
            }
        rows.append(row)
    return rows


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The columns that results or rows have."""
    return COLUMNS | {k: v for k, v in FIDELITY.items() if any(k in row for row in rows)}


def read_results(directories: Sequence[Path]) -> list[dict[str, Any]]:
    """The results of finished runs, with what their scores have kept of the float run's.

    The float run of a quantized one is that it started from, or else one of its seed or any, as
    long as it was tested on the same images. Without one among them no result gets the entries.

    Args:
        directories (sequence of Path): of the runs.

    Returns:
        list of dict: what :func:`hqod_ops.training.files.read_result` gives, with the entries of
        :data:`FIDELITY`; those of float runs are their own F1, and no shift.
    """
    results = [read_result(directory) for directory in directories]
    known = [_harmony(directory) for directory in directories]
    floats = [
        i for i, r in enumerate(results) if known[i] and _quantized(r["config"]["quant"]) == "FP32"
    ]
    for i, result in enumerate(results):
        own = known[i]
        if own is None or own.found is None or i in floats:
            continue
        same = [k for k in floats if _same_images(own, known[k])]
        if not same:
            continue
        config = result["config"]
        start = Path(config["init"]).resolve()
        k = min(
            same,
            key=lambda k: (
                directories[k].resolve() not in (start, start.parent),
                results[k]["config"]["seed"] != config["seed"],
            ),
        )
        found = own.fidelity(known[k])  # type: ignore[arg-type]
        result["score_shift"] = None if math.isnan(found.shift) else found.shift
        result["f1"] = found.f1
        results[k]["f1"] = found.float_f1
    return results


def _harmony(directory: Path) -> HarmonyReport | None:
    """Of a run; None where it is missing, or of an earlier version, without detections."""
    try:
        report = HarmonyReport.load(directory / HARMONY)
    except OSError:
        return None
    return report if report.found is not None else None


def _same_images(own: HarmonyReport, other: HarmonyReport | None) -> bool:
    return bool(own.found and other and other.found and own.found.same_images(other.found))


def _by_settings(results: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """For each label, the indices of the runs that differ in their seed alone.

    Where two groups have the same label, the names of their runs are added.
    """
    groups: dict[str, list[int]] = {}
    for i, result in enumerate(results):
        # Checkpoints to start or to learn from have the seed in their path, the name may have it.
        shared = {k: v for k, v in result["config"].items() if k not in _SEED_DEPENDENT}
        if "distill" in shared:
            taught = bool(shared["distill"]["teacher"])
            shared["distill"] = {**shared["distill"], "teacher": taught}
        groups.setdefault(json.dumps(shared, sort_keys=True), []).append(i)
    labels = [label(results[members[0]]["config"]) for members in groups.values()]
    repeated = Counter(labels)
    for k, members in enumerate(groups.values()):
        if repeated[labels[k]] > 1:
            labels[k] += f" ({', '.join(results[i]['config']['name'] for i in members)})"
    return dict(zip(labels, groups.values(), strict=True))


_SEED_DEPENDENT = {"seed", "init", "name", "device"}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of :func:`aggregate` as a Markdown table.

    Example:
        >>> from hqod_ops.training.report import COLUMNS, markdown
        >>> row = {"label": "FP32", "runs": 1, **{c: {"mean": 0.5, "std": None} for c in COLUMNS}}
        >>> print(markdown([row]).splitlines()[-1])
        | FP32 | 50.0 | 50.0 | 50.0 | 0.500 | 0.500 |
    """
    several = any(row["runs"] > 1 for row in rows)
    columns = _columns(rows)
    heads = ["model", *(HEADINGS.get(c, c) for c in columns), *(["runs"] if several else [])]
    lines = ["| " + " | ".join(heads) + " |", "| --- " + "| ---: " * (len(heads) - 1) + "|"]
    for row in rows:
        cells = [str(row["label"]), *(_cell(row[c], factor) for c, factor in columns.items())]
        cells += [str(row["runs"])] if several else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: Mapping[str, float | None], factor: float) -> str:
    digits = 1 if factor > 1 else 3
    mean, std = value["mean"], value["std"]
    if mean is None:
        return "-"
    text = f"{factor * mean:.{digits}f}"
    return text if std is None else f"{text} ± {factor * std:.{digits}f}"


def write_report(runs: Iterable[str | Path], output: Path | None = None) -> str:
    """Aggregate finished runs; with ``output``, also write ``report.md`` and ``report.json`` there.

    Args:
        runs (iterable of str or Path): directories of runs, or directories above them.
        output (Path, optional): directory for the two files. Default: None

    Returns:
        str: the Markdown table.

    Raises:
        ConfigError: there is no finished run at or below a path.
    """
    rows = aggregate(read_results(find_runs(runs)))
    table = markdown(rows)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "report.md").write_text(table + "\n", encoding="utf-8")
        text = json.dumps(rows, indent=2, allow_nan=False) + "\n"
        (output / "report.json").write_text(text, encoding="utf-8")
    return table


def draw_report(runs: Iterable[str | Path], output: Path, *, progress: bool = True) -> None:
    """Draw what finished runs found; of runs that differ in their seed alone, the first one.

    ``harmony.png`` shows the score-IoU density of each, ``detections.png`` the last one's
    detections on some test images, which must still be where its settings say.

    Args:
        runs (iterable of str or Path): directories of runs, or directories above them.
        output (Path): directory for the two files.
        progress (bool): show a progress bar where the output is a terminal. Default: True

    Raises:
        ConfigError: there is no finished run at or below a path, or it lacks its checkpoint.
        OSError: a run lacks its ``harmony.npz``.
        DataError: the test images cannot be used; ``harmony.png`` is written all the same.
        ImportError: matplotlib is missing.
    """
    directories = find_runs(runs)
    groups = _by_settings([read_result(directory) for directory in directories])
    firsts = {name: directories[members[0]] for name, members in groups.items()}
    reports = {name: HarmonyReport.load(path / HARMONY) for name, path in firsts.items()}
    plot_harmony(reports, output / "harmony.png")
    model, config, categories = load_detector(list(firsts.values())[-1])
    # Of scenes that are drawn, no more than are shown; of files, the first ones.
    dataset = open_data(replace(config.data, test_images=_SHOWN))
    shown = Subset(dataset, range(min(_SHOWN, len(dataset))))
    outputs, targets = predict(model, shown, progress=progress)
    draw_detections(
        [dataset[i][0] for i in shown.indices],
        outputs,
        targets,
        output / "detections.png",
        categories=categories,
        score_threshold=_SHOWN_SCORE,
    )
