"""Facts of `kdx/report_teachers.py`, `kdx/plots_shown.py` and `kdx/agreement.py`: what a report says of teachers."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from sample_run import sample_result
from small_run import PLAIN, run_in
from test_shown import TWO

from kdx.agreement import compared
from kdx.history import EvalLine, History, StepLine, read_history
from kdx.plots_shown import group_of, shown_panels
from kdx.report import summary_table
from kdx.report_teachers import agreement_section, shown_section
from kdx.result import from_dict, read_result, to_dict

AGREEMENT = {"wide": {"val": {"same_answer": 0.9, "kl": 0.25}, "test": {"same_answer": 0.875, "kl": 0.3125}}}


def test_equal_logits_agree_wholly_and_shifted_ones_too() -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    same, divergence = compared(logits, logits + 3)
    assert same == 5
    assert divergence.item() == pytest.approx(0, abs=1e-5)


def test_the_divergence_is_that_of_the_student_from_the_teacher() -> None:
    student, teacher = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.8, 0.2], [0.2, 0.8]])
    same, divergence = compared(student.log(), teacher.log())
    assert same == 1, "only the first answers are the same"
    by_hand = (teacher * (teacher / student).log()).sum()
    torch.testing.assert_close(divergence, by_hand)


def test_a_finished_run_tells_how_far_the_student_follows_each_teacher(tmp_path: Path) -> None:
    found = run_in(tmp_path, TWO)
    agreement = read_result(found.folder).agreement
    assert {name: set(splits) for name, splits in agreement.items()} == {
        "wide": {"val", "test"}, "slim": {"val", "test"},
    }  # fmt: skip
    assert all(0 <= agreement["wide"][split]["same_answer"] <= 1 for split in ("val", "test"))
    assert agreement["wide"]["test"]["kl"] > 0
    text = (found.folder / "report.md").read_text()
    assert "## Agreement with the teachers" in text
    assert "`committee.weights`:" in text
    assert "| all |" in text
    assert "`tau`:" in text
    html = (found.folder / "report.html").read_text()
    assert "Agreement with the teachers" in html
    assert "Weights and temperatures" in html


def test_a_run_without_teachers_has_no_such_section(tmp_path: Path) -> None:
    found = run_in(tmp_path, PLAIN)
    assert read_result(found.folder).agreement == {}
    text = (found.folder / "report.md").read_text()
    assert "Agreement" not in text
    assert "Weights and temperatures" not in text


def test_the_table_of_agreement_has_a_row_for_each_teacher() -> None:
    lines = agreement_section(dataclasses.replace(sample_result(), agreement=AGREEMENT))
    assert "| `wide` | 90.00 % | 0.25 | 87.50 % | 0.3125 |" in lines[1].splitlines()


def test_the_table_of_the_terminal_shows_agreement_on_the_test_split() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(summary_table(dataclasses.replace(sample_result(), agreement=AGREEMENT)))
    console.print(summary_table(sample_result()))
    first, second = console.export_text().split("fashion-600, test split")[1:]
    assert "same answer" in first
    assert next(line for line in first.splitlines() if "teacher wide" in line).split()[-3:] == ["87.50", "%", "0.3125"]
    assert "same answer" not in second


def test_an_older_result_without_agreement_is_read() -> None:
    data = to_dict(sample_result())
    del data["agreement"]
    assert from_dict(data) == sample_result()


def test_the_last_epoch_is_shown_by_class() -> None:
    def line(step: int, wide: float) -> EvalLine:
        metrics = {"weights.wide": wide, "weights.wide/std": 0.125, "weights.wide[cat]": 0.75}
        return EvalLine(step, 1, "train", "committee", metrics, False)

    lines = shown_section(History((), (line(3, 0.25), line(6, 0.5))), ["cat", "dog"])
    assert lines[2:] == ["`committee.weights`:", "|  | `wide` |\n| --- | ---: |\n| all | 0.5 ± 0.125 |\n| cat | 0.75 |"]


def test_each_field_has_one_panel_with_a_line_for_each_teacher() -> None:
    shown = {
        "a.weights.x": 0.4,
        "a.weights.x/std": 0.1,
        "a.weights.y": 0.6,
        "a.weights.y/std": 0.1,
        "tau": 2.0,
        "tau/std": 1.0,
    }
    steps = [StepLine(step, 1, 0.1, {}, {}, shown) for step in range(1, 9)]
    from matplotlib.figure import Figure

    panels = shown_panels(steps)
    assert len(panels) == 2
    axes = Figure().add_subplot()
    panels[0](axes)
    assert [line.get_label() for line in axes.get_lines()] == ["x", "y"]
    assert axes.get_lines()[1].get_ydata().tolist() == pytest.approx([0.6] * 8)
    assert [group_of(name) for name in ("a.weights.x/std", "tau/std", "a.doubt")] == ["a.weights", "tau", "a.doubt"]


def test_the_history_of_a_run_gives_the_panels(tmp_path: Path) -> None:
    found = run_in(tmp_path, TWO)
    assert len(shown_panels(read_history(found.folder).steps)) == 2
