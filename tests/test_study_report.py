"""Facts of what a study leaves: tables for papers, a page with figures, links and limits."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sample_study import sample_study

from kdx.findings import Findings
from kdx.history import EvalLine, History
from kdx.study_latex import escaped, study_latex
from kdx.study_plots import Curve, _named, curve_of
from kdx.study_report import lines_of, write_page, write_tables

THREE = ["full", "no_hint", "hint_at|100%"]


@pytest.fixture
def findings(tmp_path: Path) -> Findings:
    return sample_study(tmp_path / "runs", THREE)


@pytest.fixture
def page(findings: Findings, tmp_path: Path) -> str:
    write_tables(tmp_path / "runs" / "study_study", findings)
    return write_page(tmp_path / "runs" / "study_study", findings).read_text()


def test_the_folder_holds_tables_figures_and_a_page(page: str, tmp_path: Path) -> None:
    names = {"table.md", "table.csv", "table.tex", "study.json", "curves.png", "effects.png", "report.html"}
    assert {path.name for path in (tmp_path / "runs" / "study_study").iterdir()} == names


def test_the_page_needs_no_other_file_and_links_to_the_reports_of_the_runs(page: str) -> None:
    assert re.findall(r'src="(?!data:)', page) == []
    assert "<script" not in page
    links = re.findall(r'href="([^"]+)"', page)
    assert len(links) == 9
    assert "../study-0-0/report.html" in links


def test_links_lead_to_the_runs_from_another_folder_too(findings: Findings, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere" / "deep"
    folder.mkdir(parents=True)
    link = re.findall(r'href="([^"]+)"', write_page(folder, findings).read_text())[0]
    assert (folder / link).is_file()


def test_the_page_names_failed_trials_marks_and_limits(page: str) -> None:
    assert "RuntimeError: it broke on two lines" in page
    assert "train.epochs (24 against 12)" in page
    assert "3 seeds tell only large differences from chance" in page
    assert "holds the true mean 3 times in 4" in page
    assert "hint_at|100%" in page


def test_a_mark_stands_in_every_table(page: str, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "study_study"
    assert "| hint\\_at\\|100% † |" in (folder / "table.md").read_text()
    assert r"hint\_at\textbar{}100\% $^\dagger$ &" in (folder / "table.tex").read_text()
    assert "train.epochs (24 against 12); the number of updates" in (folder / "table.csv").read_text()


def test_the_table_for_papers_uses_booktabs_and_closes_what_it_opens(findings: Findings) -> None:
    text = study_latex(findings.name, lines_of(findings), findings.reference)
    for rule in ("toprule", "midrule", "bottomrule"):
        assert text.count(f"\\{rule}") == 1
    assert text.count(r"\begin{") == text.count(r"\end{") == 2
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 4
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {8}
    assert not re.search(r"(?<!\\)[%#]", "".join(rows))


def test_signs_of_latex_are_escaped() -> None:
    assert escaped("a_b & 5% ±\\") == r"a\_b \& 5\% $\pm$\textbackslash{}"


def test_a_study_in_which_everything_failed_has_a_page(findings: Findings, tmp_path: Path) -> None:
    text = write_page(tmp_path, replace(findings, outcomes=findings.outcomes[-1:])).read_text()
    assert "Failed trials" in text
    assert "<img" not in text


def test_one_seed_without_a_plain_student_has_a_page(tmp_path: Path) -> None:
    findings = sample_study(tmp_path, THREE, seeds=1)
    alone = [replace(outcome, result=outcome.result and replace(outcome.result, plain=None))
             for outcome in findings.outcomes]  # fmt: skip
    text = write_page(tmp_path, replace(findings, outcomes=tuple(alone))).read_text()
    assert "This is one seed" in text
    assert "Effects" in text


def test_a_curve_is_over_the_epochs_that_all_seeds_have() -> None:
    def history(*epochs: int) -> History:
        return History((), tuple(EvalLine(10 * e, e, "val", "student", {"accuracy": e / 10}, False) for e in epochs))

    curve = curve_of([history(1, 2, 3), history(1, 2), History()])
    assert curve is not None
    assert curve.epochs.tolist() == [1, 2]
    assert curve.values.tolist() == [[0.1, 0.2], [0.1, 0.2]]
    assert curve_of([History()]) is None


def test_of_many_variants_only_the_reference_the_best_and_the_worst_are_named() -> None:
    curves = {f"v{number:02}": Curve(np.array([1.0]), np.array([[number / 100]])) for number in range(50)}
    assert _named(curves, "v20") == ["v49", "v48", "v47", "v46", "v20", "v01", "v00"]
    assert _named(dict([*curves.items()][:8]), "v00") == [f"v{number:02}" for number in range(8)]


def test_fifty_variants_have_a_page(tmp_path: Path) -> None:
    findings = sample_study(tmp_path, [f"losses.kd.temperature={number}" for number in range(50)], seeds=2)
    text = write_page(tmp_path, findings).read_text()
    assert text.count("losses.kd.temperature=37") == 4 + 1  # outcome, effects, cost and two trials
