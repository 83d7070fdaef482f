"""From the losses backwards: what is live, in which order, and what refs may name."""

from __future__ import annotations

from typing import Any

import pytest
from builders import FACTS, NET, VIT, plan_of, spec_of

from kdx.components import Loss
from kdx.errors import PlanError
from kdx.plugins import discover
from kdx.reach import Reach, reach

TEACHERS = {"teachers": {"cnn": {**NET, "taps": {"mid": 3}}, "vit": VIT}}
COMMITTEE = {
    "targets": {
        "committee": {"use": "confidence_mean"},
        "tau": {"use": "entropy_temperature", "inputs": {"logits": "committee.logits"}},
    },
    "losses": {"kd": {"use": "kd", "inputs": {"teacher": "committee.logits"}, "temperature": "tau"}},
}


def reached(*layers: dict[str, Any]) -> Reach:
    return reach(spec_of(*layers), FACTS)


def refusal(*layers: dict[str, Any]) -> str:
    with pytest.raises(PlanError) as caught:
        reached(*layers)
    return str(caught.value)


def kd(ref: str, **rest: Any) -> dict[str, Any]:
    return {"losses": {"kd": {"use": "kd", "inputs": {"teacher": ref}, **rest}}}


# --- what is live


def test_nodes_come_in_the_order_in_which_they_depend_on_each_other() -> None:
    assert reached(TEACHERS, COMMITTEE).order == [
        "student", "losses.ce", "cnn", "vit", "committee", "tau", "losses.kd",
    ]  # fmt: skip


def test_teachers_and_nodes_that_no_loss_reads_are_not_live_and_are_listed() -> None:
    found = reached(TEACHERS, COMMITTEE, kd("cnn.logits", temperature=4))
    assert found.models == ["student", "cnn"]
    assert found.unused == ("teachers.vit", "targets.committee", "targets.tau")
    assert "committee" not in found.nodes


def test_a_node_that_only_an_unused_node_reads_is_unused_too() -> None:
    chain = {
        "targets": {
            "a": {"use": "pass", "inputs": {"x": "vit.logits"}},
            "b": {"use": "pass", "inputs": {"x": "a"}},
        }
    }
    assert reached(TEACHERS, chain).unused == ("teachers.cnn", "teachers.vit", "targets.a", "targets.b")


def test_a_teacher_that_no_loss_reads_is_not_built() -> None:
    plan = plan_of({"teachers": {"giant": {"use": "huge"}, "cnn": NET}}, kd("cnn.logits"))
    assert set(plan.teachers) == {"cnn"}
    assert plan.unused == ("teachers.giant",)
    with pytest.raises(PlanError, match=r"^teachers.giant: huge could not be built: this network does not fit"):
        plan_of({"teachers": {"giant": {"use": "huge"}}}, kd("giant.logits"))


def test_only_the_fields_that_something_reads_are_wanted_of_a_model() -> None:
    hint = {"hint": {"use": "mse", "inputs": {"student": "student.embedding", "teacher": "cnn.mid"}}}
    found = reached(TEACHERS, {"losses": hint})
    assert found.fields == {"student": ("logits", "embedding"), "cnn": ("mid",)}


def test_a_model_that_only_lends_a_part_is_live_and_is_not_run() -> None:
    found = reached(TEACHERS, {"losses": {"reused": {"use": "reused", "borrows": {"head": "cnn.classifier"}}}})
    assert found.models == ["student", "cnn"]
    assert "cnn" not in found.order
    assert found.borrowed["losses.reused"] == {"head": ("cnn", "classifier")}


def test_a_knob_keeps_the_node_alive_that_it_reads() -> None:
    assert "tau" in reached(TEACHERS, COMMITTEE).nodes
    assert "tau" not in reached(TEACHERS, COMMITTEE, {"losses": {"kd": {"temperature": 3}}}).nodes


def test_a_weight_may_be_a_ref_and_keeps_its_node_alive() -> None:
    found = reached(TEACHERS, COMMITTEE, {"losses": {"kd": {"temperature": 3, "weight": "tau"}}})
    assert found.arguments["losses.kd"]["weight"] == "tau.out"
    assert "tau" in found.nodes


# --- refs


