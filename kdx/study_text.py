"""The report of a study in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from kdx.findings import Findings
from kdx.formats import NONE, count, counted, duration, percent
from kdx.markdown import code, inline, table
from kdx.statistics import Spread
from kdx.study import Outcome
from kdx.study_table import HEADS, MARK, METRIC, Line, best_line, cells, limits, remarks

SHARED = (
    "All seeds and variants are tested on the same images: an interval over seeds says what another seed would give, "
    "not what other test images would."
)


def study_text(findings: Findings, lines: Sequence[Line], links: Mapping[str, str], pictures: Sequence[str]) -> str:
    """The text of a study's `report.html`. `links` maps run folders to their reports, `pictures` names the figures."""
    sections = [
        f"# {inline(findings.name)}",
        _state(findings),
        *_table(lines, findings.reference),
        *_effects(lines, findings.reference, pictures),
        *_curves(lines, pictures),
        *_cost(findings, lines),
        *_open(lines),
        *_differences(lines, findings.reference),
        *_trials(findings, links),
        *_failures(findings.outcomes),
    ]
    return "\n\n".join(sections) + "\n"


def study_cards(findings: Findings, lines: Sequence[Line]) -> list[tuple[str, str, str]]:
    """The figures at the top of the page: (label, value, note)."""
    cards = []
    if (best := best_line(lines)) is not None and best.best is not None:
        whose = f"{best.variant}, {counted(best.seeds, 'seed')}"
        cards.append(("highest test accuracy", percent(best.best.mean), whose))
    gains = [line for line in lines if line.gain_best is not None]
    if top := max(gains, key=lambda line: line.gain_best.mean if line.gain_best else 0, default=None):
        assert top.gain_best is not None
        cards.append(("largest gain over plain", f"{100 * top.gain_best.mean:+.2f} points", _interval_note(top)))
    done = [outcome for outcome in findings.outcomes if outcome.result is not None]
    failed = len(findings.outcomes) - len(done)
    cards.append(("trials", str(len(done)), f"of {counted(len(lines), 'variant')}; {failed or 'none'} failed"))
    spent = sum(outcome.result.seconds.total for outcome in done if outcome.result is not None)
    cards.append(("training time", duration(spent), "without teachers that are runs and plain students"))
    return cards


def _state(findings: Findings) -> str:
    seeds = sorted({outcome.seed for outcome in findings.outcomes})
    return f"Reference: {inline(findings.reference)}. Seeds: {', '.join(map(str, seeds))}."


def _table(lines: Sequence[Line], reference: str) -> list[str]:
    rows = [[inline(cell) for cell in cells(line)] for line in lines]
    return ["## Outcome", table(HEADS, rows), *(f"- {remark}" for remark in remarks(lines, reference, inline)[:2])]


def _effects(lines: Sequence[Line], reference: str, pictures: Sequence[str]) -> list[str]:
    if "effects.png" not in pictures:
        return []
    rows = [
        [inline(line.variant), _with_interval(line.gain_best), _with_interval(line.difference)]
        for line in lines
        if line.gain_best is not None or line.difference is not None
    ]
    note = (
        "Squares are means, bars 95 % bootstrap intervals over seeds (percentiles of 9,999 resamples), dots the seeds. "
        "All differences are of the same seed; the largest gain stands on top."
    )
    heads = ["points [interval]", "- plain", f"- {inline(reference)}"]
    return ["## Effects", "![Effects with intervals](effects.png)", note, table(heads, rows)]


def _curves(lines: Sequence[Line], pictures: Sequence[str]) -> list[str]:
    return ["## Curves", "![Validation curves of the variants](curves.png)"] if "curves.png" in pictures else []


