"""Facts of `kdx/cli.py`: what a person sees in the terminal, and exit codes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import CASCADE, PLAIN, TEACHER, folders, lines_of, write_config

import kdx
from kdx.cli import main
from kdx.config import overlay


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


def small(*layers: dict[str, object]) -> str:
    return str(write_config(Path("small.yaml"), PLAIN, *layers))


def distil(*layers: dict[str, object]) -> str:
    return str(write_config(Path("distil.yaml"), CASCADE, *layers))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command that is refused, which is all that it prints."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


# --- help and version


def test_help_comes_without_torch() -> None:
    program = (
        "import sys\nfrom kdx.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'timm', 'numpy'} & set(sys.modules), 'help is slow'\n"
    )
    for arguments in (["--help"], ["run", "--help"], ["--version"]):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_the_module_can_be_started() -> None:
    done = subprocess.run([sys.executable, "-m", "kdx", "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == f"kdx {kdx.__version__}"


def test_help_names_every_command_and_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("run", "explain", "plugins", "init"))
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    text = capsys.readouterr().out
    assert all(option in text for option in ("--fresh", "--dry-run", "--seeds", "--quiet", "--debug", "key=value"))


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["rnu"],
        ["run"],
        ["run", "a.yaml", "--fsh"],
        ["run", "a.yaml", "--quiet", "train.lr"],
        ["plugins", "kd", "a=1"],
    ],
    ids=str,
)
def test_a_command_line_that_is_wrong_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage" in capsys.readouterr().err.lower()


# --- run


def test_run_trains_shows_a_table_and_names_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", distil(), "--quiet"]) == 0
    captured = capsys.readouterr()
    assert folders(Path("runs")) == ["distilled", "plain", "wide"]
    assert "accuracy" in captured.out
    (line,) = [line for line in captured.out.splitlines() if line.startswith("report: ")]
    assert Path(line.removeprefix("report: ")).is_file()
    assert captured.err == ""


def test_overrides_may_stand_before_and_after_options(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", small(), "train.updates=2", "--quiet", "seed=3", "out=elsewhere"]
    assert main(arguments) == 0
    (folder,) = [path for path in Path("elsewhere").iterdir() if path.is_dir()]
    assert len([line for line in lines_of(folder) if line["kind"] == "step"]) == 2
    assert "seed: 3" in (folder / "config.yaml").read_text()


def test_a_second_run_takes_the_first_one_as_it_is_and_fresh_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    config = small()
    for arguments, again in ((["run", config], False), (["run", config], True), (["run", config, "--fresh"], False)):
        assert main(arguments) == 0
        text = capsys.readouterr().err
        assert ("finished before, taken as it is" in text) == again
        assert ("small: epoch 2/2" in text) == (not again)


def test_seeds_are_runs_of_their_own_and_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", small({"train": {"updates": 2}}), "--seeds", "0,1", "--quiet"]) == 0
    assert folders(Path("runs")) == ["small", "small"]
    assert "2 seeds" in capsys.readouterr().out
    seeds = {re.search(r"^seed: (\d)", (path / "config.yaml").read_text(), re.M)[1] for path in Path("runs").iterdir()
             if path.is_dir()}  # type: ignore[index] # fmt: skip
    assert seeds == {"0", "1"}


def test_a_dry_run_checks_everything_and_trains_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", distil(), "--dry-run"]) == 0
    text = capsys.readouterr().out
    states = re.findall(r"runs/(\w+)-[0-9a-f]{12}: (.*)", text)
    assert states == [(name, "to be trained") for name in ("wide", "plain", "distilled")]
    assert not Path("runs").exists()
    main(["run", small(overlay(TEACHER, {"student": TEACHER["student"]})), "--quiet"])
    capsys.readouterr()
    assert main(["run", distil(), "--dry-run"]) == 0
    assert re.findall(r"runs/wide-[0-9a-f]{12}: (.*)", capsys.readouterr().out) == ["finished"]


def test_a_dry_run_refuses_what_a_run_would_refuse(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no metric is named 'acuracy'" in refused(capsys, "run", small(), "train.monitor=acuracy", "--dry-run")


# --- errors


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "losses.kd.temprature=2",
            "losses.kd.temprature: kd (plugin kdx_logit) has no such option; did you mean 'temp",
        ),
        ("student.use=smal", "student.use: no models component is named 'smal'; did you mean 'small'?"),
        ("train.lr", "override 'train.lr': expected key=value"),
        ("plugins=[none.py]", "plugins[0]: there is no file"),
    ],
)
def test_an_error_is_one_readable_message(override: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(capsys, "run", distil(), override)
    assert message in text
    assert len(text.strip().splitlines()) == 1


def test_a_config_that_is_not_there_is_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("run", "explain"):
        assert "cannot read config none.yaml: No such file" in refused(capsys, command, "none.yaml")


@pytest.mark.parametrize(("seeds", "message"), [("0,a", "expected whole numbers"), ("1,1", "names a seed twice")])
def test_wrong_seeds_are_a_message(seeds: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, "run", small(), "--seeds", seeds)


def test_debug_shows_where_an_error_comes_from() -> None:
    with pytest.raises(kdx.ConfigError, match="cannot read config"):
        main(["run", "none.yaml", "--debug"])


BROKEN = """
import kdx


