"""The table of a study: means and spreads over seeds, what each variant gains, and what that may be called."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from kdx.formats import NONE, duration, percent
from kdx.markdown import inline
from kdx.markdown import table as markdown_table
from kdx.report import table_with
from kdx.result import Result
from kdx.standings import gain
from kdx.statistics import Spread, corrected, coverage, p_value, paired, spread
from kdx.study import Outcome, Trial

METRIC = "accuracy"
MARK = "†"
"""Stands behind a variant that differs from the reference in more than its method."""
HEADS = ("variant", "seeds", "best", "last", "- plain, best", "- plain, last", "- reference", "p", "time")


@dataclass(frozen=True)
class Line:
    """A variant over its finished seeds; None where something is not known. Scores and differences are fractions.

    `p` is that of the paired t-test against the reference, corrected for the number of variants. `seconds` is the mean
    time of a trial, `rate` the epochs that it trained in a second. `reasons` are those of failed trials, `marks` how
    the variant differs from the reference in more than its method.
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
    rate: float | None
    reasons: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()


def study_lines(
    outcomes: Sequence[Outcome], reference: str, marks: Mapping[str, tuple[str, ...]] | None = None
) -> list[Line]:
    """A line for each variant, in the order of the study. All numbers are of the test split.

    Differences are paired by seed. The best epoch was chosen on the validation split.
    """
    names = list(dict.fromkeys(outcome.variant for outcome in outcomes))
    scores = {name: _scores(outcomes, name, lambda result: result.best.test.get(METRIC)) for name in names}
    against = scores.get(reference, {})
    differences = {name: paired(scores[name], against) for name in names if name != reference}
    p_values = corrected({name: p_value(values) for name, values in differences.items()})
    lines = []
    for name in names:
        own = [outcome for outcome in outcomes if outcome.variant == name]
        done = [outcome.result for outcome in own if outcome.result is not None]
        seconds = sum(result.seconds.total for result in done)
        lines.append(
            Line(
                name,
                len(done),
                spread([*scores[name].values()]),
                spread([*_scores(outcomes, name, lambda result: result.last.test.get(METRIC)).values()]),
                spread([*_scores(outcomes, name, lambda result: gain(result).best).values()]),
                spread([*_scores(outcomes, name, lambda result: gain(result).last).values()]),
                spread(differences.get(name, [])),
                p_values.get(name),
                statistics.fmean(result.seconds.total for result in done) if done else None,
                sum(result.last.epoch for result in done) / seconds if seconds else None,
                tuple(_reason(outcome) for outcome in own if outcome.result is None),
                (marks or {}).get(name, ()),
            )
        )
    return lines


def study_table(title: str, lines: Sequence[Line], reference: str) -> Table:
    """The lines for the terminal."""
    table = table_with(title, " ".join(remarks(lines, reference)))
    for head in HEADS:
        table.add_column(head, justify="left" if head == "variant" else "right")
    for line in lines:
        table.add_row(*cells(line))
    return table


def study_markdown(title: str, lines: Sequence[Line], reference: str) -> str:
    """The lines as a Markdown table, with what may and what may not be concluded below it."""
    rows = ([inline(cell) for cell in cells(line)] for line in lines)
    notes = "\n".join(f"- {remark}" for remark in remarks(lines, reference, inline))
    return f"# {inline(title)}\n\n{markdown_table(HEADS, rows)}\n\n{notes}\n"


