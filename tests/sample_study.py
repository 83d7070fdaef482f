"""Files of a finished study, as the engine leaves them: runs with histories, plain students, and one failed trial."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path

from sample_run import metrics, sample_result

from kdx.findings import Findings
from kdx.history import EvalLine, to_line
from kdx.result import Point, Result, write_result
from kdx.study import Outcome

EPOCHS, UPDATES = 12, 40


def sample_study(runs: Path, names: list[str], seeds: int = 3) -> Findings:
    """Each variant is 0.2 points better than the one before it; seeds spread by about half a point."""
    outcomes = []
    for seed in range(seeds):
        _write_history(runs / f"study_plain-{seed}", 0.78, seed)
        for place, name in enumerate(names):
            result = sample_variant(name, seed, 0.79 + 0.002 * place + _noise(name, seed))
            folder = runs / f"study-{place}-{seed}"
            _write_history(folder, result.best.test["accuracy"], seed)
            write_result(folder, result)
            (folder / "report.html").write_text("a report")
            outcomes.append(Outcome(name, seed, folder.name, result))
    outcomes.append(Outcome(names[-1], seeds, "", None, "RuntimeError: it broke\non two lines"))
    marks = {names[-1]: ("train.epochs (24 against 12)", "the number of updates (960 against 480)")}
    places = {outcome.folder: runs / outcome.folder for outcome in outcomes if outcome.folder}
    return Findings("study", names[0], tuple(outcomes), marks, places)


def sample_variant(name: str, seed: int, accuracy: float) -> Result:
    result = sample_result(seed)
    assert result.plain is not None
    plain = dataclasses.replace(result.plain, folder=f"study_plain-{seed}", test=metrics(0.789 + _noise("", seed)))
    return dataclasses.replace(
        result,
        name=f"study / {name}",
        best=Point(EPOCHS - 2, (EPOCHS - 2) * UPDATES, metrics(accuracy + 0.004), metrics(accuracy)),
        last=Point(EPOCHS, EPOCHS * UPDATES, metrics(accuracy + 0.001), metrics(accuracy - 0.003)),
        plain=plain,
    )


def _noise(name: str, seed: int) -> float:
    return random.Random(f"{name} {seed}").gauss(0, 0.004)


def _write_history(folder: Path, height: float, seed: int) -> None:
    folder.mkdir(parents=True)
    noise = random.Random(f"{folder.name} {seed}")
    lines = []
    for epoch in range(1, EPOCHS + 1):
        accuracy = height * (1 - 0.5 * math.exp(-epoch / 2.5)) + noise.gauss(0, 0.004)
        lines.append(EvalLine(epoch * UPDATES, epoch, "val", "student", metrics(accuracy), False))
    (folder / "metrics.jsonl").write_text("".join(map(to_line, lines)))