class Broken(kdx.Loss):
    name = "broken"
    inputs = {"student": "student.logits"}

    def forward(self, student):
        if len(student) > 2:
            raise ZeroDivisionError("no batch of this size")
        return student.mean()


@kdx.hookimpl
def kdx_losses():
    return [Broken]
"""


def test_a_bug_in_a_plugin_ends_with_1_and_names_the_place(capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken.py").write_text(BROKEN)
    config = small({"plugins": [*PLAIN["plugins"], "broken.py"], "losses": {"mine": {"use": "broken"}}})
    assert main(["run", config, "--quiet"]) == 1
    text = capsys.readouterr().err
    assert "ZeroDivisionError: no batch of this size\nin losses.mine (broken, plugin broken.py)" in text
    assert "--debug" in text
    assert "Traceback" not in text
    with pytest.raises(ZeroDivisionError):
        main(["run", config, "--quiet", "--debug"])


INTERRUPT = """
import kdx


@kdx.hookimpl
def kdx_step_end(report):
    raise KeyboardInterrupt
"""


def test_an_interrupt_is_a_message_and_130(capsys: pytest.CaptureFixture[str]) -> None:
    Path("interrupt.py").write_text(INTERRUPT)
    assert main(["run", small({"plugins": [*PLAIN["plugins"], "interrupt.py"]}), "--quiet"]) == 130
    text = capsys.readouterr().err
    assert "interrupted" in text
    assert "Traceback" not in text


# --- explain


def test_explain_shows_the_plan_and_what_is_not_built(capsys: pytest.CaptureFixture[str]) -> None:
    layer = {"teachers": {"idle": {"use": "small"}}, "losses": {"kd": {"inputs": {"teacher": "wide.logits"}}}}
    assert main(["explain", distil(layer)]) == 0
    text = capsys.readouterr().out
    for word in ("teachers.wide", "align.mid", "losses.hint", "student.mid"):
        assert word in text
    assert "not built, because no loss needs it: teachers.idle" in text
    assert not Path("runs").exists()


def test_the_text_of_a_plan_is_made_for_diff(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for override in ("seed=0", "seed=1", "losses.kd.temperature=9"):
        assert main(["explain", distil(), override, "--text"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    changed = set(texts[2].splitlines()) ^ set(texts[0].splitlines())
    assert {line.strip() for line in changed} == {"reads temperature = 2", "reads temperature = 9"}


def test_a_flow_chart_declares_every_node_that_it_connects(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", distil(), "--mermaid"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("flowchart LR\n")
    declared = set(re.findall(r"^\s*(n_\w+)[\[({]", text, re.M))
    arrows = re.findall(r"^\s*(n_\w+) --.*> (n_\w+)$", text, re.M)
    assert len(arrows) >= 8
    assert {name for arrow in arrows for name in arrow} <= declared
    assert text.count("subgraph") == 2


def test_explain_lists_what_can_be_tapped(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", distil(), "--taps", "wide"]) == 0
    assert "second" in capsys.readouterr().out
    assert "the config has no model 'wdie'; did you mean 'wide'?" in refused(
        capsys, "explain", distil(), "--taps", "wdie"
    )


# --- plugins


def test_plugins_are_listed_with_what_they_supply(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "--plugin", PLAIN["plugins"][0]]) == 0
    text = capsys.readouterr().out
    for word in ("kdx.builtin", "kdx_logit", "small_plugin.py", "entropy_temperature", "halves"):
        assert word in text


def test_a_component_is_shown_with_its_inputs_knobs_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "kd"]) == 0
    text = capsys.readouterr().out
    for word in ("losses: kd", "Hinton", "temperature", "above 0", "teacher.logits", "weight"):
        assert word in text


def test_a_component_that_is_unknown_is_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no component is named 'confidnce_mean'; did you mean 'confidence_mean'?" in refused(
        capsys, "plugins", "confidnce_mean"
    )
