"""What a person sees of a plan."""

from __future__ import annotations

import difflib
import io
from typing import Any

import pytest
from builders import NET, WIDE, batch, plan_of
from rich.console import Console

from kdx.config import overlay
from kdx.table import plan_mermaid, plan_rows, plan_table, plan_text, remarks

HINT: dict[str, Any] = {
    "student": {"taps": {"mid": 3}},
    "teachers": {"big": {**WIDE, "taps": {"mid": 3}}, "idle": NET},
    "align": {"mid": {"source": "student.mid", "like": "big.mid"}},
    "losses": {
        "kd": {"use": "kd", "inputs": {"teacher": "big.logits"}},
        "hint": {"use": "mse", "inputs": {"student": "mid", "teacher": "big.mid"},
                 "weight": {"use": "linear", "start": 1, "end": 0}},
        "reused": {"use": "reused", "borrows": {"head": "student.classifier"}, "weight": 0.5},
    },
}  # fmt: skip


def changed(layer: dict[str, Any]) -> list[str]:
    """The lines that differ between two plans."""
    base = {"teachers": {"big": {"num_classes": 3}}, "losses": {"reused": None}}
    before = plan_text(plan_of(HINT, base)).splitlines()
    after = plan_text(plan_of(HINT, base, layer)).splitlines()
    return [line for line in difflib.ndiff(before, after) if line[0] in "+-"]


def test_the_text_shows_side_component_plugin_reads_and_shapes_of_every_call() -> None:
    assert plan_text(plan_of(HINT, {"losses": {"reused": None}})) == (
        "[teacher] teachers.big: timm resnet18(args {'layers': [1, 1, 1, 1], 'channels': [8, 16, 32, 64], "
        "'stem_width': 8}), 85,139 parameters\n"
        "    reads batch.image\n"
        "    gives big.logits [3]\n"
        "    gives big.mid [32, 2, 2] at 3\n"
        "[learner] student: timm resnet18(args {'layers': [1, 1, 1, 1], 'channels': [8, 16, 24, 32], "
        "'stem_width': 8}), 39,043 parameters\n"
        "    reads batch.image\n"
        "    gives student.logits [3]\n"
        "    gives student.mid [24, 2, 2] at 3\n"
        "[learner] align.mid: auto (kdx.builtin), 800 parameters\n"
        "    reads source = student.mid\n"
        "    gives mid.out [32, 2, 2]\n"
        "[learner] losses.ce: cross_entropy (kdx.builtin)\n"
        "    reads student = student.logits\n"
        "    reads label = batch.label\n"
        "    reads weight = 1\n"
        "    gives losses.ce number\n"
        "[learner] losses.kd: kd (kdx_logit)\n"
        "    reads student = student.logits\n"
        "    reads teacher = big.logits\n"
        "    reads temperature = 4\n"
        "    reads weight = 1\n"
        "    gives losses.kd number\n"
        "[learner] losses.hint: mse (kdx_feature)\n"
        "    reads student = mid.out\n"
        "    reads teacher = big.mid\n"
        "    reads weight = linear(start 1.0, end 0.0)\n"
        "    gives losses.hint number\n"
        "align.mid: map 24x2x2 -> conv1x1 24->32\n"
        "from the teacher side to the learner: big.logits, big.mid\n"
        "not built, because no loss needs it: teachers.idle\n"
    )


