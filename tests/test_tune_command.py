"""Facts of `kdx tune`: what it prints and leaves, how several processes share a search, and the final test."""

from __future__ import annotations

import csv
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_run import PLAIN, Command, quiet, weights_of, write_config

pytest.importorskip("optuna")

from kdx.cli import STOPPED, main
from kdx.config import load
from kdx.result import read_result
from kdx.runs import prepare
from kdx.tune import check_search, read_search
from kdx.tune_report import write_best
from kdx.tune_trials import Books, Found, best_of

LR = {"train.lr": {"low": 0.01, "high": 0.5, "log": True}}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_config(Path("base.yaml"), PLAIN, {"baseline": True})


def written(**content: Any) -> str:
    standard = {"base": "base.yaml", "trials": 2, "space": LR, "pruner": "none"}
    Path("search.yaml").write_text(yaml.safe_dump({**standard, **content}, sort_keys=False))
    return "search.yaml"


def rows(folder: Path) -> list[dict[str, str]]:
    return [*csv.DictReader((folder / "table.csv").read_text(encoding="utf-8").splitlines())]


def state_of(name: str) -> tuple[list[Found], Path]:
    search = read_search(Path(name))
    ground = check_search(search, quiet())
    return Books(search, ground).found(), ground.folder


def test_a_search_prints_the_best_values_and_leaves_a_table_a_config_and_a_page(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["tune", written(), "train.updates=3"]) == 0
    shown = capsys.readouterr()
    folder = Path("runs/search_tune")
    assert "[2/2] trial 1: val accuracy" in shown.err
    found = rows(folder)
    best = max(found, key=lambda row: float(row["val_accuracy"]))
    assert f"# trial {best['trial']}: val accuracy" in shown.out
    assert f"lr: {best['train.lr']}" in shown.out
    assert [row["state"] for row in found] == ["complete", "complete"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "best validation accuracy" in page
    assert "No trial was evaluated on the test split" in page
    assert page.count("data:image/png") == 2
    config = load(folder / "best.yaml")
    assert config["train"]["lr"] == float(best["train.lr"])
    assert config["train"]["updates"] == 3
    assert config["name"] == "search_best"
    assert prepare(config, quiet()).hash in {row["folder"].rpartition("-")[2] for row in found}


def test_without_final_nothing_lies_beside_the_search_and_with_it_the_best_is_tested_without_training_again() -> None:
    assert main(["tune", written()]) == 0
    assert [path.name for path in Path("runs").iterdir() if path.is_dir()] == ["search_tune"]
    assert main(["tune", written(), "--final"]) == 0
    (folder,) = Path("runs").glob("search_best-*")
    result = read_result(folder)
    trial = Path("runs/search_tune/trials") / f"search-{result.hash}"
    assert "accuracy" in result.best.test
    assert result.best.val == read_result(trial).best.val
    mine, own = weights_of(folder), weights_of(trial)
    assert all((mine[name] == own[name]).all() for name in mine)
    lines = (folder / "metrics.jsonl").read_text(), (trial / "metrics.jsonl").read_text()
    assert lines[0] == lines[1]


def test_the_best_config_removes_what_its_point_removes() -> None:
    write_config(Path("base.yaml"), PLAIN, {"losses": {"kl": {"use": "cross_entropy", "weight": 0.1}}})
    name = written(space={"losses.kl": [None, {"use": "cross_entropy", "weight": 0.2}]})
    search = read_search(Path(name))
    ground = check_search(search, quiet())
    Path(ground.folder).mkdir(parents=True)
    best = Found(3, "complete", {"losses.kl": None}, 0.5, {}, 1.0, "", "")
    assert "kl" not in load(write_best(search, ground, best))["losses"]


def test_a_search_without_a_value_ends_with_1_and_says_where_the_reasons_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_config(Path("base.yaml"), PLAIN, {"train": {"monitor": "cross_entropy", "minimise": True}})
    assert main(["tune", written(space={"train.lr": [1e30, 1e31]}, trials=1)]) == 1
    assert "table.csv says why" in capsys.readouterr().err
    (row,) = rows(Path("runs/search_tune"))
    assert row["state"] == "failed"
    assert row["reason"].startswith("losses.ce (cross_entropy, plugin kdx.builtin) gave nan or inf in update 2")


@pytest.mark.slow
def test_two_processes_share_a_search(tmp_path: Path) -> None:
    assert Command("tune", written(trials=4), "--jobs", "2", folder=tmp_path).wait(300) == 0
    found, folder = state_of("search.yaml")
    assert [one.state for one in found] == ["complete"] * 4
    assert len(rows(folder)) == 4


@pytest.mark.slow
def test_a_search_that_is_interrupted_saves_and_goes_on(tmp_path: Path) -> None:
    write_config(Path("base.yaml"), PLAIN, {"train": {"updates": 3000}})
    command = Command("tune", written(trials=1), folder=tmp_path)
    ends = time.monotonic() + 60
    while not [*tmp_path.glob("runs/search_tune/trials/search-*/metrics.jsonl")] and time.monotonic() < ends:
        time.sleep(0.1)
    assert command.process.pid is not None
    os.kill(command.process.pid, signal.SIGINT)
    assert command.wait() == STOPPED
    assert "start it again to go on" in command.output.read_text()
    (trial,) = tmp_path.glob("runs/search_tune/trials/search-*")
    assert (trial / "checkpoint" / "last.pt").exists()
    search = read_search(Path("search.yaml"))
    given = Books(search, check_search(search, quiet())).next()
    assert given is not None
    assert given[0].params == {"train.lr": 0.05}
    given[1].release()


def test_no_jobs_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", written(), "--jobs", "0"]) == 2
    assert "--jobs: found 0, expected 1 or more" in capsys.readouterr().err


def test_the_best_is_the_first_of_equals_and_knows_the_direction() -> None:
    def found(number: int, value: float | None) -> Found:
        return Found(number, "complete", {}, value, {}, None, "", "")

    trials = [found(0, None), found(1, 0.2), found(2, 0.5), found(3, 0.5)]
    high, low = best_of(trials, minimise=False), best_of(trials, minimise=True)
    assert high is not None
    assert low is not None
    assert (high.number, low.number) == (2, 1)
    assert best_of(trials[:1], minimise=True) is None
