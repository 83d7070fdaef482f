"""Facts of nodes that borrow any number of parts: one of each teacher, or those that the config lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builders import FACTS, NET, batch, forward, plan_of, spec_of
from small_run import DISTIL, config_of, lines_of, quiet, run_in
from toy_plugin import TinyNet

from kdx.catalogue import component_rows
from kdx.config import load_mapping
from kdx.deploy import deployed
from kdx.errors import ConfigError, PlanError
from kdx.plan import Plan
from kdx.plugins import discover
from kdx.reach import Reach, reach
from kdx.runs import Prepared, prepare
from kdx.spec import check, full_config
from kdx.table import plan_text

PLUGIN = str(Path(__file__).parent / "many_parts_plugin.py")
JUDGES = discover([PLUGIN])
TWO: dict[str, Any] = {"teachers": {"one": NET, "two": NET}, "losses": {"judged": {"use": "judges"}}}
NETS = {"one": TinyNet(1, 32, 3), "two": TinyNet(1, 32, 3)}
SMALL = config_of(
    DISTIL,
    {
        "plugins": [*DISTIL["plugins"], PLUGIN],
        "student": {"width": 6},
        "teachers": {"wide": {"width": 6}, "other": {"use": "small", "width": 6}},
        "losses": {"kd": {"inputs": {"teacher": "wide.logits"}}, "judged": {"use": "judges"}},
        "train": {"updates": 2},
        "baseline": True,
    },
)
"""A student whose embedding the classifiers of two teachers take."""


def borrowing(*parts: str, use: str = "judges") -> dict[str, Any]:
    return {"losses": {"judged": {"use": use, "borrows": {"heads": list(parts)}}}}


def reached(*layers: dict[str, Any]) -> Reach:
    return reach(spec_of(TWO, *layers, plugins=JUDGES), FACTS)


def plan(*layers: dict[str, Any]) -> Plan:
    return plan_of(TWO, *layers, plugins=JUDGES, networks=NETS)


def test_a_star_borrows_a_part_of_each_teacher_in_their_order() -> None:
    found = reached()
    assert found.borrowed["losses.judged"] == {"heads": [("one", "classifier"), ("two", "classifier")]}
    assert found.models == ["student", "one", "two"]
    assert "one" not in found.order  # lends a part and is not run
    swapped = reached({"teachers": {"one": None}}, {"teachers": {"one": NET}})
    assert swapped.borrowed["losses.judged"] == {"heads": [("two", "classifier"), ("one", "classifier")]}


def test_a_config_may_list_the_parts_or_name_a_single_one() -> None:
    mixed = reached(borrowing("student.fc", "two.classifier"))
    assert mixed.borrowed["losses.judged"] == {"heads": [("student", "fc"), ("two", "classifier")]}
    assert mixed.models == ["student", "two"]
    single = reached({"losses": {"judged": {"borrows": {"heads": "one.fc"}}}})
    assert single.borrowed["losses.judged"] == {"heads": [("one", "fc")]}


def test_the_node_gets_a_list_of_parts_and_leaves_their_weights_alone() -> None:
    made = plan()
    call = next(call for call in made.loss_calls if call.name == "losses.judged")
    assert [part.module for part in call.borrowed] == [NETS["one"].head, NETS["two"].head]
    learner, losses = forward(made, batch())
    losses.parts["judged"].backward()
    assert made.student.network.net.conv1.weight.grad.any()
    assert all(weight.grad is None for net in NETS.values() for weight in net.parameters())
    own = {id(weight) for weight in learner.parameters()}
    assert not any(id(weight) in own for net in NETS.values() for weight in net.parameters())


def test_the_plan_says_that_the_parts_are_borrowed() -> None:
    assert "heads (borrowed)" in plan_text(plan())
    (row,) = [row for row in component_rows(JUDGES.find("losses", "judges", "x")) if row[0] == "part"]
    assert row == ("part", "heads", "parts of models", "*.classifier")


def test_the_full_config_loads_as_the_same_parts() -> None:
    spec = spec_of(TWO, borrowing("one.fc", "*.classifier"), plugins=JUDGES)
    full = full_config(spec)
    assert full["losses"]["judged"]["borrows"] == {"heads": ["one.fc", "*.classifier"]}
    assert check(full, JUDGES).losses["judged"].borrows == spec.losses["judged"].borrows


def understood(*layers: dict[str, Any]) -> Prepared:
    return prepare(load_mapping(config_of(SMALL, *layers)), quiet(), registry=discover(SMALL["plugins"]))


def test_a_star_has_the_hash_of_the_teachers_that_it_stands_for() -> None:
    star, listed, swapped = (
        understood(*layers).hash
        for layers in (
            (),
            (borrowing("wide.classifier", "other.classifier"),),
            (borrowing("other.classifier", "wide.classifier"),),
        )
    )
    assert star == listed
    assert star != swapped


def test_a_run_through_all_classifiers_trains_and_its_plain_student_has_no_such_loss(tmp_path: Path) -> None:
    result = run_in(tmp_path, SMALL)
    first, second = (line["terms"]["judged"] for line in lines_of(result.folder) if line["kind"] == "step")
    assert second < first
    plain = understood().plain
    assert plain is not None
    assert list(plain.spec.losses) == ["ce"]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            borrowing("one.classifier", "three.fc"),
            r"losses\.judged\.borrows\.heads: found 'three\.fc', expected a part",
        ),
        (borrowing("one"), r"losses\.judged\.borrows\.heads: found 'one', expected a part of a model"),
        ({"teachers": {"one": None, "two": None}}, r"losses\.judged\.borrows\.heads: \*\.classifier names no teacher"),
    ],
)
def test_parts_that_are_not_there_are_refused(layer: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        reached(layer)


@pytest.mark.parametrize("found", [[], [3], 3, {"a": "one.fc"}])
def test_what_is_no_list_of_parts_is_refused(found: Any) -> None:
    with pytest.raises(ConfigError, match=r"losses\.judged\.borrows\.heads: found .*, expected a list of parts of mo"):
        spec_of(TWO, {"losses": {"judged": {"borrows": {"heads": found}}}}, plugins=JUDGES)


def test_each_part_that_a_node_trains_must_be_one_that_is_trained() -> None:
    with pytest.raises(
        PlanError, match=r"training_judges trains this part, but two\.classifier belongs to two, which is"
    ):
        plan(borrowing("student.classifier", "two.classifier", use="training_judges"))
    made = plan(borrowing("student.classifier", use="training_judges"))
    _, losses = forward(made, batch())
    losses.parts["judged"].backward()
    assert made.student.network.net.fc.weight.grad.any()


def test_a_list_of_parts_cannot_be_deployed() -> None:
    with pytest.raises(PlanError, match="`answers` names 'heads', which is a list of parts; expected one part"):
        deployed(plan(borrowing("*.classifier", use="answering_judges")))