def study_csv(outcomes: Sequence[Outcome], marks: Mapping[str, tuple[str, ...]] | None = None) -> str:
    """One row for each trial, with unrounded numbers; `differs` holds the marks of its variant."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["variant", "seed", "folder", "val_best", "test_best", "test_last", "plain_best", "plain_last", "epoch_best",
         "seconds", "differs", "reason"]
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
        differs = "; ".join((marks or {}).get(outcome.variant, ()))
        writer.writerow([outcome.variant, outcome.seed, outcome.folder, *numbers, differs, outcome.reason])
    return text.getvalue()


def remarks(lines: Sequence[Line], reference: str, shown: Callable[[str], str] = str) -> list[str]:
    """What the numbers are, and what cannot be concluded from them; `shown` writes what a user wrote."""
    found = [
        "Test accuracy in percent, mean ± standard deviation over seeds; the best epoch was chosen on the validation "
        "split. `- plain` is the difference from the same student without teachers, in points and paired by seed.",
        f"`- reference` is the difference from {shown(reference)} at the best epoch; p is that of the paired t-test, "
        "corrected for the number of variants (Benjamini and Hochberg).",
        *limits(lines),
    ]
    losers = [shown(line.variant) for line in lines if line.gain_best is not None and line.gain_best.mean < 0]
    if losers:
        found.append(f"Worse than the plain student on average: {', '.join(losers)}.")
    found += [
        f"{MARK} {shown(line.variant)} differs from {shown(reference)} in {shown(', '.join(line.marks))}."
        for line in lines
        if line.marks
    ]
    found += [f"{shown(line.variant)}, {shown(reason)}" for line in lines for reason in line.reasons]
    return found


def warnings(trials: Sequence[Trial], reference: str) -> list[str]:
    """A sentence for each variant whose effect will not be that of its method alone."""
    marked = {trial.variant: trial.marks for trial in trials if trial.marks}
    return [f"{variant} differs from {reference} in {', '.join(texts)}" for variant, texts in marked.items()]


def limits(lines: Sequence[Line]) -> list[str]:
    """What so few seeds leave open."""
    seeds = max((line.seeds for line in lines), default=0)
    if seeds < 2:
        return ["This is one seed: there is no spread, and no difference can be told from chance."]
    found = []
    if seeds < 5:
        found.append(f"{seeds} seeds tell only large differences from chance: a p above 0.05 is no proof of equality.")
    if share := coverage(seeds):
        found.append(f"A 95 % bootstrap interval of {seeds} seeds is too narrow: it holds the true mean {share}.")
    return found


def cells(line: Line) -> list[str]:
    """The texts of a line, one for each of `HEADS`."""
    return [
        f"{line.variant} {MARK}" if line.marks else line.variant,
        str(line.seeds),
        written(line.best),
        written(line.last),
        *(written(spread, sign="+") for spread in (line.gain_best, line.gain_last, line.difference)),
        NONE if line.p is None else f"{line.p:.3f}",
        NONE if line.seconds is None else duration(line.seconds),
    ]


def written(spread: Spread | None, sign: str = "") -> str:
    """A mean with its standard deviation, both times 100."""
    if spread is None:
        return NONE
    mean = f"{100 * spread.mean:{sign}.2f}"
    return mean if spread.std is None else f"{mean} ± {100 * spread.std:.2f}"


def best_line(lines: Sequence[Line]) -> Line | None:
    """The line with the highest mean at the best epoch, the first of equals."""
    return max((line for line in lines if line.best), key=lambda line: line.best.mean if line.best else 0, default=None)


def progress_line(outcomes: Sequence[Outcome], total: int, left: float) -> str:
    """How far a study has come: the trial that has just ended, the best variant so far, and the time left."""
    last = outcomes[-1]
    best = best_line(study_lines(outcomes, last.variant))
    parts = [f"[{len(outcomes)}/{total}] {last.variant}, seed {last.seed}: {said_of(last)}"]
    if best is not None:
        parts.append(f"best so far {best.variant} {written(best.best)}")
    if left:
        parts.append(f"about {duration(left)} left")
    return "; ".join(parts)


def said_of(outcome: Outcome) -> str:
    """What came of a trial, in one line."""
    return outcome.reason if outcome.result is None else percent(outcome.result.best.test.get(METRIC))


def _reason(outcome: Outcome) -> str:
    return f"seed {outcome.seed}: {' '.join(outcome.reason.split())}"


def _scores(outcomes: Sequence[Outcome], variant: str, read: Callable[[Result], float | None]) -> dict[int, float]:
    """Seed -> number, for the trials of a variant that have it."""
    found = {}
    for outcome in outcomes:
        if outcome.variant == variant and outcome.result is not None:
            value = read(outcome.result)
            if value is not None:
                found[outcome.seed] = value
    return found
