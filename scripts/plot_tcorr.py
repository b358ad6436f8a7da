"""Draw docs/images/tcorr.png: the TCorr loss over score p and IoU u, and the way it pushes.

    python scripts/plot_tcorr.py [docs/images/tcorr.png]

Arrows follow the negative gradient; hatched is where the loss lowers the score p, bounded by the
line where its derivative by p is 0.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch

from hqod_ops import tcorr_loss
from hqod_ops.detection import plots

LOSS_COLORS = ("#14324f", "#1f6f8b", "#63b7a6", "#c9e4c5", "#fdf3d6", "#f6b26b", "#d9573f")


def plot_tcorr(path: Path) -> None:
    """Draw the two variants side by side."""
    cells = 400
    line = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    surfaces = {}
    for variant in ("official", "geometric"):
        u, p = torch.meshgrid(line, line, indexing="ij")
        p, u = p.clone().requires_grad_(), u.clone().requires_grad_()
        surface = tcorr_loss(p, u, variant=variant)
        slopes = torch.autograd.grad(surface.sum(), (p, u))
        surfaces[variant] = (surface.detach().numpy(), *(slope.numpy() for slope in slopes))
    x = line.numpy()
    with plots.styled_figure(path, 10.2, 5.0) as figure:
        matplotlib.rcParams.update({"hatch.color": "#1f293799", "hatch.linewidth": 0.6})
        axes = figure.subplots(1, 2, sharey=True)
        colors = plots.color_map("loss", LOSS_COLORS)
        levels = np.linspace(0.0, 1.3, 27)
        for panel, (variant, (loss, d_p, d_u)) in zip(axes, surfaces.items(), strict=True):
            filled = panel.contourf(x, x, loss, levels=levels, cmap=colors)
            step = slice(10, None, 20)
            length = np.hypot(d_p, d_u)[step, step]
            panel.quiver(
                x[step],
                x[step],
                -d_p[step, step] / length,
                -d_u[step, step] / length,
                color="white",
                scale=34,
                width=0.0035,
                headwidth=4.5,
                alpha=0.85,
            )
            lowered = float((d_p > 0).mean())
            title = "official (as published)" if variant == "official" else variant
            panel.set_title(title + "\n", loc="left")
            note = "the score is raised everywhere"
            if lowered > 0:
                panel.contourf(x, x, d_p, levels=[0, np.inf], colors="none", hatches=["///"])
                panel.contour(x, x, d_p, levels=[0], colors=[plots.INK], linewidths=1.8)
                note = f"hatched: the score is lowered, on {100 * lowered:.0f} % of the square"
            panel.text(0, 1.025, note, transform=panel.transAxes, fontsize=9, color=plots.MUTED)
            optima = [(1, 1), (0, 0)] if variant == "official" else [(1, 1)]
            for at in optima:
                panel.plot(*at, "o", color="white", mec=plots.INK, markersize=9, clip_on=False)
            panel.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="score p")
        axes[0].set_ylabel("IoU u")
        bar = figure.colorbar(filled, ax=axes, shrink=0.85, pad=0.015, ticks=np.arange(0, 1.3, 0.2))
        bar.set_label("loss (○ optimum)", color=plots.MUTED)
        bar.outline.set_visible(False)


if __name__ == "__main__":
    default = Path(__file__).parents[1] / "docs" / "images" / "tcorr.png"
    plot_tcorr(Path(sys.argv[1]) if sys.argv[1:] else default)
