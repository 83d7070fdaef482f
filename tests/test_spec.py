"""The meaning of a config: what `check` understands, and what it refuses and how."""

from __future__ import annotations

from typing import Any

import pytest
from builders import NET, PLAIN, registry, spec_of

from kdx.components import Knob, Schedule
from kdx.config import load_mapping, overlay, resolve, to_yaml
from kdx.errors import ConfigError, KdxError, PluginError
from kdx.plugins import discover
from kdx.spec import check, full_config, read_knob
from kdx.types import Clock

KD = {"teachers": {"big": NET}, "losses": {"kd": {"use": "kd"}}}
HINT = {
    "student": {"taps": {"mid": 3}},
    "teachers": {"big": {**NET, "taps": {"mid": 3}}},
    "align": {"mid": {"source": "student.mid", "like": "big.mid"}},
    "losses": {"hint": {"use": "mse", "inputs": {"student": "mid", "teacher": "big.mid"}}},
}


def refusal(*layers: dict[str, Any]) -> str:
    with pytest.raises(KdxError) as caught:
        spec_of(*layers)
    return str(caught.value)


# --- what is understood


def test_a_short_config_gets_defaults() -> None:
    spec = spec_of()
    assert spec.train.optimizer == {"use": "sgd", "momentum": 0.9}
    assert spec.updater.entry.component.name == "plain"
    assert [part.name for part in spec.metrics] == ["classification"]
    assert spec.lr == 0.05
    assert spec.losses["ce"].knobs == {"weight": 1.0}
    assert spec.losses["ce"].inputs == {"student": "student.logits", "label": "batch.label"}


def test_a_knob_may_be_a_constant_a_schedule_or_a_ref() -> None:
    spec = spec_of(
        KD,
        {"losses": {"kd": {"temperature": 2, "weight": {"use": "linear", "start": 0, "end": 1}}}},
        {"targets": {"tau": {"use": "entropy_temperature"}}, "losses": {"other": {"use": "kd", "temperature": "tau"}}},
    )
    kd = spec.losses["kd"].knobs
    assert kd["temperature"] == 2.0
    assert isinstance(kd["weight"], Schedule)
    assert kd["weight"].at(Clock(5, 1, 10)) == 0.5
    assert spec.losses["other"].knobs == {"temperature": "tau", "weight": 1.0}


def test_an_aligner_takes_its_ends_at_the_top_of_its_section_and_is_auto_by_default() -> None:
    node = spec_of(HINT).align["mid"]
    assert node.entry.component.name == "auto"
    assert node.inputs == {"source": "student.mid", "like": "big.mid"}


def test_an_input_that_takes_many_refs_may_be_given_one() -> None:
    masked = {"losses": {"m": {"use": "masked", "inputs": {"logits": "student.logits"}}}}
    assert spec_of(masked).losses["m"].inputs == {"logits": ("student.logits",), "mask": None}


def test_two_instances_of_one_loss_keep_their_own_options() -> None:
    spec = spec_of(KD, {"losses": {"soft": {"use": "kd", "temperature": 8.0}}})
    assert (spec.losses["kd"].knobs["temperature"], spec.losses["soft"].knobs["temperature"]) == (4.0, 8.0)


def test_nodes_may_train_their_parameters_differently() -> None:
    node = spec_of(HINT, {"align": {"mid": {"lr_scale": 0.1, "weight_decay": 0}}}).align["mid"]
    assert (node.engine.lr_scale, node.engine.weight_decay) == (0.1, 0.0)


def test_the_full_config_has_every_default_and_checks_as_the_same_run() -> None:
    spec = spec_of(
        HINT,
        {
            "targets": {"tau": {"use": "entropy_temperature", "high": 3}},
            "losses": {
                "kd": {"use": "kd", "temperature": "tau", "weight": {"use": "linear", "start": 0, "end": 1}},
                "reused": {"use": "reused", "borrows": {"head": "big.fc"}},
            },
            "metrics": {"mine": {"use": "classification"}},
            "train": {"lr": {"use": "cosine", "peak": 0.1}, "clip": 1.0},
        },
    )
    full = full_config(spec)
    assert full["losses"]["kd"]["lr_scale"] == 1.0
    assert full["runtime"]["precision"] == "fp32"
    again = check(load_mapping(full), registry())
    assert full_config(again) == full
    assert {name: vars(node) | {"knobs": None} for name, node in again.nodes.items()} == {
        name: vars(node) | {"knobs": None} for name, node in spec.nodes.items()
    }
    assert resolve(load_mapping(full)) == load_mapping(full)
    assert "!!python" not in to_yaml(full)


