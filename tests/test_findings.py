"""Facts of `study.json`, and of runs and studies that are compared without a study file."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from sample_study import sample_study
from small_run import PLAIN, run_in

from kdx.errors import CheckpointError, ConfigError
from kdx.findings import of_folders, read_findings, write_findings
from kdx.result import Row, read_result, write_result


def test_findings_are_read_as_they_were_written_also_after_a_move(tmp_path: Path) -> None:
    findings = sample_study(tmp_path / "runs", ["full", "no_hint"], seeds=2)
    write_findings(tmp_path / "runs" / "study_study", findings)
    shutil.move(tmp_path / "runs", tmp_path / "moved")
    found = read_findings(tmp_path / "moved" / "study_study")
    assert (found.name, found.reference, found.marks) == (findings.name, findings.reference, findings.marks)
    assert found.outcomes == findings.outcomes
    assert all(run.is_dir() for run in found.runs.values())


def test_a_torn_file_and_a_run_that_is_gone_are_named(tmp_path: Path) -> None:
    findings = sample_study(tmp_path, ["full"], seeds=1)
    path = write_findings(tmp_path / "study_study", findings)
    text = path.read_text()
    path.write_text(text[:-20])
    with pytest.raises(CheckpointError, match=r"study\.json: not what a study leaves .* carry the study out again"):
        read_findings(path.parent)
    path.write_text(json.dumps({**json.loads(text), "trials": [{"variant": "full"}]}))
    with pytest.raises(CheckpointError, match="KeyError"):
        read_findings(path.parent)
    path.write_text(text)
    shutil.rmtree(tmp_path / "study-0-0")
    with pytest.raises(CheckpointError, match=r"study-0-0/result\.json: there is no such file"):
        read_findings(path.parent)


def test_runs_that_differ_in_more_than_their_method_are_marked(tmp_path: Path) -> None:
    layers = [{"name": "one"}, {"name": "two", "train": {"lr": 0.1}}, {"name": "three"}]
    runs = [run_in(tmp_path, PLAIN, layer, {"seed": seed}).folder for layer in layers[:2] for seed in (0, 1)]
    runs.append(run_in(tmp_path, PLAIN, layers[2], {"losses": {"ce": {"label_smoothing": 0.1}}}).folder)
    findings = of_folders(runs)
    assert findings.reference == "one"
    assert findings.marks == {"two": ("train.lr (0.1 against 0.05)",)}
    assert [outcome.variant for outcome in findings.outcomes] == ["one", "one", "two", "two", "three"]


def test_what_an_open_precision_has_come_to_is_compared(tmp_path: Path) -> None:
    layers = [{"name": name, "runtime": {"precision": "auto"}} for name in ("one", "two")]
    folders = [run_in(tmp_path, PLAIN, layer).folder for layer in layers]
    for folder, precision in zip(folders, ("fp32", "bf16"), strict=True):
        about = json.loads((folder / "environment.json").read_text())
        (folder / "environment.json").write_text(json.dumps({**about, "precision": precision}))
    assert of_folders(folders).marks == {"two": ("runtime.precision (bf16 against fp32)",)}


def test_a_plain_student_in_a_folder_of_another_name_is_the_same_one(tmp_path: Path) -> None:
    layer = {"losses": {"ce": {"label_smoothing": 0.1}}}
    runs = [run_in(tmp_path, PLAIN, {"name": "one"}).folder, run_in(tmp_path, PLAIN, {"name": "two"}, layer).folder]
    for folder, name in zip(runs, ("one", "two"), strict=True):
        result = read_result(folder)
        plain = Row(f"{name}_plain-0123456789ab", None, None, {}, {}, None, None)
        write_result(folder, dataclasses.replace(result, plain=plain))
    assert of_folders(runs).marks == {}


def test_runs_with_another_budget_are_refused_with_the_reason(tmp_path: Path) -> None:
    runs = [run_in(tmp_path, PLAIN, {"train": {"updates": updates}}).folder for updates in (6, 9)]
    with pytest.raises(ConfigError, match=r"cannot be compared .* the number of updates \(9 against 6\)"):
        of_folders(runs)


def test_a_study_without_a_finished_trial_cannot_be_compared(tmp_path: Path) -> None:
    findings = sample_study(tmp_path, ["full"], seeds=0)
    write_findings(tmp_path / "study_study", findings)
    with pytest.raises(ConfigError, match="no trial has finished"):
        of_folders([tmp_path / "study_study"] * 2)
