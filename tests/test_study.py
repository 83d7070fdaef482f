"""Facts of studies: what a file may say, what is refused before training, what is trained and what is concluded."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy import stats
from small_run import CASCADE, PLAIN, folders, quiet, run_in, write_config

import kdx
from kdx.cli import main
from kdx.config import overlay, read_yaml
from kdx.errors import ConfigError, KdxError
from kdx.result import Point, Result, read_result
from kdx.study import Outcome, plan_study, read_outcomes, read_study
from kdx.study_table import progress_line, remarks, study_csv, study_lines, study_markdown, warnings

ABLATIONS = [
    path
    for path in sorted((Path(kdx.__file__).parents[1] / "configs" / "ablations").glob("*.yaml"))
    if "space" not in read_yaml(path)  # a search, which is planned in test_tune.py
]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    write_config(Path("base.yaml"), CASCADE)


def study(**given: Any) -> Path:
    path = Path("study.yaml")
    path.write_text(yaml.safe_dump({"base": "base.yaml", "seeds": [0, 1], **given}, sort_keys=False))
    return path


TWO = {"full": {}, "no_hint": {"losses": {"hint": None}}}


def refusal(**given: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        plan_study(read_study(study(**given)), quiet())
    return str(caught.value)


# --- what a file says


def test_variants_are_differences_and_null_removes() -> None:
    trials, plans = plan_study(read_study(study(variants=TWO)), quiet())
    assert [(trial.variant, trial.seed) for trial in trials] == [
        ("full", 0),
        ("no_hint", 0),
        ("full", 1),
        ("no_hint", 1),
    ]
    assert "losses.hint" in plans["full"]
    assert "losses.hint" not in plans["no_hint"]


def test_a_grid_adds_a_variant_for_each_combination() -> None:
    grid = {"losses.kd.temperature": [1, 2], "train.updates": [3, 4]}
    trials, _ = plan_study(read_study(study(grid=grid, seeds=[0])), quiet())
    assert [trial.variant for trial in trials] == [
        f"losses.kd.temperature={t}, train.updates={u}" for t in (1, 2) for u in (3, 4)
    ]
    assert [trial.config["losses"]["kd"]["temperature"] for trial in trials] == [1, 1, 2, 2]


def test_pick_swaps_the_component() -> None:
    grid = {"losses.kd": {"pick": ["kd", "dist"]}}
    trials, _ = plan_study(read_study(study(grid=grid, seeds=[0])), quiet())
    assert [trial.config["losses"]["kd"] for trial in trials][1] == {"use": "dist"}


def test_a_variant_may_be_a_config_of_its_own() -> None:
    write_config(Path("other.yaml"), CASCADE, {"losses": {"hint": None}})
    found = read_study(study(variants={"full": {}, "other": "other.yaml"}))
    assert [variant.path.name for variant in found.variants] == ["base.yaml", "other.yaml"]


def test_configs_are_variants_by_the_names_of_their_files_without_the_base() -> None:
    write_config(Path("other.yaml"), CASCADE, {"losses": {"hint": None}})
    Path("study.yml").write_text("seeds: [0]\nconfigs: ['*.yaml']\n")
    assert [variant.name for variant in read_study(Path("study.yml")).variants] == ["other"]


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_every_shipped_study_names_configs_that_load(path: Path) -> None:
    found = read_study(path)
    assert len(found.seeds) >= 3
    assert found.reference in [variant.name for variant in found.variants]
    if path.stem != "zoo":  # its configs are planned one by one in test_configs.py
        plan_study(replace(found, seeds=(0,)), quiet())


# --- what differs in more than its method


def test_variants_of_another_budget_are_marked_although_they_say_so() -> None:
    variants = {"full": {}, "longer": {"train": {"updates": 9}}, "no_hint": {"losses": {"hint": None}}}
    trials, _ = plan_study(read_study(study(variants=variants)), quiet())
    marks = {trial.variant: trial.marks for trial in trials}
    assert marks["longer"] == ("train.updates (9 against 6)", "the number of updates (9 against 6)")
    assert marks["full"] == marks["no_hint"] == ()
    assert warnings(trials, "full") == [f"longer differs from full in {', '.join(marks['longer'])}"]


def test_a_recipe_is_marked_where_a_variant_is_a_whole_config_and_not_where_it_is_named() -> None:
    write_config(Path("other.yaml"), CASCADE, {"losses": {"hint": None}, "train": {"lr": 0.1}})
    variants = {"full": {}, "faster": {"train": {"lr": 0.1}}, "other": "other.yaml"}
    trials, _ = plan_study(read_study(study(variants=variants)), quiet())
    assert {trial.variant: trial.marks for trial in trials} == {
        "full": (),
        "faster": (),
        "other": ("train.lr (0.1 against 0.05)",),
    }


# --- what is refused


def test_bad_studies_are_refused() -> None:
    assert "seeds: there are none" in refusal(variants=TWO, seeds=[])
    assert "names a seed twice" in refusal(variants=TWO, seeds=[1, 1])
    assert "nothing to compare" in refusal()
    assert "base: there is none" in refusal(variants=TWO, base=None)
    assert "study.sedes: unknown option; did you mean 'seeds'" in refusal(variants=TWO, sedes=[1])
    assert "reference: no such variant 'ful'; did you mean 'full'" in refusal(variants=TWO, reference="ful")
    assert "configs: no file fits" in refusal(configs=["nothing*.yaml"])
    assert "expected differences or the path of a config" in refusal(variants={"full": 3})
    assert "grid.train.updates: found 3" in refusal(grid={"train.updates": 3})


def test_seed_and_name_are_those_of_the_study() -> None:
    assert "variant other: seed: no difference can change it" in refusal(variants={"full": {}, "other": {"seed": 3}})
    with pytest.raises(ConfigError, match="name: no difference can change it"):
        plan_study(read_study(study(variants=TWO)), quiet(), ["name=mine"])
    with pytest.raises(ConfigError, match="title: no difference can change it"):
        plan_study(read_study(study(variants=TWO)), quiet(), ["title=mine"])


def test_two_variants_that_are_the_same_run_are_refused() -> None:
    same = {"full": {}, "again": {"losses": {"kd": {"temperature": 2.0}}}}
    assert "the variants full and again are one and the same run" in refusal(variants=same)


def test_a_precision_that_each_variant_would_measure_is_refused() -> None:
    said = refusal(variants={"full": {}, "open": {"runtime": "auto"}})
    assert said.startswith("variant open: runtime.precision: found 'auto', ")
    assert "expected one of fp32, bf16, fp16" in said
    plan_study(read_study(study(variants=TWO)), quiet(), ["runtime=auto", "runtime.precision=fp32"])


def test_a_name_that_stands_twice_is_refused() -> None:
    write_config(Path("full.yaml"), CASCADE, {"losses": {"hint": None}})
    assert "two variants are called 'full'" in refusal(variants={"full": {}}, configs=["full.yaml"])


def test_a_variant_that_does_not_fit_is_named_before_anything_trains() -> None:
    with pytest.raises(KdxError, match=r"variant wrong: losses\.kd\.temprature"):
        plan_study(read_study(study(variants={"full": {}, "wrong": {"losses": {"kd": {"temprature": 1}}}})), quiet())
    assert folders(Path("runs")) == []


# --- what is trained


def test_a_study_trains_each_trial_once_and_shares_teachers_and_plain_students(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = str(study(variants=TWO))
    assert main(["ablate", path]) == 0
    assert "no_hint" in capsys.readouterr().out
    assert folders(Path("runs")).count("study") == 4
    assert folders(Path("runs")).count("plain") == 2
    assert folders(Path("runs")).count("wide") == 1
    rows = [*csv.DictReader(Path("runs/study_study/table.csv").read_text().splitlines())]
    alone = run_in(Path("alone"), CASCADE, {"losses": {"hint": None}, "seed": 1})
    assert float(rows[3]["test_last"]) == alone.result.last.test["accuracy"]
    before = {file: file.stat().st_mtime_ns for file in Path("runs").glob("*/student.safetensors")}
    assert main(["ablate", path, "--seeds", "0,1,2"]) == 0
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
    assert folders(Path("runs")).count("study") == 6


def test_runs_are_shown_by_study_and_variant_and_a_new_name_of_a_variant_trains_nothing() -> None:
    write_config(Path("base.yaml"), PLAIN)
    variants: dict[str, Any] = {"slow": {}, "fast": {"train": {"lr": 0.1}}}
    assert main(["ablate", str(study(variants=variants, seeds=[0])), "--quiet"]) == 0
    found = {read_result(path.parent).name: path.parent for path in Path("runs").glob("study-*/result.json")}
    assert set(found) == {"study / slow", "study / fast"}
    weights = {path: path.stat().st_mtime_ns for path in Path("runs").glob("study-*/student.safetensors")}
    assert main(["ablate", str(study(variants={"slow": {}, "quick": variants["fast"]}, seeds=[0])), "--quiet"]) == 0
    assert {path: path.stat().st_mtime_ns for path in Path("runs").glob("study-*/student.safetensors")} == weights
    assert read_result(found["study / fast"]).name == "study / quick"
    assert "study / quick" in (found["study / fast"] / "report.html").read_text()


def test_the_title_is_no_part_of_the_plain_student_or_of_a_teacher() -> None:
    run_in(Path("runs"), CASCADE, {"title": "shown"})
    names = {path.parent.name.rpartition("-")[0]: read_result(path.parent).name
             for path in Path("runs").glob("*/result.json")}  # fmt: skip
    assert names == {"distilled": "shown", "plain": "plain", "wide": "wide"}


def test_a_trial_that_fails_is_reported_and_the_others_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    write_config(Path("base.yaml"), PLAIN)
    variants = {"works": {}, "breaks": {"losses": {"bad": {"use": "breaking"}}}}
    plugin = Path("breaking.py")
    plugin.write_text(BREAKING)
    layer = {"plugins": [*PLAIN["plugins"], str(plugin.resolve())]}
    write_config(Path("base.yaml"), overlay(PLAIN, layer))
    assert main(["ablate", str(study(variants=variants, seeds=[0]))]) == 1
    assert "breaks, seed 0: RuntimeError: it broke" in capsys.readouterr().out
    assert folders(Path("runs")).count("study") == 2


BREAKING = """
import kdx


