"""Facts of how searches are read: their spaces, what is refused, and which config a point is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from small_run import DISTIL, PLAIN, quiet, write_config

import kdx
from kdx.config import load, read_yaml
from kdx.errors import ConfigError, PluginError
from kdx.tune import Choices, Range, check_search, fragment, layers_of, own_point, prepare_trial, read_search

SEARCHES = [
    path
    for path in sorted((Path(kdx.__file__).parents[1] / "configs" / "ablations").glob("*.yaml"))
    if "space" in read_yaml(path)
]
SPACE: dict[str, Any] = {
    "losses.kd.temperature": {"low": 1, "high": 8},
    "losses.kd.weight": {"low": 0.1, "high": 10, "log": True},
    "losses.hint": {"pick": ["mse", "l1"]},
    "align": [None, {"mid": {"use": "linear"}}],
    "train.batch": {"low": 4, "high": 12, "step": 4, "int": True},
    "train.optimizer.use": ["sgd", "adamw"],
}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_config(Path("base.yaml"), PLAIN)


def written(**content: Any) -> Path:
    Path("search.yaml").write_text(yaml.safe_dump({"base": "base.yaml", **content}, sort_keys=False))
    return Path("search.yaml")


def test_a_space_has_ranges_and_choices() -> None:
    space = read_search(written(space=SPACE)).space
    assert space["losses.kd.temperature"] == Range(1, 8)
    assert space["losses.kd.weight"] == Range(0.1, 10, log=True)
    assert space["losses.hint"] == Choices({"mse": {"use": "mse"}, "l1": {"use": "l1"}})
    assert space["align"] == Choices({None: None, '{"mid": {"use": "linear"}}': {"mid": {"use": "linear"}}})
    assert space["train.batch"] == Range(4, 12, step=4, int=True)


@pytest.mark.parametrize(
    ("space", "match"),
    [
        ({"train.lr": {"low": 2, "high": 1}}, "space.train.lr: found .*, expected low below high"),
        ({"train.lr": {"low": 0, "high": 1, "log": True}}, "with log, low is above 0"),
        ({"train.lr": {"low": 0, "high": 1, "step": 2}}, "step: found 2.0, expected above 0 and at most"),
        ({"train.batch": {"low": 0.5, "high": 2, "int": True}}, "with int, all numbers are whole"),
        ({"train.lr": {"low": 1, "hihg": 2}}, "expected {low: 1, high: 8}, a list of choices"),
        ({"train.lr": {"low": 1, "high": 2, "lg": True}}, "space.train.lr.lg: unknown option; did you mean 'log'"),
        ({"train.lr": [0.1]}, "expected two or more different choices"),
        ({"train.lr": [0.1, 0.1]}, "expected two or more different choices"),
        ({"losses.kd.weight": [1, True]}, "expected two or more different choices"),
        ({"train.lr": 3}, "expected {low: 1, high: 8}, a list of choices"),
        ({"seed": [0, 1]}, "space.seed: seed is the same in all trials of a search"),
        ({"train": [{"lr": 1}, {"lr": 2}]}, "train.monitor is the same in all trials"),
    ],
)
def test_a_space_that_means_nothing_is_refused(space: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        read_search(written(space=space))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({}, "there is no `space`"),
        ({"base": None, "space": SPACE}, "base: there is none"),
        ({"space": SPACE, "sampler": "tpf"}, "sampler: found 'tpf'; did you mean 'tpe'"),
        ({"space": SPACE, "pruner": "no"}, "pruner: found 'no'"),
        ({"space": SPACE, "trials": 0}, "trials: found 0, expected 1 or more"),
        ({"space": SPACE, "seeds": [1, 1]}, "names a seed twice"),
        ({"space": SPACE, "trails": 3}, "trails: unknown option; did you mean 'trials'"),
    ],
)
def test_a_file_that_means_nothing_is_refused(content: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        read_search(written(**content))


def test_a_config_becomes_a_search_by_a_space_on_the_command_line() -> None:
    search = read_search(Path("base.yaml"), space=["train.lr={low: 0.01, high: 1, log: true}"], trials=3)
    assert (search.name, search.base, search.trials) == ("base", Path("base.yaml"), 3)
    assert search.space == {"train.lr": Range(0.01, 1, log=True)}
    with pytest.raises(ConfigError, match=r"--space 'train\.lr': expected KEY=RANGE"):
        read_search(Path("base.yaml"), space=["train.lr"])


def test_overrides_that_the_search_says_itself_are_refused() -> None:
    read_search(written(space=SPACE), ["seed=3"])
    for override, content in (("name=x", {}), ("baseline=true", {}), ("seed=3", {"seeds": [0, 1]})):
        with pytest.raises(ConfigError, match="is what the search says"):
            read_search(written(space=SPACE, **content), [override])


def test_a_point_is_its_layers_over_the_base() -> None:
    space = read_search(written(space=SPACE)).space
    point = {
        "losses.kd.temperature": 3.0,
        "losses.kd.weight": 0.5,
        "losses.hint": "l1",
        "align": None,
        "train.batch": 8,
        "train.optimizer.use": "adamw",
    }
    assert [*layers_of(space, point)][2] == {"losses": {"hint": {"use": "l1"}}}
    assert fragment(space, point) == {
        "losses": {"kd": {"temperature": 3.0, "weight": 0.5}, "hint": {"use": "l1"}},
        "align": None,
        "train": {"batch": 8, "optimizer": {"use": "adamw"}},
    }


def test_the_base_is_a_point_if_it_lies_in_the_space() -> None:
    space = read_search(written(space={"train.lr": {"low": 0.01, "high": 1}, "train.batch": [12, 6]})).space
    assert own_point(load("base.yaml"), {}, space) == {"train.lr": 0.05, "train.batch": 12}
    for change in ("train.lr=2", "train.lr={use: cosine, peak: 0.1}", "train.batch=4"):
        assert own_point(load("base.yaml", [change]), {}, space) is None


def test_defaults_and_picked_components_are_a_part_of_the_point_that_the_base_is() -> None:
    write_config(Path("base.yaml"), DISTIL, {"losses": {"hint": {"weight": None}}})
    space = {"losses.hint.weight": {"low": 0, "high": 2}, "losses.kd": {"pick": ["dkd", "kd"]}}
    ground = check_search(read_search(written(space=space)), quiet())
    assert ground.own == {"losses.hint.weight": 1.0, "losses.kd": "kd"}


def test_the_paths_in_choices_are_relative_to_the_file_of_the_search(tmp_path: Path) -> None:
    space = read_search(written(space={"teachers.wide.run": ["a.yaml", "b.yaml"]})).space["teachers.wide.run"]
    assert isinstance(space, Choices)
    assert space.values["a.yaml"] == {"extends": str(tmp_path / "a.yaml")}


def test_what_cannot_be_planned_is_refused_with_its_point() -> None:
    write_config(Path("base.yaml"), DISTIL)
    search = read_search(written(space={"losses.kd.temprature": {"low": 1, "high": 2}}))
    with pytest.raises(ConfigError, match=r"space: with losses.kd.temprature=1.0: .*did you mean 'temperature'"):
        check_search(search, quiet())
    search = read_search(written(space={"losses.kd": {"pick": ["kd", "no_such_loss"]}}))
    with pytest.raises(PluginError, match=r"space: with losses\.kd=no_such_loss"):
        check_search(search, quiet())


def test_a_precision_that_each_trial_would_measure_is_refused() -> None:
    write_config(Path("base.yaml"), DISTIL)
    space = {"losses.kd.temperature": {"low": 1, "high": 2}}
    with pytest.raises(ConfigError, match=r"^runtime.precision: found 'auto', .* expected one of fp32, bf16, fp16"):
        check_search(read_search(written(space=space), ["runtime=auto"]), quiet())
    search = read_search(written(space={"runtime.precision": ["fp32", "auto"]}))
    with pytest.raises(ConfigError, match=r"space: with runtime.precision=auto: runtime.precision: found 'auto'"):
        check_search(search, quiet())


@pytest.mark.slow
@pytest.mark.parametrize("path", SEARCHES, ids=lambda path: path.stem)
def test_every_shipped_search_can_be_planned_and_begins_with_its_base(path: Path) -> None:
    assert check_search(read_search(path), quiet()).own is not None


def test_without_a_validation_split_nothing_can_be_searched() -> None:
    search = read_search(written(space={"train.lr": [0.1, 0.2]}), ["data.validation=0"])
    with pytest.raises(ConfigError, match="there is no validation split to judge trials by"):
        check_search(search, quiet())


def test_trials_lie_in_the_folder_of_the_search_and_have_no_test_split() -> None:
    search = read_search(written(space={"train.lr": [0.1, 0.2]}), ["out=elsewhere"])
    ground = check_search(search, quiet())
    prepared = prepare_trial(search, ground, {"train.lr": 0.2}, 0, quiet())
    assert prepared.splits.test is None
    assert prepared.plain is None
    assert prepared.folder == Path("elsewhere/search_tune/trials") / f"search-{prepared.hash}"
    assert prepared.spec.lr == 0.2
