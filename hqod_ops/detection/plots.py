"""Pictures of detectors: harmony of score and IoU, detections, training curves."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hqod_ops.detection._extras import require
from hqod_ops.detection.data.dataset import Target
from hqod_ops.detection.harmony import HarmonyReport, match_detections, to_array

INK, MUTED, GRID = "#1f2937", "#6b7280", "#e5e7eb"
BLUE, ORANGE, GREEN, PURPLE, RED = "#2563eb", "#ea7317", "#0f9d76", "#7c3aed", "#dc2640"
_SIDE = 480
"""Longer side of an image with boxes, in pixels."""

SERIES = (BLUE, ORANGE, GREEN, PURPLE, RED, MUTED)
_DENSITY_COLORS = ("#ffffff", "#dbe7fb", "#93b8f2", "#4a7fdc", "#2a4fa8", "#1b2a63", "#0d1230")

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.dpi": 160,
}


@contextlib.contextmanager
def styled_figure(path: str | Path, width: float, height: float) -> Iterator[Any]:
    """A figure in our style (inches), saved at the end; no window and no global state of pyplot."""
    matplotlib = require("matplotlib")
    figure_class = require("matplotlib.figure").Figure
    backend = require("matplotlib.backends.backend_agg")
    with matplotlib.rc_context(_STYLE):
        figure = figure_class(figsize=(width, height), layout="constrained")
        backend.FigureCanvasAgg(figure)
        yield figure
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Constrained layout alone cuts the labels of axes with a fixed aspect.
        figure.savefig(path, bbox_inches="tight", pad_inches=0.12)


def color_map(name: str, colors: Sequence[str]) -> Any:
    return require("matplotlib.colors").LinearSegmentedColormap.from_list(name, list(colors))


def plot_harmony(reports: Mapping[str, HarmonyReport], path: str | Path, columns: int = 5) -> None:
    """Score-against-IoU densities of several detectors, side by side on one colour scale.

    Detections on the dashed diagonal have a score that tells their IoU.

    Args:
        reports (mapping): name of the detector to its report.
        path (str or Path): the picture to write; its suffix chooses the format.
        columns (int): at most so many panels a row. Default: 5

    Raises:
        ValueError: there is no report.
        ImportError: matplotlib is missing.

    Example:
        >>> import os, tempfile
        >>> import numpy as np
        >>> from hqod_ops.detection.harmony import HarmonyReport
        >>> from hqod_ops.detection.plots import plot_harmony
        >>> report = HarmonyReport(np.linspace(0, 1, 99), np.linspace(0, 1, 99))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_harmony({"ideal": report}, os.path.join(folder, "harmony.png"))
    """
    if not reports:
        raise ValueError("reports: expected at least one, got none")
    columns = min(columns, len(reports))
    rows = math.ceil(len(reports) / columns)
    top = max((float(report.density.max()) for report in reports.values()), default=0.0)
    with styled_figure(path, 2.75 * columns + 0.9, 3.25 * rows) as figure:
        # Most cells hold little: a power scale shows them beside the peak.
        norm = require("matplotlib.colors").PowerNorm(0.4, vmin=0.0, vmax=max(top, 1.0))
        colors = color_map("density", _DENSITY_COLORS)
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        mesh = None
        for i, axes in enumerate(grid.flat):
            if i >= len(reports):
                axes.set_visible(False)
                continue
            name, report = list(reports.items())[i]
            edges = np.linspace(0.0, 1.0, report.bins + 1)
            mesh = axes.pcolormesh(
                edges, edges, report.density, cmap=colors, norm=norm, rasterized=True
            )
            axes.plot([0, 1], [0, 1], color=ORANGE, linewidth=1.2, linestyle=(0, (4, 3)))
            axes.set_title(f"{name}\n", loc="left")
            axes.text(
                0.0,
                1.03,
                f"r = {report.pearson:.3f}   ρ = {report.spearman:.3f}   gap = {report.gap:.3f}",
                transform=axes.transAxes,
                fontsize=8.5,
                color=MUTED,
            )
            axes.text(
                0.03,
                0.97,
                f"{report.num_matches:,} boxes",
                transform=axes.transAxes,
                fontsize=8,
                color=MUTED,
                va="top",
            )
            axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
            axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
            axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
            if i + columns >= len(reports):
                axes.set_xlabel("IoU with the ground truth")
                axes.tick_params(labelbottom=True)
            if i % columns == 0:
                axes.set_ylabel("score")
        bar = figure.colorbar(mesh, ax=grid, shrink=0.75, pad=0.015, aspect=24)
        bar.set_label("density of detections", color=MUTED)
        bar.outline.set_visible(False)


def draw_detections(
    images: Sequence[Tensor],
    outputs: Sequence[Mapping[str, Tensor]],
    targets: Sequence[Target],
    path: str | Path,
    *,
    categories: Sequence[str] | None = None,
    score_threshold: float = 0.3,
    iou_threshold: float = 0.5,
    columns: int = 4,
) -> None:
    """Detections and ground truth on a grid of images.

    Found objects are drawn green, false detections red, missed objects white.

    Args:
        images (sequence of Tensor[3, H, W]): values in [0, 1].
        outputs (sequence of dict): ``"boxes"``, ``"scores"`` and ``"labels"`` of each image.
        targets (sequence of dict): ``"boxes"`` and ``"labels"`` of each image, in the same pixels.
        path (str or Path): the picture to write.
        categories (sequence of str, optional): names of the classes. Default: None, the labels
        score_threshold (float): detections below it are left out. Default: 0.3
        iou_threshold (float): the least IoU with which an object counts as found. Default: 0.5
        columns (int): images a row. Default: 4

    Raises:
        ValueError: there is no image, or the lists differ in length.
        ImportError: matplotlib is missing.

    Example:
        >>> import os, tempfile
        >>> import torch
        >>> from hqod_ops.detection.plots import draw_detections
        >>> found = {"boxes": torch.tensor([[8., 8., 24., 24.]]), "labels": torch.tensor([3])}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     draw_detections([torch.rand(3, 32, 32)], [{**found, "scores": torch.tensor([0.9])}],
        ...                     [found], os.path.join(folder, "detections.png"))
    """
    if not images or not len(images) == len(outputs) == len(targets):
        raise ValueError(
            "images, outputs and targets: expected as many of each, at least one, "
            f"got {len(images)}, {len(outputs)} and {len(targets)}"
        )
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    with styled_figure(path, 2.6 * columns, 2.6 * rows + 0.35) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, image, output, target in zip(grid.flat, images, outputs, targets, strict=False):
            pixels = _with_boxes(image, output, target, categories, score_threshold, iou_threshold)
            axes.imshow(pixels.permute(1, 2, 0).numpy())
        lines = require("matplotlib.lines")
        legend = figure.legend(
            handles=[
                lines.Line2D([], [], color=GREEN, linewidth=2, label="found: class and score"),
                lines.Line2D([], [], color=RED, linewidth=2, label="false"),
                lines.Line2D([], [], color="white", linewidth=2, label="missed"),
            ],
            loc="outside lower center",
            ncols=3,
            frameon=True,
            facecolor="#9ca3af",
            edgecolor="none",
            fontsize=9,
        )
        legend.get_frame().set_boxstyle("round", pad=0.15)


def _with_boxes(
    image: Tensor,
    output: Mapping[str, Tensor],
    target: Target,
    categories: Sequence[str] | None,
    score_threshold: float,
    iou_threshold: float,
) -> Tensor:
    """An image, enlarged, with its detections and the objects that they missed."""
    found = {key: output[key].detach().cpu() for key in ("boxes", "scores", "labels")}
    order = found["scores"].argsort(stable=True)  # the best one is drawn last
    order = order[found["scores"][order] >= score_threshold]
    boxes, scores, labels = (to_array(found[key][order]) for key in ("boxes", "scores", "labels"))
    truth, truth_labels = to_array(target["boxes"]), to_array(target["labels"])
    matched, _ = match_detections(boxes, scores, labels, truth, truth_labels, iou_threshold)
    missed = sorted(set(range(len(truth))) - set(matched.tolist()))

    def name(label: int) -> str:
        return str(label) if categories is None else categories[label]

    captions = [name(label) for label in truth_labels[missed].tolist()]
    captions += [f"{name(n)} {s:.2f}" for n, s in zip(labels.tolist(), scores, strict=True)]
    colors = ["#ffffff"] * len(missed) + [GREEN if m >= 0 else RED for m in matched]
    pixels = image.detach().cpu().float().clamp(0, 1)
    zoom = _SIDE / max(pixels.shape[1:])
    pixels = functional.interpolate(pixels[None], scale_factor=zoom, mode="nearest")[0]
    if not colors:
        return pixels
    drawn = torch.from_numpy(np.concatenate([truth[missed], boxes])).double() * zoom
    draw = require("torchvision.utils").draw_bounding_boxes
    outline = drawn + drawn.new_tensor([-1, -1, 1, 1])
    pixels = draw(pixels, outline, colors=INK, width=5)
    annotated: Tensor = draw(
        pixels,
        drawn,
        captions,
        colors=colors,
        width=3,
        font=require("matplotlib.font_manager").findfont("DejaVu Sans"),
        font_size=15,
        fill_labels=True,
        label_colors=[INK if color == "#ffffff" else "#ffffff" for color in colors],
    )
    return annotated


def plot_curves(
    history: Sequence[Mapping[str, float]] | Mapping[str, Sequence[Mapping[str, float]]],
    path: str | Path,
) -> None:
    """Loss and AP over the epochs of one training run, or of several.

    Args:
        history (sequence or mapping): a list with a dict an epoch, ``"epoch"``, ``"loss"`` and,
            where it was measured, ``"AP"`` (in [0, 1]); or such a list for each name.
        path (str or Path): the picture to write.

    Raises:
        ValueError: there is no epoch.
        ImportError: matplotlib is missing.

    Example:
        >>> import os, tempfile
        >>> from hqod_ops.detection.plots import plot_curves
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_curves([{"epoch": 1, "loss": 2.0}], os.path.join(folder, "curves.png"))
    """
    runs = dict(history) if isinstance(history, Mapping) else {"": history}
    if not any(len(run) for run in runs.values()):
        raise ValueError("history: expected at least one epoch, got none")
    measured = any(entry.get("AP") is not None for run in runs.values() for entry in run)
    panels = [("loss", "Training loss", 1.0)]
    if measured:
        panels.append(("AP", "AP on held-out images (%)", 100.0))
    with styled_figure(path, 4.5 * len(panels), 3.5) as figure:
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (key, title, factor) in zip(grid, panels, strict=True):
            for (name, run), color in zip(runs.items(), _cycle(SERIES), strict=False):
                points = [(e["epoch"], factor * e[key]) for e in run if e.get(key) is not None]
                x, y = zip(*points, strict=True) if points else ((), ())
                axes.plot(x, y, color=color, linewidth=2, marker="o", markersize=3.5, label=name)
            axes.set_title(title, loc="left")
            axes.set_xlabel("epoch")
            axes.set_ylim(bottom=0)
            axes.grid(axis="y")
            axes.xaxis.get_major_locator().set_params(integer=True)
        if any(runs):
            figure.legend(
                *grid[0].get_legend_handles_labels(),
                loc="outside lower center",
                ncols=min(len(runs), 5),
            )


def _cycle(colors: Sequence[str]) -> Iterator[str]:
    while True:
        yield from colors