class Breaking(kdx.Loss):
    name = "breaking"
    inputs = {"student": "student.logits"}

    def forward(self, student):
        if self.training and student.requires_grad and len(student) > 2:
            raise RuntimeError("it broke")
        return student.mean()


@kdx.hookimpl
def kdx_losses():
    return [Breaking]
"""


def test_explain_shows_only_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablate", str(study(variants=TWO)), "--explain"]) == 0
    text = capsys.readouterr().out
    difference = text.partition("--- no_hint")[2]
    assert "losses.hint" in difference
    assert "losses.kd" not in difference
    assert folders(Path("runs")) == []


# --- what is concluded


@pytest.fixture
def made(tmp_path: Path) -> Result:
    return read_result(run_in(tmp_path / "made", PLAIN).folder)


def outcome(made: Result, variant: str, seed: int, best: float, last: float) -> Outcome:
    result = replace(
        made, seed=seed, best=Point(1, 1, {}, {"accuracy": best}), last=Point(2, 2, {}, {"accuracy": last})
    )
    return Outcome(variant, seed, "folder", result)


def test_the_lines_hold_means_spreads_and_paired_tests(made: Result) -> None:
    scores = {"a": (0.5, 0.6, 0.7), "b": (0.6, 0.72, 0.79), "c": (0.5, 0.61, 0.68)}
    outcomes = [outcome(made, name, seed, v, v - 0.1) for name, vs in scores.items() for seed, v in enumerate(vs)]
    first, second, third = study_lines(outcomes, "a")
    assert first.best is not None
    assert first.best.mean == pytest.approx(0.6)
    assert first.best.std == pytest.approx(0.1)
    assert first.difference is None
    assert second.difference is not None
    assert second.difference.mean == pytest.approx(0.31 / 3)
    assert second.last is not None
    assert second.last.mean == pytest.approx(0.6033333333)
    p = [float(stats.ttest_rel(scores[name], scores["a"]).pvalue) for name in ("b", "c")]
    assert second.p == pytest.approx(min(2 * p[0], max(p)))
    assert third.p == pytest.approx(p[1])


def test_one_seed_concludes_nothing(made: Result) -> None:
    lines = study_lines([outcome(made, name, 0, 0.5, 0.5) for name in "ab"], "a")
    assert lines[1].p is None
    assert lines[1].best is not None
    assert lines[1].best.std is None
    assert any("no difference can be told from chance" in remark for remark in remarks(lines, "a"))


def test_tables_hold_every_variant_and_the_reason_of_a_failure(made: Result) -> None:
    outcomes = [outcome(made, "a", 0, 0.5, 0.4), Outcome("b", 0, "folder", None, "it broke")]
    text = study_markdown("study", study_lines(outcomes, "a"), "a")
    assert "| a | 1 | 50.00 | 40.00 |" in text
    assert "b, seed 0: it broke" in text
    assert study_csv(outcomes).splitlines()[2].endswith("it broke")
    assert progress_line(outcomes, 4, 90.0) == "[2/4] b, seed 0: it broke; best so far a 50.00; about 1 min 30 s left"


# --- any finished runs


def test_runs_of_one_name_are_one_variant_and_the_first_is_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    layers = [{"name": name, "seed": seed} for name in ("one", "two") for seed in (0, 1)]
    found = [run_in(Path("made"), PLAIN, layer, {"train": {"lr": 0.01 * (layer["name"] == "two") + 0.05}})
             for layer in layers]  # fmt: skip
    outcomes = read_outcomes([run.folder for run in found])
    assert [(outcome.variant, outcome.seed) for outcome in outcomes] == [("one", 0), ("one", 1), ("two", 0), ("two", 1)]
    assert main(["report", *(str(run.folder) for run in found)]) == 0
    assert "the difference from one" in " ".join(capsys.readouterr().out.split())


def test_runs_with_one_name_and_seed_are_told_apart_by_their_folders() -> None:
    found = [run_in(Path("made"), PLAIN, {"train": {"lr": lr}}).folder for lr in (0.1, 0.2)]
    assert [outcome.variant for outcome in read_outcomes(found)] == [folder.name for folder in found]


def test_runs_with_other_budgets_or_data_are_not_compared() -> None:
    first = run_in(Path("made"), PLAIN).folder
    longer = run_in(Path("made"), PLAIN, {"train": {"updates": 9}}).folder
    fewer = run_in(Path("made"), PLAIN, {"data": {"labelled": 4}}).folder
    with pytest.raises(ConfigError, match=r"they differ in the number of updates \(9 against 6\)"):
        read_outcomes([first, longer])
    with pytest.raises(ConfigError, match="they differ in the number of labels"):
        read_outcomes([first, fewer])


def test_the_report_of_one_run_is_written_anew(capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_in(Path("made"), PLAIN).folder
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").is_file()
    assert main(["report", "nowhere"]) == 2
    assert "there is no such file" in capsys.readouterr().err


def test_a_study_is_reported_anew_from_its_folder_and_its_runs_can_be_compared(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_config(Path("base.yaml"), PLAIN)
    variants = {"slow": {}, "fast": {"train": {"lr": 0.1}}, "longer": {"train": {"updates": 9}}}
    main(["ablate", str(study(variants=variants, seeds=[0, 1]))])
    folder = Path("runs/study_study")
    before = (folder / "table.md").read_text()
    (folder / "table.md").unlink()
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 0
    assert (folder / "table.md").read_text() == before
    assert (folder / "report.html").is_file()
    runs = [str(path.parent) for path in Path("runs").glob("study-*/result.json")
            if read_result(path.parent).name != "study / longer"]  # fmt: skip
    capsys.readouterr()
    assert main(["report", *runs, "--out", "comparison"]) == 0
    assert "study / fast" in capsys.readouterr().out
    assert "train.lr (0." in Path("comparison/table.csv").read_text()
    assert (Path("comparison") / "report.html").is_file()
    assert main(["report", str(folder), *runs]) == 2
    assert "they differ in the number of updates" in capsys.readouterr().err
