"""`result.json`: what a finished run found, read back strictly and written in one piece."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeAlias, get_args, get_origin, get_type_hints

from kdx.errors import CheckpointError, did_you_mean
from kdx.files import write_text
from kdx.measure import Size

FILE = "result.json"
SUM = "sha256"

Metrics: TypeAlias = dict[str, float]
"""Metric name -> value. Accuracy, macro recall, macro F1 and calibration error are fractions; empty without a split."""


@dataclass(frozen=True)
class Point:
    """The student at one epoch, after `step` updates."""

    epoch: int
    step: int
    val: Metrics
    test: Metrics


@dataclass(frozen=True)
class Row:
    """Something that the student is compared with: a teacher, an ensemble, or the same student without teachers.

    `folder` is relative to the folder of runs, None for what is no run; `labelled` is the number of training labels
    that it saw, None where nobody knows (downloaded weights).
    """

    folder: str | None
    labelled: int | None
    best_epoch: int | None
    test: Metrics
    val: Metrics
    last_test: Metrics | None
    size: Size | None


@dataclass(frozen=True)
class Seconds:
    """Where the time of a run went. `total` is wall-clock time, so the others need not add up to it."""

    teachers: float
    student: float
    data: float
    evaluation: float
    total: float


@dataclass(frozen=True)
class Result:
    """The outcome of a run. `name` is the one that is shown: the config's title, or its name.

    `labelled` of the `seen` training samples had a label that the run could see. `confusion[i][j]` counts test samples
    of class i that were taken for class j at the best epoch. `agreement` maps each teacher and then each split (`val`,
    `test`) to what `kdx.agreement` finds for the student that is kept. `dropped` counts the answers of each teacher
    that were left out of training because they were not finite; it is empty where such answers are refused. `skipped`
    counts the updates that were left out because their loss or gradient was not finite. `student` is the checksum of
    `student.safetensors`.
    """

    name: str
    hash: str
    seed: int
    status: str
    classes: list[str]
    labelled: int
    seen: int
    best: Point
    last: Point
    confusion: list[list[int]]
    size: Size | None
    seconds: Seconds
    teachers: dict[str, Row]
    targets: dict[str, Row]
    plain: Row | None
    agreement: dict[str, dict[str, Metrics]] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    skipped: int = field(default_factory=int)
    student: str = field(default_factory=str)


def to_dict(result: Result) -> dict[str, Any]:
    """The result as plain data that JSON can hold; a number that is not finite becomes None."""
    plain: dict[str, Any] = finite(asdict(result))
    return plain


def from_dict(data: Mapping[str, Any], where: str = FILE) -> Result:
    """The result in plain data, or a `CheckpointError` that starts with `where` and the place of the fault."""
    result: Result = _decode(Result, data, where)
    count = len(result.classes)
    if result.confusion and [len(row) for row in result.confusion] != [count] * count:
        raise CheckpointError(
            f"{where}: confusion: expected {count} rows of {count} numbers, one for each of `classes`"
        )
    return result


def to_json(result: Result) -> str:
    """The text of `result.json`, with a checksum of all that it says."""
    data = to_dict(result)
    return json.dumps({**data, SUM: _checksum(data)}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(text: str, where: str = FILE) -> Result:
    """The result in the text of a `result.json`, or a `CheckpointError` that starts with `where`."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{where}: torn or not JSON ({error}); run the config again to write it anew") from error
    checksum = data.pop(SUM, None) if isinstance(data, dict) else None
    result = from_dict(data, where)
    if checksum not in (None, _checksum(data)):
        raise CheckpointError(f"{where}: altered: it does not say what its {SUM} is of; run the config again")
    return result


def _checksum(data: Mapping[str, Any]) -> str:
    """The SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def read_result(folder: Path) -> Result:
    """The result of a finished run, or a `CheckpointError` that names the file."""
    path = folder / FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such file; the run has not finished or this is no run") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: torn or not JSON ({error}); run the config again to write it anew") from error
    return from_json(text, str(path))


def write_result(folder: Path, result: Result) -> Path:
    """Write `result.json` so that a reader finds the old file or the whole new one, even after a power cut."""
    path = folder / FILE
    write_text(path, to_json(result))
    return path


def finite(value: Any) -> Any:
    """Plain data in which every number that is not finite is None: JSON has no word for it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _decode(kind: Any, value: Any, where: str) -> Any:
    """`value` as a `kind`: a dataclass, `dict[str, ...]`, `list[...]`, `... | None`, or a plain type."""
    arguments = get_args(kind)
    if type(None) in arguments:
        return None if value is None else _decode(arguments[0], value, where)
    if is_dataclass(kind):
        return _decode_fields(kind, value, where)
    if get_origin(kind) is dict:
        _expect(isinstance(value, Mapping), value, where, "a mapping")
        return {str(key): _decode(arguments[1], item, f"{where}: {key}") for key, item in value.items()}
    if get_origin(kind) is list:
        _expect(isinstance(value, list), value, where, "a list")
        return [_decode(arguments[0], item, f"{where}: [{index}]") for index, item in enumerate(value)]
    if kind is float:
        if value is None:
            return math.nan
        _expect(isinstance(value, int | float) and not isinstance(value, bool), value, where, "a number")
        return float(value)
    _expect(isinstance(value, kind) and not isinstance(value, bool), value, where, f"of type {kind.__name__}")
    return value


def _decode_fields(kind: Any, value: Any, where: str) -> Any:
    _expect(isinstance(value, Mapping), value, where, f"a mapping ({kind.__name__})")
    names = [item.name for item in fields(kind)]
    needed = [item.name for item in fields(kind) if item.default_factory is MISSING]
    for name in value:
        if name not in names:
            raise CheckpointError(f"{where}: {name!r} is not known here; {did_you_mean(str(name), names)}")
    if missing := [name for name in needed if name not in value]:
        raise CheckpointError(f"{where}: misses {', '.join(missing)}")
    hints = get_type_hints(kind)
    return kind(**{name: _decode(hints[name], value[name], f"{where}: {name}") for name in names if name in value})


def _expect(holds: bool, value: Any, where: str, what: str) -> None:
    if not holds:
        raise CheckpointError(f"{where}: found {value!r}, expected it to be {what}")
