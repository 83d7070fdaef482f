"""The pages that are written from the code."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from kdx.plugins import Registry, discover
from kdx.reference import components_page, config_page, main, methods_page

CONFIGS = {"methods/kd": "Soft targets.", "multi/patient": "Many epochs of `kd`."}
STRANGER = Path(__file__).parent / "stranger_plugin.py"


@functools.cache
def registry() -> Registry:
    return discover([str(STRANGER)])


@functools.cache
def rows() -> dict[str, list[str]]:
    """The rows of the page of methods by the text of their first cell."""
    lines = methods_page(registry(), CONFIGS).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    return {row[0]: row[1:] for row in cells}


def test_every_section_is_listed_with_defaults() -> None:
    text = config_page()
    for line in ("| `seed` | int | 0 |", "| `train.optimizer` | dict[str, Any] | {'use': 'sgd', 'momentum': 0.9} |"):
        assert line in text


def test_an_option_stands_where_it_may_be_said() -> None:
    lines = config_page().splitlines()
    for line in ("| `student.taps` | dict[str, Any] | {} |", "| `losses.NAME.lr_scale` | float | 1.0 |",
                 "| `teachers.NAME.cache` | Any | none |", "| `targets.NAME.cache` | Any | none |"):  # fmt: skip
        assert line in lines
    assert not any(key in line for line in lines for key in ("`student.cache`", "`losses.NAME.cache`"))


def test_components_are_listed_with_inputs_knobs_and_options() -> None:
    text = components_page(registry())
    assert "### kd\n\n*kdx_logit*\n" in text
    assert "| knob | temperature | number, schedule or ref, above 0 | 4 |" in text


def test_options_in_a_docstring_are_a_list_one_or_several_to_a_line() -> None:
    text = components_page(registry())
    assert "\n- size: images are cut to a square" in text
    assert "\n- train, val, test: the names of the splits" in text


def test_components_of_other_packages_are_not_for_the_docs() -> None:
    assert "closeness" in registry().names("losses")
    assert "closeness" not in components_page(registry())
    assert "closeness" not in methods_page(registry(), {})


def test_a_method_has_its_source_inputs_defaults_and_config() -> None:
    row = rows()["[kd](../configs/methods/kd.yaml)"]
    assert row[0] == "Soft targets"
    assert row[1].startswith("Hinton, Vinyals, Dean")
    assert row[2] == "values"
    assert row[3] == "both: `logits`"
    assert "`temperature` 4" in row[4]
    assert row[5] == ""


def test_a_config_of_no_component_is_a_recipe() -> None:
    assert rows()["[patient](../configs/multi/patient.yaml)"] == ["Many epochs of `kd`."]


def test_results_stand_at_the_end_of_the_methods() -> None:
    assert methods_page(registry(), {}, "## Results\n").endswith("\n\n## Results\n")


def test_every_published_method_says_what_it_is_held_by() -> None:
    for name, row in rows().items():
        if len(row) == 6 and name != "method" and row[1] and row[1] != "kdx":
            assert row[2] in ("values", "code", "paper"), name


def test_a_method_without_a_config_has_no_link() -> None:
    assert "fitnet" in rows()


def test_what_a_method_trains_is_found_by_building_it() -> None:
    assert rows()["fitnet"][-1] == "`regressor`"
    assert rows()["crd"][-1] == "`student_layer`, `teacher_layer`"
    assert rows()["mse"][-1] == ""


def test_all_that_a_method_may_need_is_told_apart() -> None:
    reads = {name: row[3] for name, row in rows().items() if len(row) == 6}
    assert reads["mse"] == "named in the config: `student`, `teacher`"
    assert reads["crd"] == "both: `embedding`; batch: `index`"
    assert reads["confidence_mean"] == "each teacher: `logits`"
    assert reads["clip_kd"] == "both: `embedding`; may be named: `student_other`, `teacher_other`"
    assert reads["srrl"].endswith("part: `teacher.classifier`")


def test_a_rule_of_our_own_is_said_to_be_one() -> None:
    assert rows()["confidence_mean"][1] == "kdx"


def test_pages_are_written_and_then_up_to_date(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", str(tmp_path)]) == 1
    assert f"{tmp_path / 'methods.md'} is not up to date" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"config.md", "components.md", "methods.md"}
    assert main(["--check", str(tmp_path)]) == 0
