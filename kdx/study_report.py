"""Everything that a study leaves in its folder: tables as text, for spreadsheets and papers, and a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from kdx.files import write_text
from kdx.findings import Findings, relative, write_findings
from kdx.history import History, read_history
from kdx.page import page
from kdx.study_latex import study_latex
from kdx.study_plots import Curve, curve_of, draw_effects, draw_validation
from kdx.study_table import Line, study_csv, study_lines, study_markdown
from kdx.study_text import study_cards, study_text


def lines_of(findings: Findings) -> list[Line]:
    """The line of each variant."""
    return study_lines(findings.outcomes, findings.reference, findings.marks)


def write_tables(folder: Path, findings: Findings) -> list[Line]:
    """Write `table.md`, `table.csv`, `table.tex` and `study.json`; gives the lines of the table."""
    lines = lines_of(findings)
    write_text(folder / "table.md", study_markdown(findings.name, lines, findings.reference))
    write_text(folder / "table.csv", study_csv(findings.outcomes, findings.marks))
    write_text(folder / "table.tex", study_latex(findings.name, lines, findings.reference))
    write_findings(folder, findings)
    return lines


def write_page(folder: Path, findings: Findings) -> Path:
    """Write `curves.png`, `effects.png` and `report.html`; gives the last. It reads the histories of the runs."""
    lines = lines_of(findings)
    curves = dict(_curves(findings))
    drawn = {
        "curves.png": draw_validation(folder / "curves.png", curves, _plain_curve(findings), findings.reference),
        "effects.png": draw_effects(folder / "effects.png", lines, findings.reference),
    }
    pictures = {name: folder / name for name, exists in drawn.items() if exists}
    for name in drawn.keys() - pictures.keys():
        (folder / name).unlink(missing_ok=True)  # of an earlier report
    reports = {name: run / "report.html" for name, run in findings.runs.items()}
    links = {name: relative(report, folder) for name, report in reports.items() if report.is_file()}
    text = study_text(findings, lines, links, list(pictures))
    path = folder / "report.html"
    write_text(path, page(findings.name, text, study_cards(findings, lines), pictures))
    return path


def _curves(findings: Findings) -> Iterator[tuple[str, Curve]]:
    for variant, runs in _runs_by_variant(findings).items():
        if (curve := curve_of([read_history(run) for run in runs])) is not None:
            yield variant, curve


def _runs_by_variant(findings: Findings) -> Mapping[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for outcome in findings.outcomes:
        if outcome.result is not None:
            found.setdefault(outcome.variant, []).append(findings.runs[outcome.folder])
    return found


def _plain_curve(findings: Findings) -> Curve | None:
    """The curve of the plain students of the first variant that has any, the reference before all others."""
    plain: dict[str, list[History]] = {}
    for outcome in sorted(findings.outcomes, key=lambda outcome: outcome.variant != findings.reference):
        row = None if outcome.result is None else outcome.result.plain
        if row is not None and row.folder is not None:
            history = read_history(findings.runs[outcome.folder].parent / row.folder)
            plain.setdefault(outcome.variant, []).append(history)
    return next((curve for histories in plain.values() if (curve := curve_of(histories)) is not None), None)