# --- unknown keys at every level


@pytest.mark.parametrize(
    ("layer", "start", "near"),
    [
        ({"losess": {}}, "losess: unknown option", "losses"),
        ({"train": {"epoch": 3}}, "train.epoch: unknown option", "epochs"),
        ({"runtime": {"devise": "cpu"}}, "runtime.devise: unknown option", "device"),
        ({"data": {"validaton": 3}}, "data.validaton: tensors (plugin kdx.builtin) has no such option", "validation"),
        ({"data": {"agument": {}}}, "data.agument: tensors (plugin kdx.builtin) has no such option", "augment"),
        ({"student": {"modle": "x"}}, "student.modle: timm has no such option", "model"),
        ({"student": {"tap": {}}}, "student.tap: timm has no such option", "taps"),
        ({"teachers": {"big": {**NET, "cheekpoint": "x"}}}, "teachers.big.cheekpoint: timm has no", "checkpoint"),
        ({"losses": {"ce": {"wieght": 1}}}, "losses.ce.wieght: cross_entropy (plugin kdx.builtin) has", "weight"),
        ({"losses": {"kd": {"use": "kd", "temprature": 1}}}, "losses.kd.temprature: kd (plugin kdx_", "temperature"),
        ({"losses": {"ce": {"lrscale": 1}}}, "losses.ce.lrscale: cross_entropy", "lr_scale"),
        ({"losses": {"ce": {"inputs": {"labels": "x"}}}}, "losses.ce.inputs.labels: cross_entropy reads no", "label"),
        ({"align": {"a": {"use": "linear", "sorce": "x"}}}, "align.a.sorce: linear (plugin kdx.b", "source"),
        ({"metrics": {"classification": {"bin": 3}}}, "metrics.classification.bin: classification", "bins"),
        ({"train": {"updater": {"use": "plain", "x": 3}}}, "train.updater.x: plain (plugin kdx.builtin) has", None),
        ({"train": {"lr": {"use": "cosine", "peek": 3}}}, "train.lr.peek: cosine (plugin kdx.builtin)", "peak"),
        ({"train": {"optimizer": {"use": "sgd", "momentun": 1}}}, "train.optimizer.momentun: sgd has no", "momentum"),
        ({"losses": {"r": {"use": "reused", "borrows": {"haed": "x.y"}}}}, "losses.r.borrows.haed: reused b", "head"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_refused_at_every_level_with_the_nearest_one(
    layer: dict[str, Any], start: str, near: str | None
) -> None:
    message = refusal(layer)
    assert message.startswith(start)
    assert near is None or f"did you mean '{near}'?" in message


def test_only_a_target_is_told_that_it_may_be_stored() -> None:
    assert "alpha, beta, divergence" in refusal({"losses": {"kd": {"use": "kd", "cach": True}}})
    assert "did you mean 'cache'?" in refusal({"targets": {"all": {"use": "mean", "cach": True}}})


# --- wrong types


@pytest.mark.parametrize(
    ("layer", "start"),
    [
        ({"seed": "one"}, "seed: found 'one', expected int"),
        ({"losses": 3}, "losses: found 3, expected a mapping of options"),
        ({"plugins": "mine.py"}, "plugins: found 'mine.py', expected list[str]"),
        ({"train": {"batch": "big"}}, "train.batch: found 'big', expected int"),
        ({"train": {"batch": 12.5}}, "train.batch: found 12.5, expected int"),
        ({"train": {"weight_decay": True}}, "train.weight_decay: found True, expected float"),
        ({"data": {"labelled": "all"}}, "data.labelled: found 'all', expected int | float | None"),
        ({"data": 3}, "data: found 3, expected a mapping of options"),
        ({"student": {"args": [1]}}, "student.args: found [1], expected a mapping of options (timm, plugin"),
        ({"student": {"taps": [1]}}, "student.taps: found [1], expected a mapping of options"),
        ({"teachers": {"big": 3}}, "teachers.big: found 3, expected a mapping of options"),
        ({"runtime": "automatic"}, "runtime: found 'automatic', expected auto, or a mapping of options"),
        ({"losses": {"ce": "cross_entropy"}}, "losses.ce: found 'cross_entropy', expected a mapping of options"),
        ({"losses": {"ce": {"inputs": "logits"}}}, "losses.ce.inputs: found 'logits', expected a mapping"),
        ({"losses": {"ce": {"inputs": {"label": 3}}}}, "losses.ce.inputs.label: found 3, expected one ref"),
        ({"losses": {"ce": {"inputs": {"label": ["a", "b"]}}}}, "losses.ce.inputs.label: found ['a', 'b'], expected"),
        ({"losses": {"m": {"use": "masked", "inputs": {"logits": [1]}}}}, "losses.m.inputs.logits: found [1], exp"),
        ({"losses": {"m": {"use": "masked", "inputs": {"logits": []}}}}, "losses.m.inputs.logits: found [], exp"),
        ({"losses": {"r": {"use": "reused", "borrows": 3}}}, "losses.r.borrows: found 3, expected a mapping"),
        ({"losses": {"r": {"use": "reused", "borrows": {"head": 3}}}}, "losses.r.borrows.head: found 3, expected"),
        ({"losses": {"ce": {"label_smoothing": "x"}}},
         "losses.ce.label_smoothing: found 'x', expected float (cross_entropy, plugin kdx.builtin)"),
        ({"losses": {"ce": {"lr_scale": "x"}}}, "losses.ce.lr_scale: found 'x', expected float"),
        ({"metrics": {"classification": 3}}, "metrics.classification: found 3, expected a mapping"),
        ({"train": {"optimizer": "sgd"}}, "train.optimizer: found 'sgd', expected a mapping of options"),
    ],
)  # fmt: skip
def test_a_wrong_type_is_refused_with_place_finding_and_expectation(layer: dict[str, Any], start: str) -> None:
    assert refusal(layer).startswith(start)


# --- ranges


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"train": {"epochs": None}}, "train: say how long, with either `epochs` or `updates`"),
        ({"train": {"updates": 3}}, "train: say how long, with either `epochs` or `updates`"),
        ({"train": {"epochs": 0}}, "train.epochs: found 0.0, expected a number above 0"),
        ({"train": {"epochs": float("inf")}}, "train.epochs: found inf, expected a number above 0"),
        ({"train": {"epochs": float("nan")}}, "train.epochs: found nan, expected a number above 0"),
        ({"train": {"epochs": None, "updates": 0}}, "train.updates: found 0, expected a whole number from 1"),
        ({"train": {"batch": 0}}, "train.batch: found 0, expected a whole number from 1"),
        ({"train": {"accumulate": 3}}, "train.accumulate: found 3, expected a divisor of train.batch (4)"),
        ({"train": {"evaluate": 0}}, "train.evaluate: found 0, expected a whole number from 1"),
        ({"train": {"save": -1}}, "train.save: found -1, expected a whole number from 1"),
        ({"train": {"calibration": 0}}, "train.calibration: found 0, expected a whole number from 1"),
        ({"train": {"steps_per_epoch": 0}}, "train.steps_per_epoch: found 0, expected a whole number from 1"),
        ({"train": {"weight_decay": -1}}, "train.weight_decay: found -1.0, expected 0 or more"),
        ({"train": {"clip": 0}}, "train.clip: found 0.0, expected a norm above 0"),
        ({"train": {"ema": 1}}, "train.ema: found 1.0, expected a decay between 0 and 1"),
        ({"runtime": {"workers": -1}}, "runtime.workers: found -1, expected 0 or more"),
        ({"runtime": {"threads": 0}}, "runtime.threads: found 0, expected a whole number from 1"),
        ({"runtime": {"precision": "fp8"}}, "runtime.precision: found 'fp8', expected one of auto, fp32, bf16, fp16"),
        ({"seed": -1}, "seed: found -1, expected 0 or more"),
        ({"losses": {"ce": {"lr_scale": -1}}}, "losses.ce: lr_scale and weight_decay are 0 or more"),
        ({"losses": {"ce": {"weight_decay": -1}}}, "losses.ce: lr_scale and weight_decay are 0 or more"),
    ],
)
def test_a_number_out_of_its_range_is_refused(layer: dict[str, Any], message: str) -> None:
    assert refusal(layer).startswith(message)


