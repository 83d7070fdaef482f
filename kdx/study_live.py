"""How a study goes: a live table on a terminal, elsewhere a line for each trial."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kdx.formats import NONE, counted, duration
from kdx.report import table_with
from kdx.study import Outcome, Study
from kdx.study_table import Line, best_line, progress_line, said_of, written


class Board:
    """Tells of the trials of a study as they end; a live table for the length of its block, unless `plain`."""

    def __init__(self, console: Console, study: Study, *, plain: bool) -> None:
        self._console = console
        self._study = study
        self._outcomes: Sequence[Outcome] = ()
        self._lines: Sequence[Line] = ()
        self._began = time.monotonic()
        self._ends: float | None = None
        self._live: Live | None = None
        if console.is_terminal and not plain:
            self._live = Live(console=console, get_renderable=self._table, refresh_per_second=1, transient=True)

    def __enter__(self) -> Board:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def tell(self, outcomes: Sequence[Outcome], lines: Sequence[Line], left: float) -> None:
        """Show the outcomes so far with their `lines`; `left` is the number of seconds to go, 0 if nobody knows."""
        self._outcomes, self._lines = tuple(outcomes), lines
        self._ends = time.monotonic() + left if left else None
        if self._live is None:
            total = len(self._study.seeds) * len(self._study.variants)
            line = progress_line(outcomes, total, left)
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            self._live.refresh()

    def _table(self) -> Table:
        now = time.monotonic()
        left = None if self._ends is None else max(0.0, self._ends - now)
        return board_table(self._study, self._outcomes, self._lines, spent=now - self._began, left=left)


def board_table(
    study: Study, outcomes: Sequence[Outcome], lines: Sequence[Line], *, spent: float, left: float | None
) -> Table:
    """The variants with what is known of them, the best first and those without a result last.

    A terminal cuts off what does not fit, which is then the least interesting part.
    """
    known = {line.variant: line for line in lines}
    last = {outcome.variant: outcome for outcome in outcomes}
    order = sorted((variant.name for variant in study.variants), key=lambda name: _rank(known.get(name)))
    table = table_with(_state(study, outcomes, spent, left), "")
    for head in ("variant", "seeds", "best", "- plain", "last result"):
        table.add_column(head, justify="left" if head in ("variant", "last result") else "right", no_wrap=True)
    best = best_line(lines)
    for name in order:
        line, outcome = known.get(name), last.get(name)
        failed = 0 if line is None else len(line.reasons)
        seeds = f"{line.seeds if line else 0}/{len(study.seeds)}" + (f", {failed} failed" if failed else "")
        said = NONE if outcome is None else f"seed {outcome.seed}: {said_of(outcome)}"
        table.add_row(
            Text(name),
            seeds,
            written(line.best if line else None),
            written(line.gain_best if line else None, sign="+"),
            Text(said.partition("\n")[0]),
            style="bold green" if best is not None and best.variant == name else "red" if failed else None,
        )
    return table


def _state(study: Study, outcomes: Sequence[Outcome], spent: float, left: float | None) -> str:
    total = len(study.seeds) * len(study.variants)
    parts = [f"{study.name}: {len(outcomes)} of {counted(total, 'trial')}", f"{duration(spent)} spent"]
    if left is not None:
        parts.append(f"about {duration(left)} left")
    return ", ".join(parts)


def _rank(line: Line | None) -> float:
    return 1.0 if line is None or line.best is None else -line.best.mean