def test_a_default_ref_of_a_component_is_used_where_the_config_names_none() -> None:
    assert reached().arguments["losses.ce"] == {
        "student": "student.logits", "label": "batch.label", "weight": "losses.ce.weight",
    }  # fmt: skip


def test_a_bare_name_of_a_node_is_its_output() -> None:
    assert reached(TEACHERS, COMMITTEE).arguments["losses.kd"]["temperature"] == "tau.out"


def test_teacher_is_the_only_teacher_whatever_its_name() -> None:
    arguments = reached({"teachers": {"cnn": NET}, "losses": {"kd": {"use": "kd"}}}).arguments
    assert arguments["losses.kd"]["teacher"] == "cnn.logits"


def test_teacher_is_the_teacher_of_that_name_where_there_is_one() -> None:
    arguments = reached({"teachers": {"cnn": NET, "teacher": NET}, "losses": {"kd": {"use": "kd"}}}).arguments
    assert arguments["losses.kd"]["teacher"] == "teacher.logits"


def test_teacher_is_ambiguous_among_several() -> None:
    message = refusal(TEACHERS, {"losses": {"kd": {"use": "kd"}}})
    assert message == (
        "losses.kd.inputs.teacher: it reads 'teacher.logits', but there are 2 teachers (cnn, vit); "
        "name one of them, or a target over them"
    )


def test_teacher_names_nothing_where_there_is_none() -> None:
    message = refusal({"losses": {"kd": {"use": "kd"}}})
    assert message == "losses.kd.inputs.teacher: it reads 'teacher.logits', but the config has no teachers"


def test_a_star_stands_for_every_teacher_in_order() -> None:
    assert reached(TEACHERS, COMMITTEE).arguments["committee"]["logits"] == ("cnn.logits", "vit.logits")


def test_a_star_names_nothing_where_there_is_no_teacher() -> None:
    assert refusal(COMMITTEE) == "targets.committee.inputs.logits: *.logits names no teacher, for there is none"


def test_a_ref_that_is_listed_twice_is_read_once() -> None:
    listed = {"targets": {"committee": {"inputs": {"logits": ["vit.logits", "*.logits"]}}}}
    assert reached(TEACHERS, COMMITTEE, listed).arguments["committee"]["logits"] == ("vit.logits", "cnn.logits")


def test_an_input_that_may_be_absent_is_none() -> None:
    arguments = reached({"losses": {"m": {"use": "masked"}}}).arguments["losses.m"]
    assert arguments["mask"] is None
    assert arguments["logits"] == ("student.logits",)


def test_the_index_of_the_samples_is_a_stream_of_every_batch() -> None:
    masked = {"losses": {"m": {"use": "masked", "inputs": {"mask": "batch.index"}}}}
    assert reached(masked).arguments["losses.m"]["mask"] == "batch.index"


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("cnm.logits", "'cnm.logits' names nothing; did you mean 'cnn'?"),
        ("commitee.logits", "'commitee.logits' names nothing; did you mean 'committee'?"),
        ("cnn.logit", "cnn has no 'logit'; did you mean 'logits'? (it has: embedding, features, logits, mid)"),
        ("cnn.mdi", "cnn has no 'mdi'; did you mean 'mid'?"),
        ("cnn", "say which tensor of cnn; it has: embedding, features, logits, mid"),
        ("committee.logit", "committee gives no 'logit'; did you mean 'logits'? (committee gives: logits, weights)"),
        ("committee", "committee gives no 'out'; committee gives: logits, weights"),
        ("batch.lable", "the data has no stream 'lable'; did you mean 'label'? (streams: image, index, label)"),
        ("ce", "'ce' names nothing; "),
        ("*.logits", "'*.logits' names nothing; known: batch, cnn, committee, student, tau, vit"),
    ],
)
def test_a_misspelt_ref_is_refused_with_the_nearest_one(ref: str, message: str) -> None:
    assert refusal(TEACHERS, COMMITTEE, kd(ref)).startswith(f"losses.kd.inputs.teacher: {message}")


def test_a_misspelt_ref_of_a_knob_is_refused_with_its_place() -> None:
    message = refusal(TEACHERS, COMMITTEE, {"losses": {"kd": {"temperature": "tua"}}})
    assert message.startswith("losses.kd.temperature: 'tua' names nothing; did you mean 'tau'?")


