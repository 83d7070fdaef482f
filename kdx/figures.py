"""How every figure of kdx looks. A colour stands for one role in all of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito, 2008: told apart with every kind of colour vision.
ROLES: Mapping[str, str] = {"student": "#0072B2", "plain": "#D55E00", "teacher": "#009E73", "ensemble": "#CC79A7"}
# Paul Tol's muted scheme for what has no role: loss terms, and the knobs that belong to one; variants of a study.
TERMS = ("#332288", "#999933", "#882255", "#88CCEE", "#CC6677", "#DDCC77", "#44AA99", "#117733")
DASHES = ("-", "--", "-.", ":")
INK = "#333333"
GRID = "#dddddd"


def style(axes: Axes, title: str, x: str) -> None:
    """Title, grid and spines of a panel; `x` is the label of its horizontal axis."""
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(x, color=INK)
    axes.tick_params(colors=INK, length=3)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)


def legend(axes: Axes) -> None:
    """A legend, where something in the panel has a label."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8.5, frameon=True, framealpha=0.85, edgecolor="none", labelcolor=INK)


def literal(name: str) -> str:
    """A name as it is, since matplotlib would take `$` for mathematics and hide labels that start with `_`."""
    shown = name.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    figure.set_dpi(150)
    FigureCanvasAgg(figure).print_png(str(path))
