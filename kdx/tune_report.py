"""What a search leaves in its folder: `table.csv`, `best.yaml`, and a page with figures; and the test of its best."""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdx.config import absolute_paths, load, parse_override, to_yaml
from kdx.files import write_text
from kdx.findings import relative
from kdx.formats import NONE, counted, duration
from kdx.history import FILE
from kdx.markdown import inline
from kdx.markdown import table as markdown_table
from kdx.page import page
from kdx.result import Result
from kdx.runs import CHECKPOINT, Options, carry_out, finished, prepare
from kdx.tune import Ground, Search, fragment, merge
from kdx.tune_jobs import shown
from kdx.tune_plots import draw_parallel, draw_search
from kdx.tune_trials import Books, Found, best_of

SHOWN = 15
"""The number of trials in the table of the page."""


def write_table(search: Search, ground: Ground, trials: Sequence[Found]) -> Path:
    """Write `table.csv`: one row for each trial, with unrounded numbers."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "state", f"val_{ground.monitor}", *search.space, "epochs", "seconds", "folder", "reason"])
    for one in trials:
        point = [one.point.get(key) for key in search.space]
        epochs = max(one.values, default=None) if one.values else None
        writer.writerow([one.number, one.state, one.value, *point, epochs, one.seconds, one.folder, one.reason])
    path = ground.folder / "table.csv"
    write_text(path, text.getvalue())
    return path


def write_best(search: Search, ground: Ground, best: Found) -> Path:
    """Write `best.yaml`, the config of the best trial: what it changes, over the base of the search."""
    changes: dict[str, Any] = {}
    for layer in search.layers:
        given = parse_override(layer) if isinstance(layer, str) else dict(layer)
        merge(changes, absolute_paths(given, Path.cwd()))
    merge(changes, fragment(search.space, best.point))
    if search.seeds:
        changes["seed"] = search.seeds[0]
    head = {"extends": relative(search.base, ground.folder), "name": f"{search.name}_best"}
    value = shown(ground.monitor, best.value)
    path = ground.folder / "best.yaml"
    write_text(path, f"# Trial {best.number} of the search {search.name}: {value}\n{to_yaml({**head, **changes})}")
    return path


def write_page(search: Search, ground: Ground, books: Books) -> Path:
    """Write `search.png`, `parallel.png` and `report.html`; gives the last."""
    trials = books.found()
    about: dict[str, Any] = {"monitor": ground.monitor, "minimise": ground.minimise}
    importances = books.importances()
    drawn = {
        "search.png": draw_search(ground.folder / "search.png", trials, importances, **about),
        "parallel.png": draw_parallel(ground.folder / "parallel.png", trials, search.space, **about),
    }
    pictures = {name: ground.folder / name for name, exists in drawn.items() if exists}
    best = best_of(trials, minimise=ground.minimise)
    parts = [f"# {inline(search.name)}: a search", _intro(search, ground)]
    if best is not None:
        parts += ["## The best point", f"```yaml\n{to_yaml(fragment(search.space, best.point))}```"]
    if "search.png" in pictures:
        parts += ["## How it went", "![Trials](search.png)", "![Points](parallel.png)"]
    parts += ["## Trials", _trials(search, ground, trials)]
    path = ground.folder / "report.html"
    write_text(path, page(search.name, "\n\n".join(parts) + "\n", _cards(search, ground, trials, best), pictures))
    return path


def evaluate_best(search: Search, ground: Ground, config: Path, options: Options) -> list[Result]:
    """Evaluate the config in `best.yaml` on the test split, once for each seed, beside its plain student.

    Its training is that of the trial, whose state is taken over.
    """
    results = []
    for seed in ground.seeds:
        prepared = prepare(load(config, [{"seed": seed}]), options, given=config.read_text(encoding="utf-8"))
        trial = ground.folder / "trials" / f"{search.name}-{prepared.hash}"
        if not finished(prepared) and not prepared.folder.exists() and (trial / CHECKPOINT).is_dir():
            _take_over(trial, prepared.folder)
        results.append(carry_out(prepared, options))
    return results


def _take_over(trial: Path, folder: Path) -> None:
    """Copy the state of a run that ended, so that another folder goes on with what follows training."""
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    shutil.copy2(trial / FILE, fresh / FILE)
    for name in (CHECKPOINT, "events"):
        shutil.copytree(trial / name, fresh / name)
    os.replace(fresh, folder)


def _intro(search: Search, ground: Ground) -> str:
    way = "the lowest" if ground.minimise else "the highest"
    seeds = f"the mean over the seeds {', '.join(map(str, ground.seeds))}" if len(ground.seeds) > 1 else "one seed"
    lines = [
        f"Trials are judged by {way} validation {inline(ground.monitor)} of their epochs, {seeds}. No trial was "
        "evaluated on the test split.",
        f"The best of {search.trials} values is high by chance, too: what the best point is worth is what `--final` "
        "finds on the test split, or a study with seeds that took no part in the search.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _cards(search: Search, ground: Ground, trials: Sequence[Found], best: Found | None) -> list[tuple[str, str, str]]:
    counts = Counter(one.state for one in trials)
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    cards = [("trials", f"{len(trials)} of {search.trials}", states)]
    if best is not None:
        value = shown(ground.monitor, best.value).removeprefix(f"val {ground.monitor} ")
        cards.insert(0, (f"best validation {ground.monitor}", value, f"trial {best.number}"))
    own = next((one for one in trials if one.value is not None and one.point == ground.own), None)
    if own is not None:
        value = shown(ground.monitor, own.value).removeprefix(f"val {ground.monitor} ")
        cards.append(("the base as it is", value, f"trial {own.number}"))
    return cards


def _trials(search: Search, ground: Ground, trials: Sequence[Found]) -> str:
    """The best trials, then those that failed."""
    sign = 1.0 if ground.minimise else -1.0
    done = sorted((one for one in trials if one.value is not None), key=lambda one: sign * (one.value or 0.0))
    heads = ["trial", f"val {ground.monitor}", *search.space, "time"]
    rows = [
        [
            str(one.number),
            shown(ground.monitor, one.value).removeprefix(f"val {ground.monitor} "),
            *(_cell(one.point.get(key)) for key in search.space),
            NONE if one.seconds is None else duration(one.seconds),
        ]
        for one in done[:SHOWN]
    ]
    text = markdown_table([inline(head) for head in heads], [[inline(cell) for cell in row] for row in rows])
    beaten = sum(one.state == "pruned" for one in trials)
    notes = [f"{counted(beaten, 'trial')} given up before the end."] if beaten else []
    notes += [f"Trial {one.number} failed: {inline(one.reason)}" for one in trials if one.state == "failed"]
    return text + "".join(f"\n\n- {note}" for note in notes)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
