"""`study.json`: what came of a study and where its runs lie, so that every output can be made again from files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdx.comparable import Basis, basis, facts_of, marks
from kdx.config import read_yaml
from kdx.errors import CheckpointError, ConfigError
from kdx.files import write_text
from kdx.report import environment_of
from kdx.result import Result, read_result
from kdx.study import Outcome, Study, Trial, read_outcomes

FILE = "study.json"


@dataclass(frozen=True)
class Findings:
    """The outcomes of a study, or of runs that are compared. `runs` maps the names of run folders to where they lie."""

    name: str
    reference: str
    outcomes: tuple[Outcome, ...]
    marks: Mapping[str, tuple[str, ...]]
    runs: Mapping[str, Path]


def of_study(study: Study, trials: Sequence[Trial], outcomes: Sequence[Outcome], runs: Path) -> Findings:
    """The findings of the trials that have ended; `runs` is the folder of runs."""
    return Findings(
        study.name,
        study.reference,
        tuple(outcomes),
        {trial.variant: trial.marks for trial in trials if trial.marks},
        {outcome.folder: runs / outcome.folder for outcome in outcomes if outcome.folder},
    )


def of_folders(folders: Sequence[Path]) -> Findings:
    """The findings in the folder of one study, or those of several runs and studies.

    Several are compared as `read_outcomes` says, the first one being the reference; of studies, the finished trials
    take part. Raises `ConfigError` for runs with other data or another budget; other differences are marked.
    """
    if len(folders) == 1 and (folders[0] / FILE).is_file():
        return read_findings(folders[0])
    found = list(dict.fromkeys(run for folder in folders for run in _runs_of(folder)))
    if not found:
        raise ConfigError(f"{', '.join(map(str, folders))}: no trial has finished, so there is nothing to compare")
    outcomes = read_outcomes(found)
    bases: dict[str, dict[int, Basis]] = {}
    for folder, outcome in zip(found, outcomes, strict=True):
        assert outcome.result is not None
        bases.setdefault(outcome.variant, {})[outcome.seed] = _basis(folder, outcome.result)
    reference = outcomes[0].variant
    marked = {name: marks(*_with_one_seed(bases[reference], own)) for name, own in bases.items()}
    return Findings(
        f"{len(found)} run{'s' if len(found) > 1 else ''}",
        reference,
        tuple(outcomes),
        {name: texts for name, texts in marked.items() if texts},
        {folder.name: folder for folder in found},
    )


def write_findings(folder: Path, findings: Findings) -> Path:
    """Write `study.json`. The runs stand in it relative to the folder, so that both can be moved together."""
    data = {
        "name": findings.name,
        "reference": findings.reference,
        "marks": {name: list(texts) for name, texts in findings.marks.items()},
        "trials": [
            {
                "variant": outcome.variant,
                "seed": outcome.seed,
                "run": relative(findings.runs[outcome.folder], folder) if outcome.folder else None,
                "reason": outcome.reason,
            }
            for outcome in findings.outcomes
        ],
    }
    path = folder / FILE
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    return path


def read_findings(folder: Path) -> Findings:
    """The findings in a study's folder; raises `CheckpointError` if `study.json` or a result in it is torn or gone."""
    path = folder / FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        outcomes = [_outcome(folder, trial) for trial in data["trials"]]
        runs = {Path(trial["run"]).name: folder / trial["run"] for trial in data["trials"] if trial["run"]}
        marked = {name: tuple(texts) for name, texts in data["marks"].items()}
        return Findings(data["name"], data["reference"], tuple(outcomes), marked, runs)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not what a study leaves ({type(error).__name__}: {error}); carry the study out again: finished "
            "trials are taken as they are"
        ) from error


def relative(path: Path, folder: Path) -> str:
    """A path as it is written in a file that lies in `folder`, with slashes."""
    return Path(os.path.relpath(path.absolute(), folder.absolute())).as_posix()


def _outcome(folder: Path, trial: Mapping[str, Any]) -> Outcome:
    run, reason = trial["run"], str(trial["reason"])
    result = None if reason or run is None else read_result(folder / run)
    return Outcome(str(trial["variant"]), int(trial["seed"]), Path(run).name if run else "", result, reason)


def _runs_of(folder: Path) -> list[Path]:
    if not (folder / FILE).is_file():
        return [folder]
    findings = read_findings(folder)
    return [findings.runs[outcome.folder] for outcome in findings.outcomes if outcome.result is not None]


def _basis(folder: Path, result: Result) -> Basis:
    # The hash alone: studies of other names have the same plain student in another folder.
    plain = None if result.plain is None or result.plain.folder is None else result.plain.folder.rpartition("-")[2]
    config = read_yaml(folder / "config.yaml")
    if (precision := environment_of(folder).get("precision")) is not None:  # what `auto` has come to
        config["runtime"] = {**(config.get("runtime") or {}), "precision": precision}
    return basis(facts_of(result), config, seed=result.seed, teachers=[*result.teachers], plain=plain)


def _with_one_seed(first: Mapping[int, Basis], other: Mapping[int, Basis]) -> tuple[Basis, Basis]:
    """A basis of each of two variants, with the same seed where they share one."""
    seed = next((seed for seed in first if seed in other), None)
    if seed is None:
        return next(iter(first.values())), next(iter(other.values()))
    return first[seed], other[seed]
