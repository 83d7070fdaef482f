"""Facts of runs with many teachers: any of them can be taken out, and nothing else of the plan changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import Seen, config_of, prepared, quiet, session_of, write_config
from test_shown import TWO

import kdx
from kdx.config import load
from kdx.errors import PlanError
from kdx.plan import Plan
from kdx.runs import build_plan
from kdx.table import plan_text

FOUR: dict[str, Any] = config_of(
    TWO,
    {
        "name": "four",
        "teachers": {
            "extra": {"use": "small", "width": 6},
            "fine": {"use": "small", "width": 8, "taps": {"mid": "second"}},
        },
        "align": {"mid": {"use": "conv1x1", "source": "student.mid", "like": "fine.mid"}},
        "losses": {"hint": {"use": "mse", "inputs": {"student": "mid", "teacher": "fine.mid"}, "weight": 0.5}},
    },
)
"""Four teachers in one committee; one of them gives a feature as well."""


def plan_without(teacher: str | None) -> Plan:
    layer = {} if teacher is None else {"teachers": {teacher: None}}
    return build_plan(prepared(FOUR, layer), quiet(), trained=True)


@pytest.mark.parametrize("teacher", ["wide", "slim", "extra"])
def test_a_teacher_that_is_taken_out_leaves_the_rest_of_the_plan_as_it_was(teacher: str) -> None:
    whole, less = plan_without(None), plan_without(teacher)
    assert [call.name for call in less.calls] == [call.name for call in whole.calls if call.name != teacher]
    for mine in less.calls:
        own = next(call for call in whole.calls if call.name == mine.name)
        assert mine.gives == own.gives
        reads = [key for key in own.reads if key != f"{teacher}.logits"]
        assert list(mine.reads) == reads
        state, expected = mine.module.state_dict(), own.module.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in state.items()), f"{mine.name} starts anew"
    assert (less.knobs, less.kept, less.reported, less.unused) == (whole.knobs, whole.kept, whole.reported, ())
    assert less.shapes == {
        key: shape if key != "committee.weights" else (3,)
        for key, shape in whole.shapes.items()
        if not key.startswith(f"{teacher}.")
    }
    (weights, _) = less.shown
    assert weights.columns == tuple(name for name in ("wide", "slim", "extra", "fine") if name != teacher)


def test_the_printed_plans_differ_in_that_teacher_alone() -> None:
    whole, less = (plan_text(plan_without(teacher)).splitlines() for teacher in (None, "wide"))
    assert set(whole) - set(less) == {
        "[teacher] teachers.wide: small(width 8), 707 parameters",
        "    gives wide.logits [3]",
        "    reads logits = wide.logits, slim.logits, extra.logits, fine.logits",
        "    gives committee.weights [4]",
    }
    assert set(less) - set(whole) == {
        "    reads logits = slim.logits, extra.logits, fine.logits",
        "    gives committee.weights [3]",
    }


def test_an_override_on_the_command_line_takes_a_teacher_out(tmp_path: Path) -> None:
    path = write_config(tmp_path / "four.yaml", FOUR)
    config = load(path, ["teachers.extra=null"])
    assert list(config["teachers"]) == ["wide", "slim", "fine"]


def test_the_batches_and_the_students_start_do_not_depend_on_the_teachers() -> None:
    whole, less = session_of(FOUR), session_of(FOUR, {"teachers": {"extra": None}})
    for step in range(3):
        mine, own = whole.feed.at(step), less.feed.at(step)
        assert all(torch.equal(mine[name], own[name]) for name in mine)
    mine, own = whole.student.state_dict(), less.student.state_dict()
    assert all(torch.equal(mine[name], own[name]) for name in mine)
    assert Seen(whole).steps[0].terms["ce"] == Seen(less).steps[0].terms["ce"]


def test_a_teacher_that_something_names_cannot_be_taken_out_unnoticed() -> None:
    with pytest.raises(PlanError, match=r"align.mid.like: 'fine.mid' names nothing"):
        plan_without("fine")


def test_the_public_name_of_what_a_target_shows_has_the_usual_ones() -> None:
    assert kdx.Target.shown == ("weights", "temperature")
