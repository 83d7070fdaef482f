"""Facts of the live table of a study, and of the plain lines in its place."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from sample_study import sample_study

from kdx.findings import Findings
from kdx.study import Study, Variant
from kdx.study_live import Board, board_table
from kdx.study_report import lines_of

STUDY = Study("study", (0, 1, 2), tuple(Variant(name, Path("x.yaml")) for name in ("full", "no_hint", "later")), "full")


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, _environ={})


def shown(board: Console) -> str:
    assert isinstance(board.file, io.StringIO)
    return board.file.getvalue()


def findings_of(folder: Path) -> Findings:
    return sample_study(folder, ["full", "no_hint"], seeds=2)


def test_the_table_holds_seeds_best_last_result_and_time_left(tmp_path: Path) -> None:
    findings, board = findings_of(tmp_path), console(terminal=False)
    board.print(board_table(STUDY, findings.outcomes, lines_of(findings), spent=61, left=90))
    text = " ".join(shown(board).split())
    assert "study: 5 of 9 trials, 1 min 01 s spent, about 1 min 30 s left" in text
    assert "2/3, 1 failed" in text
    assert "seed 2: RuntimeError: it broke" in text
    assert "later 0/3 - -" in text


def test_the_best_variant_stands_first_and_what_has_no_result_last(tmp_path: Path) -> None:
    findings = findings_of(tmp_path)
    lines = lines_of(findings)
    board = console(terminal=False)
    board.print(board_table(STUDY, findings.outcomes, lines, spent=0, left=None))
    text = shown(board)
    ranked = sorted(lines, key=lambda line: -line.best.mean if line.best else 0)
    places = [text.index(name) for name in (*(line.variant for line in ranked), "later")]
    assert places == sorted(places)


def test_on_a_terminal_a_table_is_shown_and_elsewhere_or_quiet_a_line_per_trial(tmp_path: Path) -> None:
    findings = findings_of(tmp_path)
    for terminal, plain, live in ((True, False, True), (True, True, False), (False, False, False)):
        notes = console(terminal)
        with Board(notes, STUDY, plain=plain) as board:
            board.tell(findings.outcomes, lines_of(findings), 0.0)
        assert ("5 of 9 trials" in shown(notes)) == live
        assert ("[5/9]" in shown(notes)) == (not live)
