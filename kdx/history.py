"""`metrics.jsonl`: the lines that a run leaves about its updates and evaluations, one JSON object each.

    {"kind": "step", "step": 1, "epoch": 1, "lr": 0.1, "terms": {"ce": 2.3, ...}, "knobs": {...}}
    {"kind": "step", ..., "shown": {"committee.weights.wide": 0.6, "committee.weights.wide/std": 0.1, ...}}
    {"kind": "eval", "step": 40, "epoch": 1, "split": "val", "who": "student", "metrics": {...}, "best": true}

`shown` is there where a target shows something; its means of an epoch and of each class are an evaluation of the target
on the split `train`.

`step` counts finished updates. There are no times in it, so a resumed run leaves the same file as an undisturbed one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kdx.errors import CheckpointError
from kdx.result import finite

FILE = "metrics.jsonl"


@dataclass(frozen=True)
class StepLine:
    """The numbers of one update."""

    step: int
    epoch: int
    lr: float
    terms: dict[str, float]
    knobs: dict[str, float]
    shown: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalLine:
    """The numbers of one evaluation."""

    step: int
    epoch: int
    split: str
    who: str
    metrics: dict[str, float]
    best: bool


@dataclass(frozen=True)
class History:
    """All lines of a run in order."""

    steps: tuple[StepLine, ...] = ()
    evals: tuple[EvalLine, ...] = ()

    def curve(self, metric: str, *, split: str = "val", who: str = "student") -> list[EvalLine]:
        """The evaluations of `who` on `split` that have `metric`."""
        return [line for line in self.evals if (line.split, line.who) == (split, who) and metric in line.metrics]


def to_line(line: StepLine | EvalLine) -> str:
    """The text of one line with its line end; a number that is not finite becomes null."""
    kind = "step" if isinstance(line, StepLine) else "eval"
    content = {name: value for name, value in asdict(line).items() if name != "shown" or value}
    return json.dumps({"kind": kind, **finite(content)}, ensure_ascii=False, allow_nan=False) + "\n"


def from_line(text: str, where: str) -> StepLine | EvalLine:
    """What one line says, null being nan, or a `CheckpointError` that starts with `where`."""
    try:
        data = json.loads(text)
        kind, step, epoch = data["kind"], int(data["step"]), int(data["epoch"])
        if kind == "step":
            terms, knobs, shown = (_numbers(found) for found in (data["terms"], data["knobs"], data.get("shown", {})))
            return StepLine(step, epoch, _number(data["lr"]), terms, knobs, shown)
        if kind == "eval":
            return EvalLine(step, epoch, data["split"], data["who"], _numbers(data["metrics"]), data["best"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where}: not a line of {FILE} ({type(error).__name__}: {error})") from error
    raise CheckpointError(f"{where}: found kind {kind!r}, expected 'step' or 'eval'")


def read_history(folder: Path) -> History:
    """The lines in a run's folder; none if there is no file. A last line without an end is still being written."""
    path = folder / FILE
    if not path.exists():
        return History()
    steps: list[StepLine] = []
    evals: list[EvalLine] = []
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            if not text.endswith("\n"):
                break
            line = from_line(text, f"{path}, line {number}")
            if isinstance(line, StepLine):
                steps.append(line)
            else:
                evals.append(line)
    return History(tuple(steps), tuple(evals))


def cut(path: Path, step: int) -> None:
    """Remove what follows update `step`: later lines and a torn end.

    Raises `CheckpointError` if the file stops before `step`, since the curves would have a hole.
    """
    kept = reached = 0
    with path.open("r+b") as file:
        for text in file:
            try:
                line = from_line(text.decode("utf-8"), str(path))
            except (CheckpointError, UnicodeDecodeError):
                break
            if line.step > step or not text.endswith(b"\n"):
                break
            kept += len(text)
            reached = max(reached, line.step)
        if reached < step:
            raise CheckpointError(
                f"{path}: readable up to update {reached}, but the run is taken up after update {step}; "
                f"delete this file to go on without its history, or start the run afresh"
            )
        file.truncate(kept)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: _number(value) for name, value in values.items()}


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