def _cost(findings: Findings, lines: Sequence[Line]) -> list[str]:
    base = next((line.seconds for line in lines if line.variant == findings.reference), None)
    rows = []
    for line in lines:
        if line.seconds is not None:
            sizes = [
                outcome.result.size.parameters
                for outcome in findings.outcomes
                if outcome.variant == line.variant and outcome.result is not None and outcome.result.size is not None
            ]
            rows.append(
                [
                    inline(line.variant),
                    duration(line.seconds),
                    f"{line.seconds / base:.2f}" if base else NONE,
                    NONE if line.rate is None else f"{line.rate:.3g}",
                    count(round(statistics.fmean(sizes))) if sizes else NONE,
                ]
            )
    if not rows:
        return []
    heads = ["", "time per trial", f"times {inline(findings.reference)}", "epochs per second", "parameters"]
    note = (
        "Mean wall-clock time of a trial, with evaluation and what it waited for; the training of teachers and plain "
        "students, which trials share, is not in it. The parameters are those of the deployed student."
    )
    return ["## Cost", table(heads, rows), note]


def _open(lines: Sequence[Line]) -> list[str]:
    found = [*limits(lines), SHARED]
    gains = [line for line in lines if line.gain_best is not None and line.gain_best.interval is not None]
    if unclear := [inline(line.variant) for line in gains if _holds_zero(line.gain_best)]:
        found.append(f"The interval of the gain over the plain student holds zero for {', '.join(unclear)}.")
    if len(lines) > 2:
        found.append(
            "The highest of many means is high by chance as well: a new seed would, on average, bring it down. "
            "Repeat the best variants with seeds that took no part in choosing them."
        )
    return ["## What cannot be concluded", *(f"- {one}" for one in found)]


def _differences(lines: Sequence[Line], reference: str) -> list[str]:
    rows = [[inline(line.variant), inline("; ".join(line.marks))] for line in lines if line.marks]
    if not rows:
        return []
    note = (
        f"{MARK} stands at variants that differ from {inline(reference)} in budget or data, or in something that they "
        "do not name: their effects are not those of the method alone."
    )
    return ["## Differences besides the method", note, table(["variant", "differs in"], rows, numbers=False)]


def _trials(findings: Findings, links: Mapping[str, str]) -> list[str]:
    rows = []
    for outcome in findings.outcomes:
        if (result := outcome.result) is not None:
            where = links.get(outcome.folder)
            run = code(outcome.folder) if where is None else f"[{inline(outcome.folder)}](<{where}>)"
            scores = (result.best.val.get(METRIC), result.best.test.get(METRIC), result.last.test.get(METRIC))
            numbers = [*map(percent, scores), str(result.best.epoch), duration(result.seconds.total)]
            rows.append([inline(outcome.variant), str(outcome.seed), *numbers, run])
    heads = ["variant", "seed", "validation", "test, best", "test, last", "best epoch", "time", "report"]
    return ["## Trials", table(heads, rows)] if rows else []


def _failures(outcomes: Sequence[Outcome]) -> list[str]:
    rows = [
        [inline(outcome.variant), str(outcome.seed), inline(" ".join(outcome.reason.split()))]
        for outcome in outcomes
        if outcome.result is None
    ]
    return ["## Failed trials", table(["variant", "seed", "reason"], rows, numbers=False)] if rows else []


def _with_interval(found: Spread | None) -> str:
    if found is None:
        return NONE
    mean = f"{100 * found.mean:+.2f}"
    return mean if found.interval is None else f"{mean} {_ends(found.interval)}"


def _ends(interval: tuple[float, float]) -> str:
    low, high = interval
    return f"\\[{100 * low:+.2f}, {100 * high:+.2f}\\]"


def _interval_note(line: Line) -> str:
    found = line.gain_best
    if found is None or found.interval is None:
        return f"{line.variant}, {counted(line.seeds, 'seed')}"
    low, high = found.interval
    return f"{line.variant}; {100 * low:+.2f} to {100 * high:+.2f} over {counted(line.seeds, 'seed')}"


def _holds_zero(found: Spread | None) -> bool:
    return found is not None and found.interval is not None and found.interval[0] <= 0 <= found.interval[1]
