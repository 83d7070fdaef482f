"""Carries out a search with Optuna: asks for points, trains them, gives up those that fall behind, and keeps the books.

Several processes may work on one search. All that they share lies in its folder: Optuna's journal, a lock for asking,
and a lock for each trial at work, by which the others know that its process is alive.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from kdx.components import hookimpl
from kdx.errors import ConfigError, KdxError
from kdx.history import History, read_history
from kdx.randomness import derive_seed
from kdx.runs import Options, Stopped, carry_out
from kdx.tune import Choices, Ground, Point, Range, Search, Space, prepare_trial, space_text
from kdx.types import EvalReport
from kdx.watching import watching

if TYPE_CHECKING:
    import optuna

TELLING = 4
"""The number of different values from which on trials say which keys matter."""
TRIES = 2
"""How often a trial is begun when its process dies."""
TRIED, INSTEAD, REASON, FOLDER = "tried", "instead", "reason", "folder"
"""What Optuna keeps of a trial for us: the tries before it, the number of the trial that it goes on with, why it
failed, and the folder of its first seed.
"""


@dataclass(frozen=True)
class Found:
    """What came of a trial. `state` is complete, pruned, failed or running; `values` holds epoch -> validation value
    of the first seed, `value` the best one as a mean over seeds.
    """

    number: int
    state: str
    point: Point
    value: float | None
    values: dict[int, float]
    seconds: float | None
    folder: str
    reason: str


Tell = Callable[[Found], None]


class Books:
    """The trials of a search, as all processes that work on it see them; whoever holds its `lock` is alone with it."""

    def __init__(self, search: Search, ground: Ground) -> None:
        self._search = search
        self._ground = ground
        self.minimise = ground.minimise
        self._optuna = _optuna()
        self.lock = filelock.FileLock(_made(ground.folder) / ".asking.lock")
        with self.lock, _calm():
            self.study: optuna.Study = self._optuna.create_study(
                study_name=search.name,
                storage=_storage(ground.folder),
                direction="minimize" if ground.minimise else "maximize",
                load_if_exists=True,
            )
            self._check()

    def next(self) -> tuple[optuna.Trial, filelock.BaseFileLock] | None:
        """A trial to carry out, with the lock that says that somebody does; None when there are enough."""
        with self.lock, _calm():
            self._bury()
            states = self._optuna.trial.TrialState
            trials = self.study.get_trials(deepcopy=False)
            gone_on = _gone_on(trials)
            begun = [one for one in trials if one.state != states.WAITING and one.number not in gone_on]
            if len(begun) >= self._search.trials:
                return None
            self.study.sampler = self._sampler(len(trials))
            self.study.pruner = self._pruner()
            trial = self.study.ask()
            lock = self._lock_of(trial.number)
            lock.acquire(timeout=0)
            suggest(trial, self._search.space)
            return trial, lock

    def tell(self, trial: optuna.Trial, value: float | None, *, reason: str = "", again: bool = False) -> None:
        """Note how a trial ended: with a value, given up, failed, or stopped, to be begun `again` where it stands."""
        states = self._optuna.trial.TrialState
        with self.lock, _calm():
            if again:
                self._go_on(trial.number, trial.params, int(trial.user_attrs.get(TRIED, 0)))
                self.study.tell(trial, state=states.FAIL)
            elif reason:
                trial.set_user_attr(REASON, reason)
                self.study.tell(trial, state=states.FAIL)
            elif value is None:
                self.study.tell(trial, state=states.PRUNED)
            else:
                self.study.tell(trial, value)

    def found(self) -> list[Found]:
        """What came of the trials, in order; those that others stand in for are left out."""
        names = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}
        trials = self.study.get_trials(deepcopy=False)
        gone_on, died = _gone_on(trials), f"its process died {TRIES} times"
        return [
            Found(
                one.number,
                names[one.state.name],
                dict(one.params),
                one.value if one.state.name == "COMPLETE" else None,
                dict(one.intermediate_values),
                None if one.duration is None else one.duration.total_seconds(),
                str(one.user_attrs.get(FOLDER, "")),
                str(one.user_attrs.get(REASON, died)) if one.state.name == "FAIL" else "",
            )
            for one in trials
            if one.state.name in names and one.number not in gone_on
        ]

    def importances(self) -> dict[str, float]:
        """The share of each key in what sets the better trials apart from the others, the largest first; empty where
        too few trials tell (PED-ANOVA: Watanabe, Bansal and Hutter, IJCAI 2023).
        """
        values = {one.value for one in self.found() if one.value is not None}
        if len(values) < TELLING:
            return {}
        with _calm():
            evaluator = self._optuna.importance.PedAnovaImportanceEvaluator()
            return dict(self._optuna.importance.get_param_importances(self.study, evaluator=evaluator))

    def _go_on(self, number: int, point: Point, tried: int) -> None:
        """Have a trial begun again, where its runs stand."""
        self.study.enqueue_trial(dict(point), user_attrs={TRIED: tried, INSTEAD: number})

    def _check(self) -> None:
        """Begin the books, or refuse those of another search."""
        first, search, ground = self.study.user_attrs, self._search, self._ground
        about = {
            "base": ground.hash,
            "space": space_text(search.space),
            "seeds": list(ground.seeds),
            "direction": [ground.monitor, ground.minimise],
        }
        if "about" not in first:
            self.study.set_user_attr("about", about)
            if ground.own is not None:
                self.study.enqueue_trial(ground.own)
        elif first["about"] != about:
            changed = ", ".join(key for key in about if first["about"].get(key) != about[key])
            raise ConfigError(
                f"{ground.folder}: its trials are of a search with another {changed}; give this one another `name`, or "
                "remove the folder"
            )

    def _bury(self) -> None:
        """End the trials whose processes are dead; each is begun once more."""
        states = self._optuna.trial.TrialState
        for dead in self.study.get_trials(deepcopy=False, states=(states.RUNNING,)):
            lock = self._lock_of(dead.number)
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                continue
            lock.release()
            tries = int(dead.user_attrs.get(TRIED, 0)) + 1
            if tries < TRIES:
                self._go_on(dead.number, dead.params, tries)
            self.study.tell(dead.number, state=states.FAIL)

    def _lock_of(self, number: int) -> filelock.BaseFileLock:
        return filelock.FileLock(_made(self._ground.folder / ".locks") / f"{number}.lock")

    def _sampler(self, count: int) -> Any:
        """Seeded by the number of trials so far, so that a search that goes on does not draw the same again."""
        seed = derive_seed(0, "search", str(count)) % 2**32
        samplers = self._optuna.samplers
        if self._search.sampler == "random":
            return samplers.RandomSampler(seed=seed)
        return samplers.TPESampler(
            seed=seed, n_startup_trials=self._search.startup, multivariate=True, constant_liar=True
        )

    def _pruner(self) -> Any:
        search, pruners = self._search, self._optuna.pruners
        if search.pruner == "none":
            return pruners.NopPruner()
        if search.pruner == "halving":
            return pruners.SuccessiveHalvingPruner(min_resource=max(1, search.warmup), reduction_factor=2)
        return pruners.MedianPruner(n_startup_trials=search.startup, n_warmup_steps=search.warmup)


def carry_out_search(search: Search, ground: Ground, options: Options, tell: Tell) -> None:
    """Carry out trials until the search has as many as it wants; raises `Stopped` when asked to stop.

    A trial that fails is noted with its reason and does not stop the others. One that is stopped, or whose process
    dies, is taken up where it stands when the search goes on.
    """
    books = Books(search, ground)
    while True:
        if options.stop():
            raise Stopped("the search was stopped; start it again to go on")
        if (given := books.next()) is None:
            return
        trial, lock = given
        try:
            value = _carry_out(trial, search, ground, options)
            books.tell(trial, value)
        except Stopped:
            books.tell(trial, None, again=True)
            raise
        except KdxError as error:
            books.tell(trial, None, reason=str(error))
        except Exception as error:
            books.tell(trial, None, reason=f"{type(error).__name__}: {error}")
        finally:
            lock.release()
        tell(next(one for one in books.found() if one.number == trial.number))


def best_of(trials: Sequence[Found], *, minimise: bool) -> Found | None:
    """The trial with the best value, the first of equals; None if none has one."""
    done = [one for one in trials if one.value is not None]
    sign = 1.0 if minimise else -1.0
    return min(done, key=lambda one: sign * (one.value or 0.0), default=None)


def suggest(trial: optuna.Trial, space: Space) -> Point:
    """The point of a trial."""
    return {key: _suggest(trial, key, dimension) for key, dimension in space.items()}


class _Judge:
    """Tells Optuna of each validation of a run; `beaten` when it says that the trial is not worth going on with."""

    def __init__(self, trial: optuna.Trial, monitor: str) -> None:
        self._trial = trial
        self._monitor = monitor
        self._told: set[int] = set()
        self.beaten = False

    @hookimpl
    def kdx_eval_end(self, report: EvalReport) -> None:
        if (report.split, report.who) == ("val", "student") and self._monitor in report.metrics:
            self._report(math.ceil(report.clock.time), report.metrics[self._monitor])
            self.beaten = self.beaten or self._trial.should_prune()

    def catch_up(self, history: History) -> None:
        """Tell of what the run did before this trial took it up."""
        for line in history.curve(self._monitor):
            self._report(line.epoch, line.metrics[self._monitor])

    def _report(self, epoch: int, value: float) -> None:
        if epoch not in self._told and math.isfinite(value):
            self._told.add(epoch)
            self._trial.report(value, epoch)


def _carry_out(trial: optuna.Trial, search: Search, ground: Ground, options: Options) -> float | None:
    """The best validation value of a trial as the mean over its seeds; None when it was given up at its first one."""
    point = dict(trial.params)
    first, *others = (prepare_trial(search, ground, point, seed, options) for seed in ground.seeds)
    trial.set_user_attr(FOLDER, first.folder.name)
    judge = _Judge(trial, ground.monitor)
    judge.catch_up(read_history(first.folder))
    try:
        with watching(first.spec.registry, judge):
            how = replace(options, stop=lambda: options.stop() or judge.beaten)
            results = [carry_out(first, how)]
    except Stopped:
        if options.stop():
            raise
        return None
    results += [carry_out(prepared, options) for prepared in others]
    value = sum(result.best.val[ground.monitor] for result in results) / len(results)
    if not math.isfinite(value):
        raise KdxError(f"the validation {ground.monitor} is {value}")
    return value


def _suggest(trial: optuna.Trial, key: str, dimension: Range | Choices) -> Any:
    if isinstance(dimension, Choices):
        return trial.suggest_categorical(key, list(dimension.values))
    if dimension.int:
        step = 1 if dimension.step is None else int(dimension.step)
        return trial.suggest_int(key, int(dimension.low), int(dimension.high), step=step, log=dimension.log)
    return trial.suggest_float(key, dimension.low, dimension.high, step=dimension.step, log=dimension.log)


def _gone_on(trials: Sequence[optuna.trial.FrozenTrial]) -> set[int]:
    """The numbers of the trials that others go on with."""
    return {one.user_attrs[INSTEAD] for one in trials if INSTEAD in one.user_attrs}


def _storage(folder: Path) -> Any:
    """A file that several processes may append to; its lock, unlike those of Optuna, ends with the process."""
    from optuna.storages import JournalStorage, journal

    lock: Any = filelock.FileLock(folder / ".journal.lock")
    return JournalStorage(journal.JournalFileBackend(str(folder / "journal.log"), lock_obj=lock))


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KdxError(f"out: nothing can be written into {folder}: {error.strerror or error}") from error
    return folder


@contextmanager
def _calm() -> Iterator[None]:
    """Without Optuna's warnings that a setting is experimental: which ones are depends on its version."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=_optuna().exceptions.ExperimentalWarning)
        yield


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise KdxError("kdx tune: Optuna is not installed; pip install 'kdx[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
