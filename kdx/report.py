"""The report of a run, the table at its end, and the comparison over seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from kdx.comparable import fact_differences, facts_of
from kdx.errors import CheckpointError, ConfigError
from kdx.files import write_text
from kdx.formats import NONE, count, milliseconds, percent, points, ratio, whole
from kdx.history import History, read_history
from kdx.measure import Size
from kdx.report_teachers import agreement_cells
from kdx.report_text import report_text
from kdx.result import Result, from_dict, read_result
from kdx.standings import gain, gain_sentence, label_sentences, standings, student_role
from kdx.statistics import spread

SHOWN = ("plan.txt", "config.yaml")


def write_report(folder: Path) -> Path:
    """Write `curves.png`, `confusion.png`, `report.md` and `report.html` into a finished run's folder; gives the last.

    It reads only files: those of the folder, and the curve of the plain student, whose run lies beside it. Raises
    `CheckpointError` if `result.json` or another of them is missing, torn or not of a run.
    """
    from kdx.page import page  # what draws and lays out is loaded after training, not before
    from kdx.plots import draw_confusion, draw_curves

    result = read_result(folder)
    plain = result.plain.folder if result.plain is not None else None
    plain_history = read_history(folder.parent / plain) if plain else History()
    history = read_history(folder)
    drawn = {
        "curves.png": draw_curves(folder / "curves.png", result, history, plain_history),
        "confusion.png": draw_confusion(folder / "confusion.png", result),
    }
    pictures = {name: folder / name for name, exists in drawn.items() if exists}
    for name in drawn.keys() - pictures.keys():
        (folder / name).unlink(missing_ok=True)  # of an earlier report
    files = sorted({path.name for path in folder.iterdir()} | {"report.md", "report.html"})
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in files if name in SHOWN}
    place = f"{folder.absolute().parent.name}/{folder.absolute().name}"
    markdown = report_text(
        result, place=place, files=files, texts=texts, environment=environment_of(folder), history=history
    )
    write_text(folder / "report.md", markdown)
    path = folder / "report.html"
    write_text(path, page(result.name, markdown, _cards(result), pictures))
    return path


def summary_table(result: Result | Mapping[str, Any]) -> Table:
    """The comparison of one run for the terminal; takes a `Result` or the content of a `result.json`."""
    result = result if isinstance(result, Result) else from_dict(result)
    caption = " ".join(filter(None, (gain_sentence(result), *label_sentences(result))))
    table = table_with(f"{result.name}, test split", caption)
    table.add_column("")
    agree = ["same answer", "KL"] if any("test" in found for found in result.agreement.values()) else []
    for head in ("labels", "accuracy", "macro F1", "params", "mult-adds", "CPU", *agree):
        table.add_column(head, justify="right")
    for standing in standings(result):
        test, size = standing.test, standing.size
        own = result.agreement.get(standing.name, {}) if standing.role == "teacher" else {}
        table.add_row(
            Text(f"{standing.role} {standing.name}".rstrip()),
            whole(standing.labelled),
            *(percent(test.get(name)) for name in ("accuracy", "macro_f1")),
            *([NONE] * 3 if size is None else _cost(size)),
            *(agreement_cells(own.get("test", {})) if agree else []),
            style="bold" if standing.role == student_role(result) else None,
        )
    return table


def comparison(results: Sequence[Result | Mapping[str, Any]]) -> tuple[Table, dict[str, Any]]:
    """Plain and distilled test accuracy over several seeds: a table, and the same as plain data.

    The data holds `seeds`, `labelled`, `seen`, `teachers` (name -> labels that it saw), and for `best` and `last` the
    entries `plain`, `distilled` and `difference`, each `{values, mean, std}` as fractions. The difference is paired by
    seed. `std` is the sample standard deviation, None for one seed; an entry is None where a seed lacks a value.
    Raises `ConfigError` if there is no result, a seed occurs twice, or the runs differ in their data or budget.
    """
    runs = [result if isinstance(result, Result) else from_dict(result) for result in results]
    _check_comparable(runs)
    first = runs[0]
    data: dict[str, Any] = {
        "seeds": [run.seed for run in runs],
        "labelled": first.labelled,
        "seen": first.seen,
        "teachers": {name: row.labelled for name, row in first.teachers.items()},
        "best": {
            "plain": _spread([None if run.plain is None else run.plain.test.get("accuracy") for run in runs]),
            "distilled": _spread([run.best.test.get("accuracy") for run in runs]),
            "difference": _spread([gain(run).best for run in runs]),
        },
        "last": {
            "plain": _spread([_last_plain(run) for run in runs]),
            "distilled": _spread([run.last.test.get("accuracy") for run in runs]),
            "difference": _spread([gain(run).last for run in runs]),
        },
    }
    return _comparison_table(first, data), data


def _check_comparable(runs: Sequence[Result]) -> None:
    if not runs:
        raise ConfigError("a comparison over seeds needs at least one result")
    seeds = [run.seed for run in runs]
    if repeated := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        raise ConfigError(f"seed {repeated[0]} occurs twice in a comparison over seeds: give each seed once")
    for run in runs[1:]:
        if found := fact_differences(facts_of(runs[0]), facts_of(run)):
            raise ConfigError(
                f"seed {run.seed} cannot be averaged with seed {runs[0].seed}: they differ in {found[0]}, and their "
                "mean would say nothing about either"
            )


def _last_plain(run: Result) -> float | None:
    if run.plain is None or run.plain.last_test is None:
        return None
    return run.plain.last_test.get("accuracy")


def _spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    known = [value for value in values if value is not None]
    found = spread(known)
    if found is None or len(known) < len(values):
        return None
    return {"values": known, "mean": found.mean, "std": found.std}


def _comparison_table(first: Result, data: Mapping[str, Any]) -> Table:
    seeds = data["seeds"]
    few = "This is one seed, and one seed concludes little. " if len(seeds) == 1 else ""
    caption = (
        f"{few}Mean ± standard deviation over the seeds; differences are paired by seed. "
        f"{' '.join(label_sentences(first))}"
    )
    title = f"{first.name}: test accuracy over {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    table = table_with(title, caption)
    table.add_column("epoch")
    for head in ("plain", "distilled", "distilled - plain"):
        table.add_column(head, justify="right")
    for which in ("best", "last"):
        for index, seed in enumerate(seeds):
            cells = [_at(data[which][who], index, who) for who in ("plain", "distilled", "difference")]
            table.add_row(f"{which}, seed {seed}", *cells, style="dim")
        cells = [_mean(data[which][who], who) for who in ("plain", "distilled", "difference")]
        table.add_row(f"{which}, mean", *cells, style="bold", end_section=True)
    return table


def _at(spread: Mapping[str, Any] | None, index: int, who: str) -> str:
    if spread is None:
        return NONE
    value = spread["values"][index]
    return points(value) if who == "difference" else percent(value)


def _mean(spread: Mapping[str, Any] | None, who: str) -> str:
    if spread is None:
        return NONE
    mean = points(spread["mean"]) if who == "difference" else percent(spread["mean"])
    if spread["std"] is None:
        return mean
    figure, unit = mean.split(" ")
    return f"{figure} ± {100 * spread['std']:.2f} {unit}"


def _cost(size: Size) -> list[str]:
    return [count(size.parameters), count(size.multiply_adds), milliseconds(size.latency_ms)]


def table_with(title: str, caption: str) -> Table:
    """An empty table as all of kdx's comparisons look."""
    layout: dict[str, Any] = {"title_justify": "left", "caption_justify": "left", "box": SIMPLE_HEAD, "pad_edge": False}
    return Table(title=Text(title), caption=Text(caption), **layout)


