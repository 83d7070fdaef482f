"""Config files: layers, overrides, interpolations, paths, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdx.config import given_text, load, load_mapping, overlay, parse_override, resolve, to_yaml
from kdx.errors import ConfigError


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_is_laid_over_the_one_it_extends(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "seed: 1\ntrain: {epochs: 5, batch: 64}\n")
    top = write(tmp_path / "top.yaml", "extends: base.yaml\ntrain: {epochs: 9}\n")
    assert load(top) == {"name": "top", "seed": 1, "train": {"epochs": 9, "batch": 64}}


def test_later_files_of_extends_lie_over_earlier_ones(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "seed: 1\nout: a\n")
    write(tmp_path / "b.yaml", "seed: 2\n")
    top = write(tmp_path / "top.yaml", "extends: [a.yaml, b.yaml]\n")
    assert load(top) == {"name": "top", "seed": 2, "out": "a"}


def test_extends_is_relative_to_the_file_that_says_it(tmp_path: Path) -> None:
    write(tmp_path / "base" / "deep.yaml", "seed: 3\n")
    write(tmp_path / "base" / "data.yaml", "extends: deep.yaml\n")
    top = write(tmp_path / "runs" / "top.yaml", "extends: ../base/data.yaml\n")
    assert load(top)["seed"] == 3


def test_files_that_extend_each_other_are_refused_with_the_chain(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "extends: b.yaml\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\n")
    with pytest.raises(ConfigError, match=r"in a circle: a.yaml -> b.yaml -> a.yaml"):
        load(tmp_path / "a.yaml")


def test_two_files_may_extend_the_same_one(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "seed: 7\n")
    write(tmp_path / "a.yaml", "extends: base.yaml\n")
    write(tmp_path / "b.yaml", "extends: base.yaml\n")
    assert load(write(tmp_path / "top.yaml", "extends: [a.yaml, b.yaml]\n"))["seed"] == 7


def test_a_run_is_called_as_its_own_file_and_not_as_one_that_it_extends(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "name: famous\n")
    assert load(write(tmp_path / "mine.yaml", "extends: base.yaml\n"))["name"] == "mine"
    assert load(write(tmp_path / "other.yaml", "extends: base.yaml\nname: own\n"))["name"] == "own"


def test_a_mapping_that_extends_a_file_keeps_its_name(tmp_path: Path) -> None:
    write(tmp_path / "teacher.yaml", "seed: 1\n")
    config = load_mapping({"extends": "teacher.yaml", "seed": 2}, tmp_path)
    assert config == {"name": "teacher", "seed": 2}


def test_load_mapping_leaves_its_argument_alone(tmp_path: Path) -> None:
    write(tmp_path / "teacher.yaml", "seed: 1\n")
    config = {"extends": "teacher.yaml", "plugins": ["mine.py"]}
    load_mapping(config, tmp_path)
    assert config == {"extends": "teacher.yaml", "plugins": ["mine.py"]}


@pytest.mark.parametrize("extends", [3, [3], {"a": "b"}])
def test_extends_must_be_a_path_or_a_list_of_paths(extends: Any) -> None:
    with pytest.raises(ConfigError, match=r"^extends: expected a path or a list of paths, found "):
        load_mapping({"extends": extends})


# --- laying one config over another


def test_overlay_merges_mappings_and_replaces_values() -> None:
    below = {"losses": {"kd": {"use": "kd", "temperature": 4}, "ce": {"use": "cross_entropy"}}}
    above = {"losses": {"kd": {"temperature": 2}}}
    assert overlay(below, above) == {"losses": {"kd": {"use": "kd", "temperature": 2}, "ce": {"use": "cross_entropy"}}}


def test_null_removes_a_key() -> None:
    assert overlay({"a": 1, "b": {"c": 2, "d": 3}}, {"a": None, "b": {"c": None}}) == {"b": {"d": 3}}


def test_null_removes_a_key_of_the_file_that_a_run_extends(tmp_path: Path) -> None:
    write(tmp_path / "teacher.yaml", "train: {epochs: 3, lr: 0.1}\nlosses: {ce: {use: cross_entropy}}\n")
    top = write(tmp_path / "top.yaml", "teachers: {big: {run: teacher.yaml}}\n")
    changed = load(top, ["teachers.big.run.train.epochs=null", "teachers.big.run.train.updates=2"])
    run = load_mapping(changed["teachers"]["big"]["run"])
    assert run["train"] == {"updates": 2, "lr": 0.1}


def test_null_removes_a_key_that_is_not_there() -> None:
    assert overlay({"a": 1}, {"b": None, "c": {"d": None}}) == {"a": 1, "c": {}}


def test_a_changed_use_starts_the_node_afresh() -> None:
    below = {"losses": {"kd": {"use": "kd", "temperature": 4, "weight": 2}}}
    above = {"losses": {"kd": {"use": "mse_logits"}}}
    assert overlay(below, above) == {"losses": {"kd": {"use": "mse_logits"}}}


def test_the_same_use_merges() -> None:
    below = {"use": "kd", "temperature": 4}
    assert overlay({"kd": below}, {"kd": {"use": "kd", "weight": 1}}) == {"kd": {**below, "weight": 1}}


def test_a_use_over_a_schedule_or_a_number_replaces_it() -> None:
    schedule = {"use": "linear", "start": 1, "end": 0}
    assert overlay({"weight": 3}, {"weight": schedule}) == {"weight": schedule}
    assert overlay({"weight": schedule}, {"weight": 3}) == {"weight": 3}


def test_a_run_of_another_file_starts_afresh(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "teachers:\n  big: {run: {extends: a.yaml, train: {epochs: 3}}, taps: {mid: 2}}\n")
    top = write(tmp_path / "top.yaml", "extends: base.yaml\nteachers: {big: {run: b.yaml}}\n")
    big = load(top)["teachers"]["big"]
    assert big == {"run": {"extends": str(tmp_path / "b.yaml")}, "taps": {"mid": 2}}


def test_lists_are_replaced() -> None:
    assert overlay({"plugins": ["a", "b"]}, {"plugins": ["c"]}) == {"plugins": ["c"]}


def test_overlay_changes_neither_argument() -> None:
    below: dict[str, Any] = {"a": {"b": [1]}}
    above: dict[str, Any] = {"a": {"c": [2]}}
    laid = overlay(below, above)
    laid["a"]["c"].append(3)
    laid["a"]["d"] = 4
    assert below == {"a": {"b": [1]}}
    assert above == {"a": {"c": [2]}}


CONFIGS = st.recursive(
    st.one_of(st.integers(), st.booleans(), st.text("ab", max_size=2), st.lists(st.integers(), max_size=2)),
    lambda inner: st.dictionaries(st.sampled_from(["a", "b", "c", "use"]), inner, max_size=3),
    max_leaves=8,
)
MAPPINGS = st.dictionaries(st.sampled_from(["a", "b", "c"]), CONFIGS, max_size=3)


@given(MAPPINGS)
def test_a_config_laid_over_nothing_or_itself_is_itself(config: dict[str, Any]) -> None:
    assert overlay({}, config) == config
    assert overlay(config, {}) == config
    assert overlay(config, config) == config


@given(MAPPINGS, MAPPINGS)
def test_everything_that_the_upper_config_says_holds(below: dict[str, Any], above: dict[str, Any]) -> None:
    def holds(said: Any, found: Any) -> bool:
        if isinstance(said, dict):
            return isinstance(found, dict) and all(key in found and holds(said[key], found[key]) for key in said)
        return bool(said == found)

    assert holds(above, overlay(below, above))


# --- overrides


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed=3", {"seed": 3}),
        ("losses.kd.temperature=2.5", {"losses": {"kd": {"temperature": 2.5}}}),
        ("train.lr=1e-3", {"train": {"lr": 0.001}}),
        ("runtime.compile=true", {"runtime": {"compile": True}}),
        ("losses.hint=null", {"losses": {"hint": None}}),
        ("losses.hint=", {"losses": {"hint": None}}),
        ("plugins=[a.py, b.py]", {"plugins": ["a.py", "b.py"]}),
        ("train.lr={use: cosine, peak: 0.1}", {"train": {"lr": {"use": "cosine", "peak": 0.1}}}),
        ("name=a=b", {"name": "a=b"}),
        ("name='3'", {"name": "3"}),
        (" seed = 3", {"seed": 3}),
    ],
)
def test_the_value_of_an_override_is_yaml(text: str, expected: dict[str, Any]) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["seed", "=3", "losses..kd=1", ".seed=1", ""])
def test_an_override_without_a_key_and_a_value_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"override .* expected key=value with a dotted key"):
        parse_override(text)


def test_an_override_whose_value_is_no_yaml_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"override 'plugins=\[a' *: the value is not valid YAML"):
        parse_override("plugins=[a")


def test_overrides_lie_over_the_file_in_their_order(tmp_path: Path) -> None:
    top = write(tmp_path / "top.yaml", "losses: {kd: {use: kd}, ce: {use: cross_entropy}}\n")
    config = load(top, ["losses.kd=null", "seed=1", "seed=2"])
    assert config == {"name": "top", "losses": {"ce": {"use": "cross_entropy"}}, "seed": 2}


def test_a_path_in_an_override_is_relative_to_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = write(tmp_path / "configs" / "top.yaml", "student: {use: timm}\n")
    monkeypatch.chdir(tmp_path)
    config = load(top, ["student.checkpoint=weights.pt", "plugins=[mine.py]"])
    assert config["student"]["checkpoint"] == str(tmp_path / "weights.pt")
    assert config["plugins"] == [str(tmp_path / "mine.py")]


def test_the_text_that_a_run_keeps_holds_the_file_and_the_overrides(tmp_path: Path) -> None:
    top = write(tmp_path / "top.yaml", "seed: 1  # mine\n")
    assert given_text(top, ["seed=2"]) == "seed: 1  # mine\n# changed on the command line: seed=2\n"


# --- interpolations


def test_an_interpolation_gives_the_value_after_all_layers(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "train: {batch: 64}\nruntime: {eval_batch: '${train.batch}'}\n")
    top = write(tmp_path / "top.yaml", "extends: base.yaml\n")
    assert load(top, ["train.batch=32"])["runtime"]["eval_batch"] == 32


def test_an_interpolation_that_names_nothing_is_refused_with_its_place() -> None:
    with pytest.raises(ConfigError, match=r"^train.batch: Interpolation key 'nothing.here' not found$"):
        resolve({"train": {"batch": "${nothing.here}"}})


def test_interpolations_that_name_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="Recursive interpolation detected"):
        resolve({"a": "${b}", "b": "${a}"})


# --- paths


def test_paths_come_out_absolute_from_the_file_that_names_them(tmp_path: Path) -> None:
    write(
        tmp_path / "base" / "teachers.yaml",
        "plugins: [mine.py, some.module]\n"
        "student: {use: timm, checkpoint: start.pt}\n"
        "teachers:\n"
        "  a: {run: cnn.yaml}\n"
        "  b: {run: {extends: vit.yaml, seed: 1, student: {checkpoint: w.pt}}}\n"
        "  c: {run: {extends: [x.yaml, y.yaml]}}\n"
        "  d: {use: run, folder: runs/old}\n"
        "  e: {use: onnx, path: net.onnx}\n",
    )
    config = load(write(tmp_path / "top.yaml", "extends: base/teachers.yaml\n"))
    base = tmp_path / "base"
    assert config["plugins"] == [str(base / "mine.py"), "some.module"]
    assert config["student"]["checkpoint"] == str(base / "start.pt")
    assert config["teachers"]["a"] == {"run": {"extends": str(base / "cnn.yaml")}}
    assert config["teachers"]["b"]["run"] == {
        "extends": str(base / "vit.yaml"), "seed": 1, "student": {"checkpoint": str(base / "w.pt")},
    }  # fmt: skip
    assert config["teachers"]["c"]["run"]["extends"] == [str(base / "x.yaml"), str(base / "y.yaml")]
    assert config["teachers"]["d"]["folder"] == str(base / "runs" / "old")
    assert config["teachers"]["e"]["path"] == str(base / "net.onnx")


def test_a_path_that_starts_with_an_interpolation_is_left_to_it(tmp_path: Path) -> None:
    top = write(tmp_path / "top.yaml", "out: /elsewhere\nstudent: {checkpoint: '${out}/w.pt'}\n")
    assert load(top)["student"]["checkpoint"] == "/elsewhere/w.pt"


def test_a_config_that_was_loaded_loads_as_itself(tmp_path: Path) -> None:
    top = write(tmp_path / "top.yaml", "plugins: [a.py]\nteachers: {a: {run: cnn.yaml}}\nstudent: {checkpoint: w.pt}\n")
    config = load(top)
    assert load_mapping(config) == config


# --- reading


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("1E-3", 0.001), ("-2e5", -2e5), ("+1e3", 1000.0), (".5", 0.5), ("1.", 1.0), ("3", 3)],
)
def test_scientific_numbers_are_numbers(tmp_path: Path, text: str, value: float) -> None:
    found = load(write(tmp_path / "top.yaml", f"lr: {text}\n"))["lr"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["e5", "1e", "v1e-3", "layer3.1"])
def test_words_that_look_a_little_like_numbers_stay_words(tmp_path: Path, text: str) -> None:
    assert load(write(tmp_path / "top.yaml", f"tap: {text}\n"))["tap"] == text


def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    top = write(tmp_path / "top.yaml", "losses:\n  kd: {use: kd}\n  kd: {use: dkd}\n")
    with pytest.raises(ConfigError, match=r"top.yaml is not valid YAML: the key 'kd' stands twice .*line 3"):
        load(top)


def test_yaml_merge_keys_are_read(tmp_path: Path) -> None:
    top = write(tmp_path / "top.yaml", "a: &net {use: timm, model: x}\nb:\n  <<: *net\n  model: y\n")
    assert load(top)["b"] == {"use": "timm", "model": "y"}


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: caf\xe9\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin.yaml is not UTF-8 text"):
        load(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read config .*gone.yaml: No such file"):
        load(tmp_path / "gone.yaml")


def test_an_extended_file_that_is_not_there_says_who_extends_it(tmp_path: Path) -> None:
    top = write(tmp_path / "top.yaml", "extends: gone.yaml\n")
    with pytest.raises(ConfigError, match=r"cannot read config .*gone.yaml \(extended by .*top.yaml\)"):
        load(top)


def test_a_folder_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read config .*: Is a directory"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n", "1: {use: kd}\n"])
def test_a_config_is_a_mapping_with_names(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="expected a mapping with named sections at the top"):
        load(write(tmp_path / "top.yaml", text))


def test_text_that_is_no_yaml_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"top.yaml is not valid YAML: .*line 1"):
        load(write(tmp_path / "top.yaml", "losses: [a\n"))


def test_an_empty_file_is_an_empty_config(tmp_path: Path) -> None:
    assert load(write(tmp_path / "nothing.yaml", "# later\n")) == {"name": "nothing"}


def test_a_value_that_no_config_can_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^out: Value 'date' is not a supported primitive type$"):
        load(write(tmp_path / "top.yaml", "out: 2020-01-01\n"))


def test_yaml_that_was_written_reads_as_the_same_config(tmp_path: Path) -> None:
    config = {"name": "été", "train": {"lr": 1e-05, "optimizer": {"use": "sgd"}}, "plugins": ["a", "b"], "seed": 3}
    assert load(write(tmp_path / "top.yaml", to_yaml(config))) == config
