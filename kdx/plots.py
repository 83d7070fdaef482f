"""The figures of a run: its curves and its confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from kdx.figures import DASHES, INK, ROLES, TERMS, legend, literal, save, style
from kdx.formats import percent
from kdx.history import EvalLine, History, StepLine
from kdx.plots_shown import shown_panels
from kdx.result import Result, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    Draw: TypeAlias = Callable[[Axes], None]

BINS = 150
COUNTS_SHOWN_UP_TO = 20
NAMES_SHOWN = 60


def draw_curves(path: Path, result: Result, history: History, plain: History) -> bool:
    """Draw loss terms, validation accuracy and knobs; False, and no file, if nothing was recorded.

    `plain` is the history of the plain student, empty if it is not at hand.
    """
    panels = _panels(result, history, plain)
    if not panels:
        return False
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(6.2 * columns, 3.7 * rows), layout="constrained", facecolor="white")
    grid = figure.add_gridspec(rows, columns)
    for index, draw in enumerate(panels):
        row, column = divmod(index, columns)
        wide = index == len(panels) - 1 and column == 0  # an odd last panel takes the whole row
        draw(figure.add_subplot(grid[row, :] if wide else grid[row, column]))
    save(figure, path)
    return True


def draw_confusion(path: Path, result: Result) -> bool:
    """Draw the confusion matrix, coloured by the share of each true class; False, and no file, if there is none."""
    counts = np.asarray(result.confusion, dtype=float)
    if not counts.sum():
        return False
    classes = len(counts)
    side = float(np.clip(1.8 + 0.52 * classes, 4.2, 11))
    figure = Figure(figsize=(side + 1.1, side), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    # The root lifts rare confusions out of the background.
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1), interpolation="nearest")
    step = math.ceil(classes / NAMES_SHOWN)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(range(0, classes, step), labels=[literal(name) for name in result.classes[::step]])
        axis.set_tick_params(length=0, labelsize=9 if classes <= 30 else 6, labelcolor=INK)
    for label in axes.get_xticklabels():
        label.set(rotation=45, ha="right", rotation_mode="anchor")
    if classes <= COUNTS_SHOWN_UP_TO:
        for (row, column), share in np.ndenumerate(shares):
            if share > 0:
                colour = "white" if share > 0.3 else INK
                text = f"{result.confusion[row][column]}"
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    axes.set_xlabel("taken for", color=INK)
    axes.set_ylabel("true class", color=INK)
    axes.set_title(f"Student at epoch {result.best.epoch} on the test split", color=INK, fontsize=11, loc="left")
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02, format=PercentFormatter(1.0, decimals=0))
    bar.set_label("share of the true class", color=INK)
    bar.ax.tick_params(labelcolor=INK, length=0)
    bar.outline.set_visible(False)
    save(figure, path)
    return True


def _panels(result: Result, history: History, plain: History) -> list[Draw]:
    panels: list[Draw] = []
    terms = _names(line.terms for line in history.steps)
    # The total in ink, the rest in the order of the config.
    parts = [name for name in terms if name != "total"]
    colours = {name: TERMS[index % len(TERMS)] for index, name in enumerate(parts)}
    if terms:
        panels.append(partial(_draw_terms, steps=history.steps, names=terms, colours={**colours, "total": INK}))
    if history.curve("accuracy"):
        panels.append(partial(_draw_accuracy, result=result, history=history, plain=plain))
    if history.steps:
        panels.append(partial(_draw_rate, steps=history.steps))
    groups: dict[str, list[str]] = {}
    for name in _names(line.knobs for line in history.steps):
        if name != "train.lr":
            groups.setdefault(name.rpartition(".")[2], []).append(name)
    for kind, names in groups.items():
        panels.append(partial(_draw_knobs, steps=history.steps, kind=kind, names=names, colours=colours))
    return [*panels, *shown_panels(history.steps)]


def _draw_terms(axes: Axes, steps: Sequence[StepLine], names: Sequence[str], colours: Mapping[str, str]) -> None:
    style(axes, "Loss terms, unweighted (total: weighted)", "updates")
    values = {name: np.array([line.terms.get(name, math.nan) for line in steps]) for name in names}
    for index, name in enumerate(names):
        _line(axes, steps, values[name], name, colours[name], DASHES[index // len(TERMS) % len(DASHES)])
    shown = np.concatenate(list(values.values()))
    shown = shown[np.isfinite(shown)]
    if shown.size and shown.min() > 0 and shown.max() / shown.min() > 100:
        axes.set_yscale("log")
    legend(axes)


def _draw_accuracy(axes: Axes, result: Result, history: History, plain: History) -> None:
    style(axes, "Accuracy on the validation split", "epochs")
    kinds = ((result.teachers, "teacher"), (result.targets, "ensemble"))
    for rows, role in kinds:
        for index, (name, row) in enumerate(rows.items()):
            _level(axes, row, name, ROLES[role], DASHES[1 + index % 3])
    if curve := plain.curve("accuracy"):
        axes.plot(*_over_epochs(curve), color=ROLES["plain"], linestyle="--", linewidth=1.8, label="plain student")
    elif result.plain is not None:
        _level(axes, result.plain, "plain student (best)", ROLES["plain"], "--")
    name = "distilled student" if result.teachers or result.targets else "student"
    curve = history.curve("accuracy")
    axes.plot(*_over_epochs(curve), color=ROLES["student"], linewidth=2.2, label=name)
    best = [line for line in curve if line.step == result.best.step]
    if best:
        x, y = _over_epochs([*best, curve[-1]])
        label = f"best: {percent(y[0])}, epoch {result.best.epoch}"
        axes.plot(x[:1], y[:1], "o", color=ROLES["student"], markeredgecolor="white", markersize=8, label=label)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(axes)


def _draw_rate(axes: Axes, steps: Sequence[StepLine]) -> None:
    style(axes, "Learning rate", "updates")
    _line(axes, steps, np.array([line.lr for line in steps]), "train.lr", INK, "-")
    axes.set_ylim(bottom=0)


def _draw_knobs(
    axes: Axes, steps: Sequence[StepLine], kind: str, names: Sequence[str], colours: Mapping[str, str]
) -> None:
    style(axes, kind.replace("_", " ").capitalize(), "updates")
    for index, name in enumerate(names):
        owner = name.split(".")[1] if name.count(".") else name
        values = np.array([line.knobs.get(name, math.nan) for line in steps])
        _line(axes, steps, values, name, colours.get(owner, INK), DASHES[index % len(DASHES)])
    legend(axes)


def _line(axes: Axes, steps: Sequence[StepLine], values: np.ndarray, label: str, colour: str, dash: str) -> None:
    """A line through the means of equal spans of updates, in a band from their lowest to their highest value."""
    known = np.isfinite(values)
    if not known.any():
        return
    at = np.array([line.step for line in steps])[known]
    values = values[known]
    spans = np.array_split(np.arange(len(at)), min(BINS, max(len(at) // 4, min(len(at), 40))))
    x = [at[span].mean() for span in spans]
    axes.plot(x, [values[span].mean() for span in spans], dash, color=colour, linewidth=1.8, label=literal(label))
    low, high = [values[span].min() for span in spans], [values[span].max() for span in spans]
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _level(axes: Axes, row: Row, name: str, colour: str, dash: str) -> None:
    value = row.val.get("accuracy")
    if value is not None and math.isfinite(value):
        axes.axhline(value, color=colour, linestyle=dash, linewidth=1.5, label=literal(name))


def _over_epochs(lines: Sequence[EvalLine]) -> tuple[list[float], list[float]]:
    last = lines[-1]
    epochs_per_update = last.epoch / last.step if last.step else 0.0
    return [line.step * epochs_per_update for line in lines], [line.metrics["accuracy"] for line in lines]


def _names(mappings: Iterable[Mapping[str, float]]) -> list[str]:
    found: dict[str, None] = {}
    for mapping in mappings:
        found.update(dict.fromkeys(mapping))
    return list(found)