def _cards(result: Result) -> list[tuple[str, str, str]]:
    """The figures at the top of the page: (label, value, note)."""
    cards = []
    if "accuracy" in result.best.test:
        labels = f"{whole(result.labelled)} of {whole(result.seen)} labels seen"
        cards.append((f"{student_role(result)}, test accuracy", percent(result.best.test["accuracy"]), labels))
    if (difference := gain(result).best) is not None:
        counts = dict.fromkeys(whole(row.labelled).replace(NONE, "unknown") for row in result.teachers.values())
        note = f"labels: student {whole(result.labelled)}, teachers {' and '.join(counts) or 'none'}; one seed"
        cards.append(("distilled minus plain", points(difference), note))
    if result.size is not None:
        cards.append(("student", count(result.size.parameters), "parameters"))
        cost = [one for one in standings(result) if one.role == "teacher" and one.size is not None]
        largest = max(cost, key=lambda one: one.size.parameters if one.size else 0, default=None)
        if largest is not None and largest.size is not None:
            times = ratio(largest.size.parameters, result.size.parameters)
            cards.append(("compression", times, f"fewer parameters than teacher {largest.name}"))
    return cards


def environment_of(folder: Path) -> dict[str, Any]:
    """What `environment.json` in the folder of a run holds; empty where there is none."""
    path = folder / "environment.json"
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: torn or not JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: found {type(data).__name__}, expected a mapping")
    return data
