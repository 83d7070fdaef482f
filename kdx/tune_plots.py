"""The figures of a search: how it went, which keys matter, and where the good points lie."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kdx.figures import INK, ROLES, legend, literal, save, style
from kdx.formats import number
from kdx.tune import Choices, Range, Space
from kdx.tune_trials import Found

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_search(
    path: Path, trials: Sequence[Found], importances: Mapping[str, float], *, monitor: str, minimise: bool
) -> bool:
    """Draw the value of each trial with the best so far, and beside it what matters; False, and no file, without any
    finished trial.
    """
    done = [one for one in trials if one.value is not None]
    if not done:
        return False
    panels = 2 if importances else 1
    figure = Figure(figsize=(6.2 * panels, 4.2), layout="constrained", facecolor="white")
    grid = figure.subplots(1, panels, squeeze=False)[0]
    _draw_history(grid[0], trials, done, monitor, minimise=minimise)
    if importances:
        _draw_importances(grid[1], importances)
    save(figure, path)
    return True


def draw_parallel(path: Path, trials: Sequence[Found], space: Space, *, monitor: str, minimise: bool) -> bool:
    """Draw each finished trial as a line through its values, darker where better and the best one in colour; False,
    and no file, without any.
    """
    done = sorted((one for one in trials if one.value is not None), key=lambda one: one.value or 0.0, reverse=minimise)
    if not done:
        return False
    names = [*space, monitor]
    values = [float(one.value or 0.0) for one in done]
    span = Range(min(values), max(values) if max(values) > min(values) else min(values) + 1e-9)
    axes_of = {**space, monitor: span}
    figure = Figure(figsize=(max(6.0, 2.2 * len(names)), 4.4), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    style(axes, f"Finished trials: their values, and the validation {literal(monitor)}", "")
    for rank, one in enumerate(done):
        best = rank == len(done) - 1
        point = {**one.point, monitor: one.value}
        heights = [_height(axes_of[name], point[name]) for name in names]
        grey = str(0.85 - 0.6 * rank / len(done))
        axes.plot(heights, color=ROLES["student"] if best else grey, linewidth=2.4 if best else 1.1)
    for place, name in enumerate(names):
        axes.axvline(place, color=INK, linewidth=0.8)
        for height, text in _marks(axes_of[name]):
            axes.annotate(literal(text), (place, height), (3, 0), textcoords="offset points", fontsize=7.5, va="center")
    axes.set_xticks(range(len(names)), [literal(name) for name in names], fontsize=8)
    axes.set_yticks([])
    axes.grid(visible=False)
    save(figure, path)
    return True


def _draw_history(axes: Axes, trials: Sequence[Found], done: Sequence[Found], monitor: str, *, minimise: bool) -> None:
    style(axes, f"Best validation {literal(monitor)} of each trial", "trial")
    pick = min if minimise else max
    numbers = [one.number for one in done]
    values = [float(one.value or 0.0) for one in done]
    axes.step(numbers, [*accumulate(values, pick)], where="post", color=INK, linewidth=1.2, label="best so far")
    axes.scatter(numbers, values, s=22, color=ROLES["student"], label="finished", zorder=3)
    beaten = [one for one in trials if one.state == "pruned" and one.values]
    if beaten:
        heights = [pick(one.values.values()) for one in beaten]
        axes.scatter([one.number for one in beaten], heights, s=18, marker="x", color=ROLES["plain"], label="given up")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(axes)


def _draw_importances(axes: Axes, importances: Mapping[str, float]) -> None:
    style(axes, "What sets the better trials apart", "share")
    names = [*importances][::-1]
    axes.barh(range(len(names)), [importances[name] for name in names], color=ROLES["teacher"], height=0.6)
    axes.set_yticks(range(len(names)), [literal(name) for name in names], fontsize=8.5)
    axes.grid(visible=False, axis="y")


def _height(dimension: Range | Choices, value: object) -> float:
    """Where a value lies on its axis, in 0..1."""
    if isinstance(dimension, Choices):
        labels = [*dimension.values]
        return next(place for place, label in enumerate(labels) if label == value) / (len(labels) - 1)
    assert isinstance(value, int | float)
    low, high, found = dimension.low, dimension.high, float(value)
    if dimension.log:
        low, high, found = math.log(low), math.log(high), math.log(found)
    return (found - low) / (high - low)


def _marks(dimension: Range | Choices) -> list[tuple[float, str]]:
    """The texts beside an axis, by their heights."""
    if isinstance(dimension, Choices):
        last = len(dimension.values) - 1
        return [(place / last, str(label)) for place, label in enumerate(dimension.values)]
    return [(0.0, number(dimension.low)), (1.0, number(dimension.high))]
