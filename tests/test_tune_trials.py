"""Facts of how a search is carried out: what is found, what is given up, and how it goes on after any end."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import pytest
import yaml
from small_run import CASCADE, PLAIN, Command, dying, quiet, registry, write_config

pytest.importorskip("optuna")

from kdx.errors import ConfigError, KdxError
from kdx.result import read_result
from kdx.runs import Stopped
from kdx.tune import Ground, Search, check_search, read_search
from kdx.tune_trials import Books, Found, best_of, carry_out_search

LR: dict[str, Any] = {"train.lr": {"low": 0.01, "high": 0.5, "log": True}}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_config(Path("base.yaml"), PLAIN)


def written(**content: Any) -> Path:
    standard = {"base": "base.yaml", "trials": 3, "space": LR, "startup": 1, "pruner": "none"}
    Path("search.yaml").write_text(yaml.safe_dump({**standard, **content}, sort_keys=False))
    return Path("search.yaml")


def begun(**content: Any) -> tuple[Search, Ground]:
    search = read_search(written(**content))
    return search, check_search(search, quiet())


def carried_out(search: Search, ground: Ground, **options: Any) -> list[Found]:
    carry_out_search(search, ground, quiet(**options), lambda found: None)
    return Books(search, ground).found()


def test_trials_are_judged_by_validation_and_never_see_the_test_split() -> None:
    search, ground = begun()
    told: list[int] = []
    carry_out_search(search, ground, quiet(), lambda found: told.append(found.number))
    trials = Books(search, ground).found()
    assert told == [one.number for one in trials] == [0, 1, 2]
    for one in trials:
        result = read_result(ground.folder / "trials" / one.folder)
        assert one.value == result.best.val["accuracy"] == max(one.values.values())
        assert result.best.test == result.last.test == {}
        assert [*one.values] == [1, 2]
    assert trials[0].point == {"train.lr": 0.05}, "the base is the first trial"
    assert len({one.folder for one in trials}) == 3


def test_the_value_of_several_seeds_is_their_mean_and_teachers_are_those_of_everybody() -> None:
    write_config(Path("base.yaml"), CASCADE)
    search, ground = begun(trials=1, seeds=[0, 1])
    (one,) = carried_out(search, ground)
    found = sorted((ground.folder / "trials").glob("search-*"))
    values = [read_result(folder).best.val["accuracy"] for folder in found]
    assert len(values) == 2
    assert one.value == pytest.approx(sum(values) / 2)
    teachers = [path for path in Path("runs").iterdir() if path.is_dir() and path != ground.folder]
    assert [path.name.partition("-")[0] for path in teachers] == ["wide"]


def test_a_finished_search_does_nothing_and_a_longer_one_adds_trials() -> None:
    search, ground = begun(trials=1)
    first = carried_out(search, ground)
    assert carried_out(search, ground) == first
    longer = carried_out(replace(search, trials=3), ground)
    assert longer[:1] == first
    assert len({str(one.point) for one in longer}) == 3


@pytest.mark.parametrize("pruner", ["median", "halving"])
def test_a_trial_that_falls_behind_is_given_up(pruner: str) -> None:
    write_config(Path("base.yaml"), PLAIN, {"train": {"updates": 12, "monitor": "cross_entropy", "minimise": True}})
    search, ground = begun(trials=6, space={"train.lr": [0.05, 1e-6]}, pruner=pruner, sampler="random")
    trials = carried_out(search, ground)
    assert trials[0].state == "complete"
    states = {one.state for one in trials if one.point["train.lr"] == 1e-6}
    assert states == {"pruned"}
    beaten = next(one for one in trials if one.state == "pruned")
    assert len(beaten.values) < 4
    best = best_of(trials, minimise=True)
    assert best is not None
    assert best.point == {"train.lr": 0.05}


def test_a_trial_that_fails_is_noted_and_the_others_go_on() -> None:
    search, ground = begun(trials=2, space={"train.lr": [0.05, 0.1]})
    broken = replace(search, layers=({"losses": {"ce": {"use": "no_such_loss"}}},))
    trials = carried_out(broken, ground)
    assert [one.state for one in trials] == ["failed", "failed"]
    assert "no_such_loss" in trials[0].reason
    assert best_of(trials, minimise=False) is None


def test_a_trial_whose_best_validation_is_no_number_has_failed() -> None:
    metrics = {"scripted": {"scores": [math.nan] * 8}}
    write_config(Path("base.yaml"), PLAIN, {"metrics": metrics, "train": {"monitor": "score"}})
    search, ground = begun(trials=1)
    registry().find("metrics", "scripted", "").component.computed = 0
    (one,) = carried_out(search, ground)
    assert (one.state, one.value, one.values) == ("failed", None, {})
    assert one.reason == "the validation score is nan"


def test_a_search_that_is_stopped_goes_on_where_its_trial_stands() -> None:
    search, ground = begun(trials=2)
    asked: list[None] = []

    def stop() -> bool:
        asked.append(None)
        return len(asked) > 4

    with pytest.raises(Stopped):
        carried_out(search, ground, stop=stop)
    assert Books(search, ground).found() == []
    trials = carried_out(search, ground)
    assert [one.state for one in trials] == ["complete", "complete"]
    assert trials[0].point == {"train.lr": 0.05}
    assert len([*(ground.folder / "trials").glob("search-*")]) == 2, "no run was begun twice"


def test_the_trial_of_a_process_that_died_is_begun_once_more_and_then_has_failed() -> None:
    search, ground = begun(trials=1)
    for point in ({"train.lr": 0.05}, {"train.lr": 0.05}):
        given = Books(search, ground).next()
        assert given is not None
        trial, lock = given
        assert trial.params == point
        assert Books(search, ground).next() is None, "it is at work as long as its lock is held"
        lock.release()
    assert Books(search, ground).next() is None
    (one,) = Books(search, ground).found()
    assert (one.state, one.reason) == ("failed", "its process died 2 times")


@pytest.mark.slow
def test_a_killed_process_loses_nothing_but_its_last_updates(tmp_path: Path) -> None:
    write_config(Path("base.yaml"), PLAIN, dying(tmp_path / "mark"))
    written(trials=1)
    assert Command("tune", "search.yaml", folder=tmp_path).wait(120) == 9
    search = read_search(Path("search.yaml"))
    trials = carried_out(search, check_search(search, quiet()))
    assert [one.state for one in trials] == ["complete"]
    assert trials[0].point == {"train.lr": 0.05}
    assert [*trials[0].values] == [1, 2]


def test_two_processes_never_ask_for_more_trials_than_there_are() -> None:
    search, ground = begun(trials=2)
    first, second = Books(search, ground), Books(search, ground)
    one, other = first.next(), second.next()
    assert one is not None
    assert other is not None
    assert one[0].params != other[0].params
    assert first.next() is None
    for _, lock in (one, other):
        assert isinstance(lock, filelock.BaseFileLock)
        lock.release()


def test_the_books_of_another_search_are_refused() -> None:
    search, ground = begun(trials=1)
    Books(search, ground)
    Books(replace(search, trials=5, sampler="random"), ground)
    other = read_search(written(space={"train.lr": [0.1, 0.2]}))
    with pytest.raises(ConfigError, match="are of a search with another space; give this one another `name`"):
        Books(other, ground)
    with pytest.raises(ConfigError, match="are of a search with another base"):
        Books(search, replace(ground, hash="0"))


def test_what_matters_is_known_after_some_trials() -> None:
    space = {**LR, "train.batch": [12, 6]}
    search, ground = begun(trials=8, space=space, sampler="random")
    books = Books(search, ground)
    assert books.importances() == {}
    for _ in range(8):
        given = books.next()
        assert given is not None
        trial, lock = given
        books.tell(trial, float(trial.params["train.lr"]))
        lock.release()
    found = books.importances()
    assert next(iter(found)) == "train.lr"
    assert set(found) == set(space)


def test_without_optuna_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    search, ground = begun()
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(KdxError, match=r"pip install 'kdx\[tune\]'"):
        Books(search, ground)
