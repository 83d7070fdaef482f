"""Facts of `kdx/runs.py`: folders, runs that need runs, and runs that are stopped, killed and taken up again."""

from __future__ import annotations

import io
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
from rich.console import Console
from small_plugin import made_images
from small_run import (
    CASCADE,
    DISTIL,
    PLAIN,
    STATEFUL,
    TEACHER,
    config_of,
    folders,
    lines_of,
    prepared,
    quiet,
    run_in,
    weights_of,
)
from torch import nn

import kdx
from kdx.config import load, overlay
from kdx.result import read_result
from kdx.runs import Options, build_plan, carry_out, family, prepare


def touched(folder: Path) -> dict[str, tuple[int, bytes]]:
    """What tells whether a run was trained again."""
    return {name: ((folder / name).stat().st_mtime_ns, (folder / name).read_bytes())
            for name in ("metrics.jsonl", "student.safetensors", "result.json")}  # fmt: skip


def only(runs: Path, name: str) -> Path:
    (found,) = [path for path in runs.iterdir() if path.is_dir() and path.name.rpartition("-")[0] == name]
    return found


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> kdx.RunResult:
    return run_in(tmp_path_factory.mktemp("runs"), CASCADE)


def test_a_run_leaves_a_complete_folder(cascade: kdx.RunResult) -> None:
    names = {path.name for path in cascade.folder.iterdir()}
    assert names >= {
        "config.yaml", "plan.txt", "environment.json", "metrics.jsonl", "events", "checkpoint", "student.safetensors",
        "result.json", "report.md", "report.html", "curves.png", "confusion.png",
    }  # fmt: skip
    assert not [name for name in names if name.startswith(".") or name.endswith(".new")]
    kept = {path.name for path in (cascade.folder / "checkpoint").iterdir()}
    assert kept == {"last.pt", "previous.pt", f"best-{cascade.result.best.step}.safetensors"}


def test_a_run_trains_its_teacher_and_its_plain_student_first(cascade: kdx.RunResult) -> None:
    assert folders(cascade.folder.parent) == ["distilled", "plain", "wide"]
    ends = [(only(cascade.folder.parent, name) / "result.json").stat().st_mtime_ns
            for name in ("wide", "plain", "distilled")]  # fmt: skip
    assert ends == sorted(ends)


def test_a_teacher_has_the_weights_of_its_run(cascade: kdx.RunResult) -> None:
    found = prepared(CASCADE, {"out": str(cascade.folder.parent)})
    own = build_plan(found, quiet(), trained=True).teachers["wide"].network.net.state_dict()
    kept = weights_of(only(cascade.folder.parent, "wide"))
    assert all(torch.equal(own[name], kept[name]) for name in kept)


def test_the_resolved_config_in_the_folder_is_the_same_run(cascade: kdx.RunResult) -> None:
    again = prepare(load(cascade.folder / "config.yaml"), quiet())
    assert again.folder.name == cascade.folder.name
    assert again.spec.root == again.spec.root


def test_a_finished_run_is_taken_as_it_is(cascade: kdx.RunResult) -> None:
    before = {name: touched(only(cascade.folder.parent, name)) for name in folders(cascade.folder.parent)}
    console = Console(file=io.StringIO())
    found = prepared(CASCADE, {"out": str(cascade.folder.parent)})
    result = carry_out(found, Options(console=console))
    assert result == cascade.result
    assert f"{cascade.folder.name}: finished before, taken as it is" in console.file.getvalue()  # type: ignore[attr-defined]
    assert before == {name: touched(only(cascade.folder.parent, name)) for name in folders(cascade.folder.parent)}


def test_another_student_of_the_same_teacher_does_not_train_it_again(cascade: kdx.RunResult) -> None:
    runs = cascade.folder.parent
    teacher, plain = (touched(only(runs, name)) for name in ("wide", "plain"))
    other = run_in(runs, CASCADE, {"name": "other", "losses": {"kd": {"temperature": 5.0}}, "baseline": False})
    assert other.result.hash != cascade.result.hash
    assert touched(only(runs, "wide")) == teacher
    assert touched(only(runs, "plain")) == plain


def test_a_teacher_that_two_models_come_from_is_trained_once_even_when_fresh(tmp_path: Path) -> None:
    twice = {"teachers": {"wide2": {"run": TEACHER}},
             "losses": {"kd": {"inputs": {"teacher": "wide.logits"}},
                        "kd2": {"use": "kd", "inputs": {"teacher": "wide2.logits"}}}}  # fmt: skip
    console = Console(file=io.StringIO(), width=200)
    options = Options(console=console, fresh=True)
    for seed in (0, 1):  # as for several seeds on the command line
        carry_out(prepared(CASCADE, {"out": str(tmp_path), "baseline": False, "seed": seed}, twice), options)
    assert console.file.getvalue().count("wide: epoch 1/1") == 1  # type: ignore[attr-defined]
    assert folders(tmp_path) == ["distilled", "distilled", "wide"]