def test_a_misspelt_end_of_an_aligner_is_refused_with_its_place() -> None:
    message = refusal(TEACHERS, {"align": {"a": {"source": "student.logits", "like": "cnn.mdi"}}})
    assert message.startswith("align.a.like: cnn has no 'mdi'; did you mean 'mid'?")


def test_refs_of_parts_that_are_not_live_are_checked_as_well() -> None:
    message = refusal(TEACHERS, {"targets": {"idle": {"use": "pass", "inputs": {"x": "vit.logit"}}}})
    assert message.startswith("targets.idle.inputs.x: vit has no 'logit'; did you mean 'logits'?")


def test_suggestions_come_from_everything_declared_also_what_is_not_live() -> None:
    message = refusal(TEACHERS, kd("vitt.logits"))
    assert "did you mean 'vit'?" in message


@pytest.mark.parametrize("part", ["cnn", "committee.x", "batch.image", "nobody.fc"])
def test_a_borrowed_part_must_be_part_of_a_model(part: str) -> None:
    message = refusal(TEACHERS, COMMITTEE, {"losses": {"r": {"use": "reused", "borrows": {"head": part}}}})
    assert message == (f"losses.r.borrows.head: found {part!r}, expected a part of a model, as in teacher.classifier")


# --- circles


def test_nodes_that_read_each_other_are_refused_with_the_circle() -> None:
    circle = {
        "targets": {
            "a": {"use": "pass", "inputs": {"x": "b"}},
            "b": {"use": "pass", "inputs": {"x": "c"}},
            "c": {"use": "pass", "inputs": {"x": "a"}},
        },
        "losses": {"m": {"use": "masked", "inputs": {"mask": "a"}}},
    }
    assert refusal(circle) == "targets.a: the nodes read each other in a circle: a -> b -> c -> a"


def test_a_node_that_reads_itself_is_a_circle() -> None:
    own = {"targets": {"a": {"use": "pass", "inputs": {"x": "a"}}}}
    assert refusal(own, {"losses": {"m": {"use": "masked", "inputs": {"mask": "a"}}}}).endswith("circle: a -> a")


def test_a_circle_through_a_knob_is_found() -> None:
    knob = {"targets": {"tau": {"use": "entropy_temperature", "inputs": {"logits": "cnn.logits"}, "high": "tau"}}}
    assert refusal(TEACHERS, knob, kd("cnn.logits", temperature="tau")).endswith("in a circle: tau -> tau")


def test_a_node_that_two_others_read_is_no_circle() -> None:
    diamond = {
        "targets": {
            "top": {"use": "pass", "inputs": {"x": "cnn.logits"}},
            "left": {"use": "pass", "inputs": {"x": "top"}},
            "right": {"use": "pass", "inputs": {"x": "top"}},
        },
        "losses": {"m": {"use": "masked", "inputs": {"logits": ["left", "right", "student.logits"]}}},
    }
    assert reached(TEACHERS, diamond).order.count("top") == 1


# --- views


VIEWS = {"data": {"views": {"strong": {}}}}


def test_a_model_on_a_view_is_a_call_of_its_own() -> None:
    found = reached(VIEWS, TEACHERS, kd("cnn@strong.logits"))
    assert found.order == ["student", "losses.ce", "cnn@strong", "losses.kd"]
    assert found.models == ["student", "cnn"]


def test_teacher_is_the_only_teacher_also_on_a_view() -> None:
    found = reached(VIEWS, {"teachers": {"cnn": NET}}, kd("teacher@strong.logits"))
    assert found.arguments["losses.kd"]["teacher"] == "cnn@strong.logits"


def test_a_misspelt_view_is_refused_with_the_nearest_one() -> None:
    message = refusal(VIEWS, TEACHERS, kd("cnn@stong.logits"))
    assert message.startswith("losses.kd.inputs.teacher: the data has no view 'stong'; did you mean 'strong'?")


def test_a_component_default_cannot_name_a_part_that_is_not_there() -> None:
    defaults = {name: entry.component.inputs for (kind, name), entry in discover().entries.items()
                if issubclass(entry.component, Loss)}  # fmt: skip
    owners = {ref.partition(".")[0] for inputs in defaults.values() for ref in inputs.values() if isinstance(ref, str)}
    assert owners <= {"student", "teacher", "batch"}
