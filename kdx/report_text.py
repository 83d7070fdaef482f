"""The report of a run in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kdx.formats import NONE, count, duration, milliseconds, number, percent, ratio, size, whole
from kdx.history import History
from kdx.markdown import code, inline, table
from kdx.measure import Size
from kdx.report_teachers import agreement_section, dropped_section, shown_section, skipped_section
from kdx.result import Metrics, Point, Result
from kdx.standings import Standing, gain_sentence, label_sentences, standings, student_role

FILES: Mapping[str, str] = {
    "config.given.yaml": "the config as it was given",
    "config.yaml": "the config as it was run, with every default",
    "plan.txt": "what was built and in which order",
    "environment.json": "versions of the libraries, the machine and the plugins",
    "result.json": "the numbers of this report",
    "metrics.jsonl": "the numbers of every update and evaluation",
    "events": "the same for TensorBoard",
    "student.safetensors": "the weights of the student at its best epoch",
    "checkpoint": "the state of training, to resume it",
    "curves.png": "the curves",
    "confusion.png": "the confusion matrix",
    "report.md": "this report as Markdown",
    "report.html": "this report as one HTML file",
}


def report_text(
    result: Result,
    *,
    place: str,
    files: Sequence[str],
    texts: Mapping[str, str],
    environment: Mapping[str, Any],
    history: History,
) -> str:
    """The text of `report.md`.

    `place` is the folder as `kdx.load_student` takes it, `files` the names in it, `texts` the content of `plan.txt` and
    `config.yaml` where there are such files, `environment` that of `environment.json`, and `history` that of
    `metrics.jsonl`.
    """
    sections = [
        f"# {inline(result.name)}",
        _run_line(result),
        *_outcome(result),
        *_comparison(result),
        *agreement_section(result),
        *dropped_section(result),
        *skipped_section(result),
        *_compression(result),
        *_epochs(result),
        *_curves(files),
        *shown_section(history, result.classes),
        *_confusion(result, files),
        *_time(result),
        *_files(place, files),
        *_fenced("Plan", texts.get("plan.txt"), ""),
        *_fenced("Config", texts.get("config.yaml"), "yaml"),
        *_environment(environment),
    ]
    return "\n\n".join(sections) + "\n"


def _run_line(result: Result) -> str:
    return f"Status: {inline(result.status)}. Seed: {result.seed}. Hash: `{result.hash}`."


def _outcome(result: Result) -> list[str]:
    role = student_role(result)
    lines = ["## Outcome"]
    if "accuracy" in result.best.test:
        lines.append(f"The {role} reaches **{percent(result.best.test['accuracy'])}** accuracy on the test split.")
    else:
        lines.append("There is no accuracy on a test split.")
    if sentence := gain_sentence(result):
        lines.append(f"{sentence}")
    elif result.teachers or result.targets:
        lines.append("There is no plain student to compare with, so what the teachers added is not known.")
    else:
        lines.append("No teacher took part: this is plain supervised training.")
    lines.append(" ".join(label_sentences(result)))
    lines.append(_selection(result))
    return lines


def _selection(result: Result) -> str:
    if not result.best.val:
        return "There is no validation split, so no epoch could be chosen on it."
    chosen = f"The best epoch, {result.best.epoch} of {result.last.epoch}, was chosen on the validation split"
    if not result.best.test:
        return f"{chosen}."
    return (
        f"{chosen}. The test split was read once, after training, with the weights of the best and of the last epoch."
    )


def _comparison(result: Result) -> list[str]:
    rows = [_comparison_row(standing) for standing in standings(result)]
    rows[-1] = [f"**{cell}**" if cell != NONE else cell for cell in rows[-1]]
    heads = ["", "labels seen", "accuracy", "macro recall", "macro F1", "calibration error"]
    heads += ["parameters", "multiply-adds", "file", "CPU latency"]
    note = (
        "Test split, each at its best epoch. Multiply-adds and latency (one thread, median) are those of one sample; "
        "an ensemble costs what its members cost together."
    )
    return ["## Comparison", table(heads, rows), note]


def _comparison_row(standing: Standing) -> list[str]:
    test, cost = standing.test, standing.size
    name = f"{standing.role} {code(standing.name)}" if standing.name else standing.role
    return [
        name,
        whole(standing.labelled),
        *(percent(test.get(key)) for key in ("accuracy", "macro_recall", "macro_f1", "calibration_error")),
        *([NONE] * 4 if cost is None else _cost(cost)),
    ]


def _cost(cost: Size) -> list[str]:
    return [
        count(cost.parameters),
        count(cost.multiply_adds),
        size(cost.file_bytes),
        milliseconds(cost.latency_ms),
    ]


def _compression(result: Result) -> list[str]:
    small = result.size
    larger = [one for one in standings(result) if one.size is not None and one.role in ("teacher", "ensemble")]
    if small is None or not larger:
        return []
    rows = [[f"{one.role} {code(one.name)}", *_ratios(one.size, small)] for one in larger if one.size is not None]
    heads = ["against", "parameters", "multiply-adds", "file", "CPU latency"]
    return ["## Compression", "How many times smaller or faster the student is.", table(heads, rows)]


def _ratios(large: Size, small: Size) -> list[str]:
    return [
        ratio(large.parameters, small.parameters),
        ratio(large.multiply_adds, small.multiply_adds),
        ratio(large.file_bytes, small.file_bytes),
        ratio(large.latency_ms, small.latency_ms),
    ]


def _epochs(result: Result) -> list[str]:
    names = list(dict.fromkeys([*result.best.val, *result.best.test, *result.last.test]))
    columns = [
        (f"{which} epoch ({point.epoch}), {split}", metrics)
        for which, point in (("best", result.best), ("last", result.last))
        for split, metrics in _splits(point)
        if metrics
    ]
    if not columns:
        return []
    rows = [
        [name.replace("_", " ").replace("f1", "F1"), *(_metric(name, metrics) for _, metrics in columns)]
        for name in names
    ]
    return ["## Best and last epoch", table(["", *(head for head, _ in columns)], rows)]


def _splits(point: Point) -> list[tuple[str, Metrics]]:
    return [("validation", point.val), ("test", point.test)]


def _metric(name: str, metrics: Metrics) -> str:
    return number(metrics.get(name)) if name == "cross_entropy" else percent(metrics.get(name))


def _curves(files: Sequence[str]) -> list[str]:
    return ["## Curves", "![Loss terms, accuracy and knobs over training](curves.png)"] if "curves.png" in files else []


def _confusion(result: Result, files: Sequence[str]) -> list[str]:
    if "confusion.png" not in files:
        return []
    lines = ["## Confusion", "![Confusion matrix on the test split](confusion.png)"]
    pairs = [
        (wrong, row, column)
        for row, counts in enumerate(result.confusion)
        for column, wrong in enumerate(counts)
        if row != column and wrong
    ]
    if pairs:
        pairs.sort(key=lambda pair: -pair[0])
        rows = [
            [
                inline(result.classes[row]),
                inline(result.classes[column]),
                f"{wrong:,} of {sum(result.confusion[row]):,}",
            ]
            for wrong, row, column in pairs[:5]
        ]
        lines += ["The most frequent confusions:", table(["true class", "taken for", "samples"], rows, numbers=False)]
    return lines


def _time(result: Result) -> list[str]:
    seconds = result.seconds
    parts = (
        ("teachers", seconds.teachers),
        ("student", seconds.student),
        ("data", seconds.data),
        ("evaluation", seconds.evaluation),
    )
    rows = [[name, duration(value), percent(value / seconds.total) if seconds.total else NONE] for name, value in parts]
    rows.append(["**whole run**", duration(seconds.total), ""])
    return ["## Time", table(["part", "time", "share"], rows)]


def _files(place: str, files: Sequence[str]) -> list[str]:
    rows = [[code(name), FILES[name]] for name in FILES if name in files]
    load = f'```python\nimport kdx\n\nstudent = kdx.load_student("{place}")\n```'
    return ["## Files", table(["file", "what it holds"], rows, numbers=False), "To load the student:", load]


def _environment(environment: Mapping[str, Any]) -> list[str]:
    if not environment:
        return []
    rows = [[code(name), inline(value)] for name, value in _flat(environment)]
    return ["## Environment", table(["", "value"], rows, numbers=False)]


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _fenced(title: str, text: str | None, language: str) -> list[str]:
    if text is None:
        return []
    fence = "```"
    while fence in text:
        fence += "`"
    return [f"## {title}", f"{fence}{language}\n{text.rstrip()}\n{fence}"]
