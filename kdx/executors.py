"""Carries out the trials of a study: side by side in this process, or in units that run wherever an executor puts them.

A unit is a list of trials that train side by side, or of one, and ends with a `Finding` for each. What a trial found
lies in its folder, so a unit may run anywhere that sees the folder of runs.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from kdx.errors import KdxError
from kdx.fanout import groups, side_by_side
from kdx.result import Result, read_result
from kdx.runs import Options, Prepared, Stopped, carry_out, family, finished, prepare
from kdx.study import Outcome, Trial

Tell = Callable[[Sequence[Outcome], float], None]
"""Gets the outcomes so far, in the order of the trials, and the seconds that are probably left."""


@dataclass(frozen=True)
class Finding:
    """What came of the config at `place`: the folder that holds its result, or the reason why there is none."""

    place: int
    folder: str
    reason: str = ""


@dataclass(frozen=True)
class Unit:
    """Configs by their places in the study, which one worker carries out side by side.

    With `fresh` they are trained anew, each once for the `command` that the unit is of: one that is begun again, since
    its process died, goes on.
    """

    configs: Mapping[int, Mapping[str, Any]]
    fresh: bool = False
    command: str = ""


Found = Callable[[Finding], None]
Executor = Callable[[Sequence[Unit], Found, Callable[[], bool]], None]
"""Carries out units that do not depend on each other and tells of each finding; raises `Stopped` when asked to stop."""


def carry_out_study(
    trials: Sequence[Trial],
    options: Options,
    tell: Tell,
    *,
    fan_out: bool = True,
    jobs: int = 1,
    execute: Executor | None = None,
) -> list[Outcome]:
    """Train what is missing. A trial that fails is kept with its reason and does not stop the others.

    With `fan_out`, trials that share data and seed train side by side. Without `execute` all happens in this process;
    with it, first the runs that trials need, then the trials in at least `jobs` units, where there are as many.
    """
    board = _Board(trials, tell)
    ready: dict[int, Prepared] = {}
    for place, trial in enumerate(trials):
        try:
            prepared = prepare(trial.config, options)
            done = not options.fresh and all(finished(one) for one, _ in family(prepared, options))
            if done:
                carry_out(prepared, options)  # writes what an earlier process did not come to
        except Exception as error:
            board.found(Finding(place, "", reason_of(error)))
            continue
        if done:
            board.found(Finding(place, str(prepared.folder)))
        else:
            ready[place] = prepared
    board.begin()
    parcels = [*_parcels(ready, fan_out, jobs if execute is not None else 1)]
    if execute is None:
        for parcel in parcels:
            carry_out_together({place: ready[place] for place in parcel}, options, board.found)
    else:
        _carry_out_needs([*ready.values()], options, execute)
        configs = ({place: trials[place].config for place in parcel} for parcel in parcels)
        units = [Unit(own, options.fresh, options.command) for own in configs]
        execute(units, board.found, options.stop)
    return board.outcomes()


def carry_out_unit(unit: Unit, stop: Callable[[], bool], found: Found, console: Console | None = None) -> None:
    """Carry out a unit in this process and say on a console, if there is one, how its runs go; raises `Stopped` when
    asked to stop.
    """
    silent = Console(file=StringIO())
    options = Options(unit.fresh, console or silent, quiet=console is None, stop=stop, command=unit.command)
    ready: dict[int, Prepared] = {}
    for place, config in unit.configs.items():
        if console is not None:
            who = f"{config.get('title') or config.get('name')}, seed {config.get('seed', 0)}"
            console.print(f"{who}: begins", markup=False, highlight=False)
        try:
            ready[place] = prepare(config, options)
        except Exception as error:
            found(Finding(place, "", reason_of(error)))
    carry_out_together(ready, options, found)


def carry_out_together(ready: Mapping[int, Prepared], options: Options, found: Found) -> None:
    """Train runs of one group side by side, or a single one; raises `Stopped` when asked to stop."""
    if len(ready) > 1:
        places = [*ready]

        def ended(number: int, what: Result | Exception) -> None:
            found(_finding(places[number], ready[places[number]], what))

        side_by_side([*ready.values()], options, ended)
        return
    for place, prepared in ready.items():
        try:
            what: Result | Exception = carry_out(prepared, options)
        except Stopped:
            raise
        except Exception as error:
            what = error
        found(_finding(place, prepared, what))


def reason_of(error: Exception) -> str:
    """A failure in words; of what nobody foresaw, also its kind."""
    return str(error) if isinstance(error, KdxError) else f"{type(error).__name__}: {error}"


class _Board:
    """The outcomes so far."""

    def __init__(self, trials: Sequence[Trial], tell: Tell) -> None:
        self._trials = trials
        self._tell = tell
        self._outcomes: dict[int, Outcome] = {}
        self._began: float | None = None
        self._before = 0

    def begin(self) -> None:
        """From now on findings cost time; what was found before had been found by an earlier process."""
        self._began, self._before = time.perf_counter(), len(self._outcomes)

    def found(self, finding: Finding) -> None:
        trial, folder = self._trials[finding.place], Path(finding.folder)
        result = None if finding.reason else read_result(folder)
        self._outcomes[finding.place] = Outcome(trial.variant, trial.seed, folder.name, result, finding.reason)
        left = 0.0
        if self._began is not None:
            each = (time.perf_counter() - self._began) / (len(self._outcomes) - self._before)
            left = each * (len(self._trials) - len(self._outcomes))
        self._tell(self.outcomes(), left)

    def outcomes(self) -> list[Outcome]:
        return [self._outcomes[place] for place in sorted(self._outcomes)]


def _finding(place: int, prepared: Prepared, what: Result | Exception) -> Finding:
    return Finding(place, str(prepared.folder), reason_of(what) if isinstance(what, Exception) else "")


def _parcels(ready: Mapping[int, Prepared], fan_out: bool, jobs: int) -> Iterator[list[int]]:
    """The places of the trials that go together, in at least `jobs` parcels where there are as many trials."""
    places = [*ready]
    if not fan_out:
        yield from ([place] for place in places)
        return
    found = groups([*ready.values()])
    parts = [1] * len(found)
    while sum(parts) < min(jobs, len(places)):
        parts[max(range(len(found)), key=lambda one: len(found[one]) / parts[one])] += 1
    for group, count in zip(found, parts, strict=True):
        ends = [len(group) * part // count for part in range(count + 1)]
        for first, last in itertools.pairwise(ends):
            yield [places[number] for number in group[first:last]]


def _carry_out_needs(ready: Sequence[Prepared], options: Options, execute: Executor) -> None:
    """Train the runs that trials need, so that no two units wait for the same one.

    Where one fails, the trials that need it will say why.
    """
    waiting = {
        one.folder: one
        for prepared in ready
        for one, _ in family(prepared, options)
        if one is not prepared and (options.fresh or not finished(one))
    }
    while waiting:
        now = [one for one in waiting.values() if not any(need.folder in waiting for need in one.needs.values())]
        units = [Unit({number: one.spec.config}, options.fresh, options.command) for number, one in enumerate(now)]
        execute(units, lambda finding: None, options.stop)
        for one in now:
            del waiting[one.folder]
