"""The parts of a report that are about teachers (weights, temperatures, how far the student follows them) and about
what was left out of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kdx.formats import counted, number, percent, whole
from kdx.history import EvalLine, History
from kdx.markdown import code, inline, table
from kdx.result import Metrics, Result
from kdx.shown import SPREAD

SPLITS = {"val": "validation", "test": "test"}


def agreement_section(result: Result) -> list[str]:
    """How often the student that is kept answers as each teacher does, and how far their distributions are apart."""
    if not result.agreement:
        return []
    splits = [split for split in SPLITS if any(split in found for found in result.agreement.values())]
    heads = ["teacher", *(f"{SPLITS[split]}, {what}" for split in splits for what in ("same answer", "KL"))]
    rows = [
        [code(name), *(cell for split in splits for cell in agreement_cells(found.get(split, {})))]
        for name, found in result.agreement.items()
    ]
    note = "KL is the mean of KL(teacher || student) in nats at temperature 1."
    return ["## Agreement with the teachers", table(heads, rows), note]


def agreement_cells(found: Metrics) -> list[str]:
    """The share of equal answers and the divergence, as they are written."""
    return [percent(found.get("same_answer")), number(found.get("kl"))]


def dropped_section(result: Result) -> list[str]:
    """How many answers of teachers were left out of training."""
    if not any(result.dropped.values()):
        return []
    rows = [[code(name), whole(count)] for name, count in result.dropped.items()]
    note = "Where a teacher gave nan or inf for a sample, the mean of the other teachers' logits stood in for it."
    return ["## Answers left out", note, table(["teacher", "samples"], rows)]


def skipped_section(result: Result) -> list[str]:
    """How many updates were left out of training."""
    if not result.skipped:
        return []
    count = counted(result.skipped, "update was", "updates were")
    return ["## Updates left out", f"{count} left out, because a loss or a gradient was nan or inf."]


def shown_section(history: History, classes: Sequence[str]) -> list[str]:
    """What targets showed in the last epoch, over all samples and class by class."""
    last: dict[str, EvalLine] = {line.who: line for line in history.evals if line.split == "train"}
    if not last:
        return []
    lines = [
        "## Weights and temperatures",
        "What targets gave in the last epoch: mean ± standard deviation over the samples, then the mean of each class.",
    ]
    for who, line in last.items():
        for name, columns in _fields(line.metrics).items():
            lines += [
                f"{code(who if name == 'out' else f'{who}.{name}')}:",
                _shown_table(line.metrics, columns, classes),
            ]
    return lines


def _fields(metrics: Mapping[str, float]) -> dict[str, dict[str, str]]:
    """Each field -> the head of each of its columns -> the name of its mean."""
    found: dict[str, dict[str, str]] = {}
    for name in metrics:
        if name.endswith(SPREAD):
            whole = name.removesuffix(SPREAD)
            field, _, column = whole.partition(".")
            found.setdefault(field, {})[column or "value"] = whole
    return found


def _shown_table(metrics: Mapping[str, float], columns: Mapping[str, str], classes: Sequence[str]) -> str:
    rows = [["all", *(f"{number(metrics[name])} ± {number(metrics[name + SPREAD])}" for name in columns.values())]]
    for kind in classes:
        means = [metrics.get(f"{name}[{kind}]") for name in columns.values()]
        if any(mean is not None for mean in means):
            rows.append([inline(kind), *map(number, means)])
    return table(["", *(code(head) for head in columns)], rows)