def test_a_teachers_run_computes_where_the_students_does_unless_it_says_otherwise() -> None:
    layer = {"runtime": {"eval_batch": 7, "workers": 1}, "teachers": {"wide": {"run": {"runtime": {"workers": 2}}}}}
    there, here = prepared(CASCADE), prepared(CASCADE, layer)
    need = here.needs["wide"]
    assert (need.spec.runtime.eval_batch, need.spec.runtime.workers) == (7, 2)
    assert need.hash == there.needs["wide"].hash


def test_two_teachers_whose_runs_differ_in_name_alone_are_both_trained() -> None:
    twin = {"teachers": {"twin": {"run": overlay(TEACHER, {"name": "twin"})}},
            "losses": {"kd": {"inputs": {"teacher": "wide.logits"}},
                       "kd2": {"use": "kd", "inputs": {"teacher": "twin.logits"}}}}  # fmt: skip
    names = [one.spec.root.name for one, _ in family(prepared(CASCADE, twin), quiet())]
    assert names == ["wide", "twin", "plain", "distilled"]


def test_fresh_trains_again_and_finds_the_same_numbers(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = run_in(tmp_path, STATEFUL)
        before = touched(first.folder)
        (first.folder / "left_behind").write_text("of an earlier run")
        torch.manual_seed(2)
        again = run_in(tmp_path, STATEFUL, fresh=True)
    after = touched(again.folder)
    assert again.folder == first.folder
    assert all(after[name][0] > before[name][0] for name in before)
    assert after["metrics.jsonl"][1] == before["metrics.jsonl"][1]
    assert after["student.safetensors"][1] == before["student.safetensors"][1]
    assert not (again.folder / "left_behind").exists()


def test_a_run_leaves_the_random_numbers_of_its_caller_alone(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = torch.rand(3)
        torch.manual_seed(3)
        run_in(tmp_path, PLAIN, {"student": {"dropout": 0.3}})
        assert torch.equal(torch.rand(3), expected)


def test_a_run_that_was_done_without_a_plain_student_gets_it_when_it_is_asked_for(tmp_path: Path) -> None:
    alone = run_in(tmp_path, DISTIL)
    assert alone.result.plain is None
    assert "| plain student" not in (alone.folder / "report.md").read_text()
    before = touched(alone.folder)
    compared = run_in(tmp_path, DISTIL, {"baseline": True})
    assert compared.folder == alone.folder
    assert compared.result.plain is not None
    assert read_result(alone.folder) == compared.result
    assert "| plain student" in (alone.folder / "report.md").read_text()
    assert touched(alone.folder)["metrics.jsonl"] == before["metrics.jsonl"]


def test_a_report_that_a_kill_prevented_is_written_when_the_run_is_asked_for_again(cascade: kdx.RunResult) -> None:
    (cascade.folder / "report.html").unlink()
    carry_out(prepared(CASCADE, {"out": str(cascade.folder.parent)}), quiet())
    assert (cascade.folder / "report.html").is_file()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("torn result", "torn or not JSON"),
        ("altered result", "result.json: altered"),
        ("altered student", "student.safetensors is altered"),
        ("no student", None),
    ],
)
def test_a_run_whose_end_is_damaged_is_concluded_again_without_training(
    tmp_path: Path, damage: str, message: str | None
) -> None:
    first = run_in(tmp_path, STATEFUL)
    before = touched(first.folder)
    result, student = first.folder / "result.json", first.folder / "student.safetensors"
    if damage == "no student":
        student.unlink()
    elif damage == "altered student":
        student.write_bytes(student.read_bytes()[:-1] + b"!")
    else:
        text = result.read_text()
        half, other = text[: len(text) // 2], text.replace('"seen": 36', '"seen": 37')
        result.write_text(half if damage == "torn result" else other)
    with nullcontext() if message is None else pytest.warns(UserWarning, match=message):
        again = run_in(tmp_path, STATEFUL)
    after = touched(first.folder)
    assert after["metrics.jsonl"][1] == before["metrics.jsonl"][1]
    assert after["student.safetensors"][1] == before["student.safetensors"][1]
    assert (again.result.best, again.result.last) == (first.result.best, first.result.last)


# --- refused


def bad_checkpoint(folder: Path) -> str:
    torch.save(nn.Linear(2, 2).state_dict(), folder / "other.pt")
    return str(folder / "other.pt")


RAW = {"teachers": {"raw": {"use": "small"}}, "losses": {"kd": {"inputs": {"teacher": "wide.logits"}},
       "kd2": {"use": "kd", "inputs": {"teacher": "raw.logits"}}}}  # fmt: skip
REFUSED = {
    "option of a loss": ({"losses": {"kd": {"temprature": 2.0}}}, "temprature.*did you mean 'temperature'"),
    "component": ({"losses": {"kd": {"use": "kdd"}}}, "no losses component is named 'kdd'"),
    "tap": ({"teachers": {"wide": {"taps": {"mid": "secnd"}}}}, "no module 'secnd'.*did you mean 'second'"),
    "ref": ({"losses": {"hint": {"inputs": {"teacher": "wide.mdi"}}}}, "'mdi'"),
    "classes": (overlay(RAW, {"teachers": {"raw": {"classes": 7}}}), "different numbers of classes"),
    "shapes": ({"losses": {"hint": {"inputs": {"student": "student.mid"}}}}, "put an aligner between them"),
    "optimizer": ({"train": {"optimizer": {"use": "sgd", "momentum": -1.0}}}, "sgd refuses its options"),
    "monitor": ({"train": {"monitor": "acuracy"}}, "no metric is named 'acuracy'; did you mean 'accuracy'"),
    "device": ({"runtime": {"device": "mps" if torch.cuda.is_available() else "cuda"}}, "runtime.device"),
    "labels": ({"data": {"labelled": 1000}}, "data.labelled: found 1000"),
    "teacher's own config": ({"teachers": {"wide": {"run": {"losses": {"ce": {"smooth": 1}}}}}}, "smooth"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_a_teacher_trains_and_leaves_no_folder(tmp_path: Path, case: str) -> None:
    layer, message = REFUSED[case]
    with pytest.raises(kdx.KdxError, match=message):
        run_in(tmp_path / "runs", CASCADE, layer)
    assert folders(tmp_path / "runs") == []


def test_a_checkpoint_that_does_not_fit_is_refused_before_a_teacher_trains(tmp_path: Path) -> None:
    layer = overlay(RAW, {"teachers": {"raw": {"checkpoint": bad_checkpoint(tmp_path)}}})
    with pytest.raises(kdx.CheckpointError, match=r"teachers\.raw\.checkpoint: .* does not fit SmallNet"):
        run_in(tmp_path / "runs", CASCADE, layer)
    assert folders(tmp_path / "runs") == []


def test_a_place_for_runs_that_cannot_be_written_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(kdx.KdxError, match=r"out: nothing can be written into .*runs"):
        run_in(tmp_path / "runs", PLAIN)


# --- two at once


def test_a_run_waits_for_the_one_that_holds_its_lock(tmp_path: Path) -> None:
    found = prepared(PLAIN, {"out": str(tmp_path)})
    console = Console(file=io.StringIO(), width=200)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(carry_out(found, Options(console=console))))
    lock = filelock.FileLock(tmp_path / f".{found.folder.name}.lock")
    with lock:
        thread.start()
        end = time.monotonic() + 20
        while "waiting" not in console.file.getvalue():  # type: ignore[attr-defined]
            assert time.monotonic() < end
            time.sleep(0.01)
        assert not found.folder.exists()
    thread.join(30)
    assert results[0].status == "finished"


# --- modules and data that were handed in


class Flat(nn.Module):
    """Has nothing that could be tapped as `second`."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Linear(64, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.flat(images.flatten(1))


def test_a_student_that_was_handed_in_does_not_stand_in_for_that_of_its_teacher(tmp_path: Path) -> None:
    """Nor for the plain student: that is the same module, from the same first weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Flat()
    teacher = overlay(TEACHER, {"student": {"taps": {"deep": "second"}},
                                "losses": {"deep": {"use": "mse", "inputs": {"student": "student.deep",
                                                                             "teacher": "student.deep"}}}})  # fmt: skip
    config = config_of(CASCADE, {"student": None, "align": None, "losses": {"hint": None},
                                 "teachers": {"wide": {"run": teacher}}})  # fmt: skip
    found = run_in(tmp_path, config, models={"student": net})
    assert set(weights_of(found.folder)) == {"flat.weight", "flat.bias"}
    assert set(weights_of(only(tmp_path, "plain"))) == {"flat.weight", "flat.bias"}
    assert "second.0.weight" in weights_of(only(tmp_path, "wide"))


def test_data_that_was_handed_in_is_that_of_a_teacher_whose_config_says_so(tmp_path: Path) -> None:
    teacher = config_of(TEACHER, {"data": {"use": "tensors"}})
    config = config_of(CASCADE, {"data": None, "baseline": False, "teachers": {"wide": {"run": None}}})
    config["teachers"]["wide"]["run"] = teacher
    config["data"] = {"validation": 12}
    run_in(tmp_path, config, data={"train": made_images(48, 7), "test": made_images(9, 8)})
    assert sum(map(sum, read_result(only(tmp_path, "wide")).confusion)) == 9


def test_a_line_for_every_update_and_evaluation_is_left(cascade: kdx.RunResult) -> None:
    lines = lines_of(cascade.folder)
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [3, 6]
    assert set(lines[0]["terms"]) == {"ce", "kd", "hint", "total"}
