"""The panels of what targets show over training: the weights of teachers and temperatures, with their spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kdx.figures import DASHES, TERMS, legend, literal, style
from kdx.history import StepLine
from kdx.shown import SPREAD

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes

BINS = 60


def shown_panels(steps: Sequence[StepLine]) -> list[Callable[[Axes], None]]:
    """One panel for each field that a target shows."""
    groups: dict[str, dict[str, None]] = {}
    for line in steps:
        for name in line.shown:
            if name.endswith(SPREAD):
                groups.setdefault(group_of(name), {})[name.removesuffix(SPREAD)] = None
    return [partial(_draw, steps=steps, title=title, names=list(names)) for title, names in groups.items()]


def group_of(name: str) -> str:
    """The field behind a name: `committee.weights` for `committee.weights.wide`, `tau` for `tau`."""
    parts = name.removesuffix(SPREAD).split(".")
    return ".".join(parts[:2])


def _draw(axes: Axes, steps: Sequence[StepLine], title: str, names: Sequence[str]) -> None:
    style(axes, f"{literal(title)}: mean and spread over the samples", "updates")
    spans = np.array_split(np.arange(len(steps)), min(BINS, len(steps)))
    x = [np.mean([steps[place].step for place in span]) for span in spans]
    for index, name in enumerate(names):
        mean, spread = (_binned(steps, spans, key) for key in (name, f"{name}{SPREAD}"))
        colour = TERMS[index % len(TERMS)]
        label = name.removeprefix(f"{title}.")
        axes.plot(x, mean, DASHES[index // len(TERMS) % len(DASHES)], color=colour, linewidth=1.8, label=literal(label))
        axes.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)
    legend(axes)


def _binned(steps: Sequence[StepLine], spans: Sequence[np.ndarray], name: str) -> np.ndarray:
    """The mean of a number over equal spans of updates; nan where it was not shown."""
    values = np.array([line.shown.get(name, math.nan) for line in steps])
    return np.array([np.nan if np.isnan(values[span]).all() else np.nanmean(values[span]) for span in spans])