# --- what is missing


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"data": {"use": None}}, "data: it says no `use:`"),
        ({"student": None}, "student: there is none; expected a model"),
        ({"student": {"use": 3}}, "student: it says no `use:`"),
        ({"student": {"model": None}}, "student.model: it is missing (timm, plugin kdx.builtin); expected str"),
        ({"teachers": {"big": {"model": "x"}}}, "teachers.big: it says no `use:`"),
        ({"losses": None}, "losses: there are none, so nothing would be learnt"),
        ({"losses": {"kd": {"temperature": 3}}}, "losses.kd: it says no `use:`"),
        ({"losses": {"kd": {"use": 3}}}, "losses.kd: it says no `use:`"),
        ({"targets": {"t": {}}}, "targets.t: it says no `use:`"),
        ({"losses": {"hint": {"use": "mse"}}}, "losses.hint.inputs.student: mse needs a ref here, as in student.mid"),
        ({"align": {"a": {"source": "student.mid"}}}, "align.a.like: auto needs a ref here"),
        ({"train": {"updater": {"x": 1}}}, "train.updater: it says no `use:`"),
        ({"train": {"optimizer": {"momentum": 0.9}}}, "train.optimizer: it says no `use:`"),
        ({"train": {"lr": {"peak": 0.1}}}, "train.lr: it says no `use:`"),
        ({"losses": {"ce": {"weight": {"start": 0.1}}}}, "losses.ce.weight: it says no `use:`"),
        ({"train": {"lr": {"use": "cosine"}}}, "train.lr.peak: it is missing (cosine, plugin kdx.builtin)"),
    ],
)
def test_what_is_missing_is_named(layer: dict[str, Any], message: str) -> None:
    assert refusal(layer).startswith(message)


