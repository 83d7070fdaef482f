"""The table of a study: means and spreads over seeds, what each variant gains, and what that may be called."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table
from scipy import stats

from kdx.formats import NONE, duration, percent
from kdx.report import table_with
from kdx.result import Result
from kdx.standings import gain
from kdx.study import Outcome

METRIC = "accuracy"
HEADS = ("variant", "seeds", "best", "last", "- plain, best", "- plain, last", "- reference", "p", "time")


@dataclass(frozen=True)
class Spread:
    """A mean over seeds with the sample standard deviation, which one seed does not have; both are fractions."""

    mean: float
    std: float | None


@dataclass(frozen=True)
class Line:
    """A variant over its finished seeds; None where something is not known.

    `p` is that of the paired t-test against the reference, corrected for the number of variants (Benjamini and
    Hochberg, 1995).
    """

    variant: str
    seeds: int
    best: Spread | None
    last: Spread | None
    gain_best: Spread | None
    gain_last: Spread | None
    difference: Spread | None
    p: float | None
    seconds: float | None
    reasons: tuple[str, ...] = ()


def study_lines(outcomes: Sequence[Outcome], reference: str) -> list[Line]:
    """A line for each variant, in the order of the study. All numbers are of the test split.

    Differences are paired by seed. The best epoch was chosen on the validation split.
    """
    names = list(dict.fromkeys(outcome.variant for outcome in outcomes))
    scores = {name: _scores(outcomes, name, lambda result: result.best.test.get(METRIC)) for name in names}
    against = scores.get(reference, {})
    tests = {name: _p_value(scores[name], against) for name in names if name != reference}
    known = {name: p for name, p in tests.items() if p is not None}
    corrected = dict(zip(known, stats.false_discovery_control([*known.values()]), strict=True)) if known else {}
    lines = []
    for name in names:
        own = [outcome for outcome in outcomes if outcome.variant == name]
        done = [outcome.result for outcome in own if outcome.result is not None]
        pairs = [scores[name][seed] - against[seed] for seed in scores[name] if seed in against]
        lines.append(
            Line(
                name,
                len(done),
                _spread([*scores[name].values()]),
                _spread([*_scores(outcomes, name, lambda result: result.last.test.get(METRIC)).values()]),
                _spread([*_scores(outcomes, name, lambda result: gain(result).best).values()]),
                _spread([*_scores(outcomes, name, lambda result: gain(result).last).values()]),
                None if name == reference else _spread(pairs),
                float(corrected[name]) if name in corrected else None,
                statistics.fmean(result.seconds.total for result in done) if done else None,
                tuple(f"seed {outcome.seed}: {outcome.reason}" for outcome in own if outcome.result is None),
            )
        )
    return lines


def study_table(title: str, lines: Sequence[Line], reference: str) -> Table:
    """The lines for the terminal."""
    table = table_with(title, " ".join(remarks(lines, reference)))
    for head in HEADS:
        table.add_column(head, justify="left" if head == "variant" else "right")
    for line in lines:
        table.add_row(*_cells(line))
    return table


def study_markdown(title: str, lines: Sequence[Line], reference: str) -> str:
    """The lines as a Markdown table, with what may and what may not be concluded below it."""
    rows = [HEADS, ["---", *["---:"] * (len(HEADS) - 1)], *(_cells(line) for line in lines)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"# {title}\n\n{table}\n\n" + "\n".join(f"- {remark}" for remark in remarks(lines, reference)) + "\n"


def study_csv(outcomes: Sequence[Outcome]) -> str:
    """One row for each trial, with unrounded numbers."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["variant", "seed", "folder", "val_best", "test_best", "test_last", "plain_best", "plain_last", "epoch_best",
         "seconds", "reason"]
    )  # fmt: skip
    for outcome in outcomes:
        result = outcome.result
        numbers: list[object] = [None] * 7
        if result is not None:
            plain = result.plain
            numbers = [
                result.best.val.get(METRIC),
                result.best.test.get(METRIC),
                result.last.test.get(METRIC),
                None if plain is None else plain.test.get(METRIC),
                None if plain is None else (plain.last_test or {}).get(METRIC),
                result.best.epoch,
                result.seconds.total,
            ]
        writer.writerow([outcome.variant, outcome.seed, outcome.folder, *numbers, outcome.reason])
    return text.getvalue()


def remarks(lines: Sequence[Line], reference: str) -> list[str]:
    """What the numbers are, and what cannot be concluded from them."""
    seeds = max((line.seeds for line in lines), default=0)
    found = [
        "Test accuracy in percent, mean ± standard deviation over seeds; the best epoch was chosen on the validation "
        "split. `- plain` is the difference from the same student without teachers, in points and paired by seed.",
        f"`- reference` is the difference from {reference} at the best epoch; p is that of the paired t-test, "
        "corrected for the number of variants (Benjamini and Hochberg).",
    ]
    if seeds < 2:
        found.append("This is one seed: there is no spread, and no difference can be told from chance.")
    elif seeds < 5:
        found.append(f"{seeds} seeds tell only large differences from chance: a p above 0.05 is no proof of equality.")
    losers = [line.variant for line in lines if line.gain_best is not None and line.gain_best.mean < 0]
    if losers:
        found.append(f"Worse than the plain student on average: {', '.join(losers)}.")
    found += [f"{line.variant}, {reason}" for line in lines for reason in line.reasons]
    return found


def _cells(line: Line) -> list[str]:
    return [
        line.variant,
        str(line.seeds),
        _written(line.best),
        _written(line.last),
        *(_written(spread, sign="+") for spread in (line.gain_best, line.gain_last, line.difference)),
        NONE if line.p is None else f"{line.p:.3f}",
        NONE if line.seconds is None else duration(line.seconds),
    ]


def _written(spread: Spread | None, sign: str = "") -> str:
    if spread is None:
        return NONE
    mean = f"{100 * spread.mean:{sign}.2f}"
    return mean if spread.std is None else f"{mean} ± {100 * spread.std:.2f}"


def progress_line(outcomes: Sequence[Outcome], total: int, left: float) -> str:
    """How far a study has come: the trial that has just ended, the best variant so far, and the time left."""
    last = outcomes[-1]
    said = last.reason if last.result is None else percent(last.result.best.test.get(METRIC))
    lines = [line for line in study_lines(outcomes, last.variant) if line.best is not None]
    best = max(lines, key=lambda line: line.best.mean if line.best else 0.0, default=None)
    parts = [f"[{len(outcomes)}/{total}] {last.variant}, seed {last.seed}: {said}"]
    if best is not None:
        parts.append(f"best so far {best.variant} {_written(best.best)}")
    if left:
        parts.append(f"about {duration(left)} left")
    return "; ".join(parts)


def _scores(outcomes: Sequence[Outcome], variant: str, read: Callable[[Result], float | None]) -> dict[int, float]:
    """Seed -> number, for the trials of a variant that have it."""
    found = {}
    for outcome in outcomes:
        if outcome.variant == variant and outcome.result is not None:
            value = read(outcome.result)
            if value is not None:
                found[outcome.seed] = value
    return found


def _spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def _p_value(scores: dict[int, float], against: dict[int, float]) -> float | None:
    """Of the paired t-test over the seeds that both have; None where all differences are equal, or there is one."""
    seeds = [seed for seed in scores if seed in against]
    differences = [scores[seed] - against[seed] for seed in seeds]
    if len(seeds) < 2 or statistics.stdev(differences) == 0:
        return None
    return float(stats.ttest_rel([scores[seed] for seed in seeds], [against[seed] for seed in seeds]).pvalue)
