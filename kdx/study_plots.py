"""The figures of a study: validation curves with bands over seeds, and a forest plot of effects."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from kdx.figures import DASHES, INK, ROLES, TERMS, legend, literal, save, style
from kdx.history import History
from kdx.statistics import Spread
from kdx.study_table import METRIC, Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMED_UP_TO = 8
"""With more variants, only the reference, the best and the worst have a colour and a name."""
BEST, WORST = 4, 2


@dataclass(frozen=True)
class Curve:
    """Validation accuracy of some seeds of one variant at the epochs that all of them have: `epochs [E]`,
    `values [S, E]`.
    """

    epochs: np.ndarray
    values: np.ndarray


def curve_of(histories: Sequence[History]) -> Curve | None:
    """The curve of the runs of one variant, one history each; None if they share no evaluation."""
    seeds = [{line.step: line for line in history.curve(METRIC)} for history in histories]
    seeds = [lines for lines in seeds if lines]
    steps = sorted(set.intersection(*(set(lines) for lines in seeds))) if seeds else []
    if not steps:
        return None
    last = seeds[0][steps[-1]]
    per_update = last.epoch / last.step if last.step else 0.0
    values = [[lines[step].metrics[METRIC] for step in steps] for lines in seeds]
    return Curve(np.array(steps) * per_update, np.array(values))


def draw_validation(path: Path, curves: Mapping[str, Curve], plain: Curve | None, reference: str) -> bool:
    """Draw the mean of each variant in a band from the lowest to the highest seed; False, and no file, without any."""
    if not curves:
        return False
    figure = Figure(figsize=(10.5, 5.2), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    style(axes, "Accuracy on the validation split: mean, and the range over seeds", "epochs")
    named = _named(curves, reference)
    for name in curves.keys() - set(named):
        axes.plot(*_mean(curves[name]), color="#bbbbbb", linewidth=0.8, zorder=1)
    if rest := len(curves) - len(named):
        axes.plot([], [], color="#bbbbbb", linewidth=0.8, label=f"{rest} others")
    for index, name in enumerate(named):
        dash = DASHES[index // len(TERMS) % len(DASHES)]
        _draw(axes, curves[name], name, TERMS[index % len(TERMS)], dash, 2.6 if name == reference else 1.8)
    if plain is not None:
        _draw(axes, plain, "plain student", ROLES["plain"], "--", 1.8)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    # The first epochs would flatten what the end is about.
    ends = np.concatenate([curve.values[:, len(curve.epochs) // 4 :].ravel() for curve in curves.values()])
    axes.set_ylim(bottom=_floor(ends, axes.get_ylim()[0]))
    legend(axes)
    save(figure, path)
    return True


def draw_effects(path: Path, lines: Sequence[Line], reference: str) -> bool:
    """Draw what each variant adds to the plain student and to the reference, with 95 % bootstrap intervals and, below
    it, a small dot for each seed, the largest gain on top; False, and no file, without any difference.
    """
    panels = [
        (title, spreads)
        for title, spreads in (
            ("against the plain student", {line.variant: line.gain_best for line in lines}),
            (f"against {reference}", {line.variant: line.difference for line in lines}),
        )
        if any(spreads.values())
    ]
    if not panels:
        return False
    rows = [line.variant for line in sorted(lines, key=_effect)]
    height = 1.4 + (0.42 if len(rows) <= 15 else 0.27) * len(rows)
    figure = Figure(figsize=(5.6 * len(panels) + 1.2, height), layout="constrained", facecolor="white")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, spreads) in zip(grid, panels, strict=True):
        style(axes, f"Test accuracy {literal(title)}", "difference in points")
        axes.axvline(0, color=INK, linewidth=1)
        for place, name in enumerate(rows):
            if (found := spreads[name]) is not None:
                _draw_effect(axes, place, found)
        axes.grid(visible=False, axis="y")
    marked = {line.variant for line in lines if line.marks}
    names = [f"{name} †" if name in marked else name for name in rows]
    grid[0].set_yticks(range(len(rows)), [literal(name) for name in names], fontsize=9 if len(rows) <= 15 else 7.5)
    for label, name in zip(grid[0].get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if name == reference else "normal")
    grid[0].set_ylim(-0.7, len(rows) - 0.3)
    save(figure, path)
    return True


def _named(curves: Mapping[str, Curve], reference: str) -> list[str]:
    """The variants with a colour: all, or the reference, the best and the worst by the highest mean, best first."""
    order = sorted(curves, key=lambda name: -float(curves[name].values.mean(axis=0).max()))
    if len(order) <= NAMED_UP_TO:
        return list(curves)
    kept = {*order[:BEST], *order[-WORST:], reference}
    return [name for name in order if name in kept]


def _mean(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    return curve.epochs, curve.values.mean(axis=0)


def _draw(axes: Axes, curve: Curve, name: str, colour: str, dash: str, width: float) -> None:
    epochs, mean = _mean(curve)
    label = f"{literal(name)}, best {100 * mean.max():.2f} %"
    marker = "o" if len(epochs) == 1 else None
    axes.plot(epochs, mean, dash, color=colour, linewidth=width, label=label, marker=marker)
    if len(curve.values) > 1:
        low, high = curve.values.min(axis=0), curve.values.max(axis=0)
        axes.fill_between(epochs, low, high, color=colour, alpha=0.13, linewidth=0)


def _draw_effect(axes: Axes, place: int, found: Spread) -> None:
    colour = ROLES["student"] if found.mean >= 0 else ROLES["plain"]
    below = [place - 0.2] * len(found.values)
    axes.scatter([100 * value for value in found.values], below, s=9, color=colour, alpha=0.5, linewidths=0)
    if found.interval is not None:
        low, high = found.interval
        axes.plot([100 * low, 100 * high], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
    axes.plot([100 * found.mean], [place], "s", color=colour, markersize=5)


def _effect(line: Line) -> tuple[float, float]:
    """Sorts by the gain, and by the difference from the reference where no plain student is at hand."""
    return _mean_or_lowest(line.gain_best), _mean_or_lowest(line.difference)


def _mean_or_lowest(found: Spread | None) -> float:
    return -math.inf if found is None else found.mean


def _floor(values: np.ndarray, lowest: float) -> float:
    span = float(values.max() - values.min()) or 0.01
    return max(lowest, float(values.min()) - 0.25 * span)