# --- names


@pytest.mark.parametrize("section", ["teachers", "targets", "align"])
@pytest.mark.parametrize("name", ["student", "batch", "losses"])
def test_a_name_that_refs_use_already_is_refused(section: str, name: str) -> None:
    node: dict[str, Any] = {
        "teachers": NET,
        "targets": {"use": "pass", "inputs": {"x": "student.logits"}},
        "align": {"source": "student.logits", "like": "student.logits"},
    }[section]
    assert refusal({section: {name: node}}).startswith(f"{section}.{name}: the name '{name}' is taken by")


def test_a_name_used_in_two_sections_is_refused_with_both() -> None:
    clash = {"teachers": {"mid": NET}, "targets": {"mid": {"use": "pass", "inputs": {"x": "student.logits"}}}}
    assert refusal(clash).startswith("targets.mid: the name 'mid' is taken by teachers.mid; refs would be ambiguous")


def test_a_loss_may_be_called_as_a_node() -> None:
    spec = spec_of(HINT, {"losses": {"mid": {"use": "cross_entropy"}}})
    assert {"mid"} == set(spec.align) & set(spec.losses)


@pytest.mark.parametrize("name", ["my teacher", "a.b", "3d", "*", "a@b"])
def test_a_name_that_cannot_be_part_of_a_ref_is_refused(name: str) -> None:
    assert refusal({"teachers": {name: NET}}).startswith(f"teachers.{name}: '{name}' cannot be part of a ref")
    assert refusal({"losses": {name: {"use": "cross_entropy"}}}).startswith(f"losses.{name}: '{name}' is no valid name")


@pytest.mark.parametrize("name", ["a/b", "a\\b", ".hidden", ""])
def test_a_name_that_cannot_be_a_folder_is_refused(name: str) -> None:
    assert refusal({"name": name}) == f"name: {name!r} cannot be a folder name"


# --- components


def test_an_unknown_component_is_refused_with_a_similar_name() -> None:
    with pytest.raises(PluginError, match=r"^losses.ce.use: no losses component is named 'cros_entropy'; "
                       r"did you mean 'cross_entropy'\?"):  # fmt: skip
        spec_of({"losses": {"ce": {"use": "cros_entropy"}}})


def test_a_component_of_another_kind_is_pointed_out() -> None:
    message = refusal({"losses": {"kd": {"use": "entropy_temperature"}}})
    assert message.startswith("losses.kd.use: no losses component is named 'entropy_temperature'")
    assert message.endswith("'entropy_temperature' exists among the targets")