def test_equal_plans_have_equal_texts() -> None:
    assert plan_text(plan_of(HINT)) == plan_text(plan_of(HINT))


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ({"losses": {"kd": {"temperature": 2}}}, ["temperature = 2"]),
        ({"losses": {"hint": {"weight": 3}}}, ["weight = 3"]),
        ({"losses": {"hint": {"weight": {"warmup": 2}}}}, ["warmup 2.0"]),
        ({"losses": {"ce": {"label_smoothing": 0.1}}}, ["cross_entropy(label_smoothing 0.1)"]),
        ({"losses": {"kd": {"use": "mse_logits", "inputs": {"teacher": "big.logits"}}}}, ["mse_logits (kdx_logit)"]),
        ({"student": {"taps": {"mid": "layer3"}}}, ["student.mid [24, 2, 2] at layer3"]),
        ({"teachers": {"big": {"checkpoint": "/some/where/w.pt"}}}, [", weights of w.pt"]),
        ({"teachers": {"big": {"run": {"name": "cnn"}}}}, [", weights of the run cnn"]),
        ({"student": {"size": 14}}, ["size 14"]),
        ({"losses": {"hint": {"inputs": {"student": "student.mid", "teacher": "student.mid"}}}}, ["student.mid"]),
    ],
)
def test_whatever_an_ablation_changes_shows_in_the_difference_of_two_plans(
    layer: dict[str, Any], words: list[str]
) -> None:
    added = "\n".join(line for line in changed(layer) if line.startswith("+"))
    assert all(word in added for word in words)


def test_one_change_of_a_knob_changes_one_line() -> None:
    assert changed({"losses": {"kd": {"temperature": 2}}}) == [
        "-     reads temperature = 4", "+     reads temperature = 2",
    ]  # fmt: skip


def test_a_borrowed_part_and_a_ref_as_a_knob_are_shown() -> None:
    tau = {"targets": {"tau": {"use": "entropy_temperature", "inputs": {"logits": "big.logits"}}}}
    rows = {row[1]: row for row in plan_rows(plan_of(HINT, tau, {"losses": {"kd": {"temperature": "tau"}}}))}
    assert "head (borrowed)" in rows["losses.reused"][3]
    assert "temperature = tau.out" in rows["losses.kd"][3]
    assert rows["targets.tau"][4] == "tau.out number"


def test_an_absent_input_is_not_shown_and_many_refs_are_listed() -> None:
    masked = {"use": "masked", "inputs": {"logits": ["student.logits", "big.logits"]}}
    rows = {row[1]: row for row in plan_rows(plan_of(HINT, {"losses": {"m": masked}}))}
    assert "logits = student.logits, big.logits" in rows["losses.m"][3]
    assert "mask" not in rows["losses.m"][3]


def test_the_table_for_the_terminal_has_every_call() -> None:
    plan = plan_of(HINT)
    out = io.StringIO()
    Console(file=out, width=200).print(plan_table(plan))
    assert "small: the plan" in out.getvalue()
    for call in plan.calls:
        assert call.where in out.getvalue()


def test_a_plain_plan_needs_no_remark() -> None:
    assert remarks(plan_of()) == []


def test_the_chart_has_a_box_for_every_call_and_an_arrow_for_every_tensor() -> None:
    chart = plan_mermaid(plan_of(HINT, {"losses": {"reused": None}}))
    assert chart.startswith("flowchart LR\n  subgraph teacher[teacher side]\n")
    for line in (
        '    n_big(["teachers.big<br/>timm resnet18"])',
        '    n_mid["align.mid<br/>auto"]',
        '    n_losses_hint{{"losses.hint<br/>mse"}}',
        '  n_batch_image[/"batch.image"/]',
        "  n_batch_image --> n_student",
        '  n_student -- "mid [24, 2, 2]" --> n_mid',
        '  n_mid -- "out [32, 2, 2]" --> n_losses_hint',
        '  n_big -- "mid [32, 2, 2]" --> n_losses_hint',
    ):
        assert line in chart.splitlines()
    assert "idle" not in chart


def test_a_chart_of_a_plain_plan_has_one_side() -> None:
    assert "subgraph teacher" not in plan_mermaid(plan_of())


def test_a_model_on_a_view_is_shown_as_a_call_of_its_own() -> None:
    views = overlay({"data": {"views": {"strong": {}}}}, {"losses": {"m": {"use": "masked", "inputs": {"logits": [
        "student@strong.logits"]}}}})  # fmt: skip
    sample = {**batch(), "image@strong": batch(seed=1)["image"]}
    text = plan_text(plan_of(views, sample=sample))
    assert "gives student@strong.logits [3]" in text
    assert "reads batch.image@strong" in text