@pytest.mark.parametrize(
    ("layer", "where"),
    [
        ({"data": {"use": "mnits"}}, "data.use: no datasets component"),
        ({"student": {"use": "timmm"}}, "student.use: no models component"),
        ({"align": {"a": {"use": "conv1x2"}}}, "align.a.use: no aligners component"),
        ({"metrics": {"acuracy": {}}}, "metrics.acuracy.use: no metrics component"),
        ({"train": {"updater": {"use": "plane"}}}, "train.updater.use: no updaters component"),
        ({"train": {"lr": {"use": "cosin", "peak": 1}}}, "train.lr.use: no schedules component is named 'cosin'; "
         "did you mean 'cosine'?"),
        ({"train": {"optimizer": {"use": "sgdd"}}}, "train.optimizer.use: no optimizer is named 'sgdd'"),
    ],
)  # fmt: skip
def test_an_unknown_component_is_refused_in_every_section(layer: dict[str, Any], where: str) -> None:
    assert refusal(layer).startswith(where)


def test_the_student_need_not_say_that_it_is_trained() -> None:
    assert refusal({"student": {"trainable": True}}).startswith("student.trainable: the student is always trained")


# --- knobs


@pytest.mark.parametrize("value", [True, False])
def test_a_truth_value_is_no_number(value: bool) -> None:
    assert refusal(KD, {"losses": {"kd": {"temperature": value}}}) == (
        f"losses.kd.temperature: found {value}, expected a number, a schedule or a ref"
    )


@pytest.mark.parametrize("value", [[1, 2], None])
def test_anything_but_a_number_a_schedule_or_a_ref_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^here: found .*, expected a number, a schedule or a ref"):
        read_knob(value, Knob(1.0), "here", registry())


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"temperature": 0}, "losses.kd.temperature: found 0; it must be above 0"),
        ({"temperature": -1.5}, "losses.kd.temperature: found -1.5; it must be above 0"),
        ({"temperature": float("inf")}, "losses.kd.temperature: found inf; it must be a finite number"),
        ({"weight": float("nan")}, "losses.kd.weight: found nan; it must be a finite number"),
    ],
)
def test_a_constant_out_of_the_range_of_its_knob_is_refused(layer: dict[str, Any], message: str) -> None:
    assert refusal(KD, {"losses": {"kd": layer}}) == message


def test_a_weight_may_be_negative_or_zero() -> None:
    weights = spec_of({"losses": {"ce": {"weight": -1}, "off": {"use": "cross_entropy", "weight": 0}}}).losses
    assert [weights[name].knobs["weight"] for name in ("ce", "off")] == [-1.0, 0.0]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"use": "linear", "start": 0, "end": 4}, "linear gives 0 after 0 of 400 epochs; it must be above 0"),
        ({"use": "linear", "start": 4, "end": -4}, "linear gives 0 after 200 of 400 epochs; it must be above 0"),
        ({"use": "constant", "value": 4, "warmup": 2}, "constant gives 0 after 0 of 400 epochs; it must be above 0"),
    ],
)
def test_a_schedule_that_leaves_the_range_of_its_knob_is_refused(schedule: dict[str, Any], message: str) -> None:
    assert refusal(KD, {"losses": {"kd": {"temperature": schedule}}}) == f"losses.kd.temperature: {message}"


def test_a_schedule_that_refuses_its_options_says_where() -> None:
    message = refusal({"train": {"lr": {"use": "cosine", "peak": 0.1, "warmup": -1}}})
    assert message.startswith("train.lr: warmup: found -1.0, expected a number of epochs from 0")


def test_the_learning_rate_is_no_ref_and_not_negative() -> None:
    assert refusal({"train": {"lr": "tau"}}) == "train.lr: found the ref 'tau', expected a number or a schedule"
    assert refusal({"train": {"lr": -0.1}}) == "train.lr: found -0.1; it must be at least 0"


def test_check_does_not_change_the_config_that_it_reads() -> None:
    config = load_mapping(overlay(PLAIN, HINT))
    before = to_yaml(config)
    check(config, registry())
    assert to_yaml(config) == before


def test_a_plain_supervised_config_needs_no_plugin() -> None:
    spec = check(load_mapping(PLAIN), discover(installed=False))
    assert spec.losses["ce"].entry.plugin.name == "kdx.builtin"
