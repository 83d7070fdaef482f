import io
import json
import subprocess
import sys
from pathlib import Path

import pluggy
import pytest
import torch
from rich.console import Console

from kdx import hookspecs
from kdx.builtin.watchers import EVERY, JsonLines, Progress, TensorBoard
from kdx.errors import CheckpointError
from kdx.history import cut, read_history
from kdx.types import Clock, EvalReport, RunInfo, StepReport

PER_EPOCH, STEPS = 40, 120


def run_info(folder: Path, resumed_at: int = 0) -> RunInfo:
    return RunInfo("tiny", folder, "abc", {}, STEPS, PER_EPOCH, resumed_at)


def step_report(step: int) -> StepReport:
    terms = {"ce": torch.tensor(1.0 / step, requires_grad=True), "total": torch.tensor(2.0 / step)}
    return StepReport(
        Clock(step, PER_EPOCH, STEPS), 0.5, terms, {"losses.kd.temperature": torch.tensor(float(step))}, 16
    )


def eval_report(step: int, *, who: str = "student") -> EvalReport:
    clock = Clock(step, PER_EPOCH, STEPS)
    return EvalReport(clock, "val", who, {"accuracy": step / 200, "cross_entropy": float("nan")}, best=step == 80)


def drive(watcher: object, folder: Path, *, first: int = 1, last: int = STEPS, end: bool = True) -> None:
    """Call the hooks of one watcher, as the engine would, through pluggy."""
    manager = pluggy.PluginManager("kdx")
    manager.add_hookspecs(hookspecs)
    manager.register(watcher)
    manager.check_pending()
    run = run_info(folder, first - 1)
    manager.hook.kdx_run_start(run=run)
    for step in range(first, last + 1):
        manager.hook.kdx_step_end(report=step_report(step))
        if step % PER_EPOCH == 0:
            manager.hook.kdx_eval_end(report=eval_report(step))
    if end:
        manager.hook.kdx_run_end(run=run)


def lines_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_update_and_evaluation_gives_one_line(tmp_path):
    drive(JsonLines(tmp_path), tmp_path)
    lines = lines_of(tmp_path)
    assert len(lines) == STEPS + STEPS // PER_EPOCH
    assert lines[1] == {
        "kind": "step",
        "step": 2,
        "epoch": 1,
        "lr": 0.5,
        "terms": {"ce": 0.5, "total": 1.0},
        "knobs": {"losses.kd.temperature": 2.0},
    }
    assert lines[PER_EPOCH] == {
        "kind": "eval",
        "step": 40,
        "epoch": 1,
        "split": "val",
        "who": "student",
        "metrics": {"accuracy": 0.2, "cross_entropy": None},
        "best": False,
    }
    assert [line["best"] for line in lines if line["kind"] == "eval"] == [False, True, False]


def test_the_last_update_of_an_epoch_belongs_to_it(tmp_path):
    drive(JsonLines(tmp_path), tmp_path)
    epochs = {line["step"]: line["epoch"] for line in lines_of(tmp_path)}
    assert (epochs[1], epochs[40], epochs[41], epochs[120]) == (1, 1, 2, 3)


def test_numbers_are_written_only_every_so_many_updates(tmp_path):
    watcher = JsonLines(tmp_path)
    watcher.kdx_run_start(run_info(tmp_path))
    for step in range(1, EVERY):
        watcher.kdx_step_end(step_report(step))
    assert len(watcher._buffer._waiting) == EVERY - 1
    watcher.kdx_step_end(step_report(EVERY))
    assert not watcher._buffer._waiting
    watcher.kdx_run_end(run_info(tmp_path))
    assert [line["step"] for line in lines_of(tmp_path)] == list(range(1, EVERY + 1))


def test_a_tensor_that_the_next_update_overwrites_keeps_its_value_in_the_file(tmp_path):
    watcher, shared = JsonLines(tmp_path), torch.zeros(())
    watcher.kdx_run_start(run_info(tmp_path))
    for step in range(1, 4):
        shared.fill_(step)
        watcher.kdx_step_end(StepReport(Clock(step, PER_EPOCH, STEPS), 0.5, {"ce": shared}, {}, 16))
    watcher.kdx_run_end(run_info(tmp_path))
    assert [line["terms"] for line in lines_of(tmp_path)] == [{"ce": 1.0}, {"ce": 2.0}, {"ce": 3.0}]


def test_flush_brings_waiting_updates_onto_the_disk(tmp_path):
    watcher = JsonLines(tmp_path)
    watcher.kdx_run_start(run_info(tmp_path))
    watcher.kdx_step_end(step_report(1))
    assert lines_of(tmp_path) == []
    watcher.flush()
    assert [line["step"] for line in lines_of(tmp_path)] == [1]
    watcher.kdx_run_end(run_info(tmp_path))


@pytest.mark.parametrize("at", [40, 57])
def test_a_resumed_run_leaves_the_file_of_an_undisturbed_one(tmp_path, at):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    drive(JsonLines(whole), whole)
    # Killed some updates after the checkpoint, in the middle of a line.
    first = JsonLines(broken)
    drive(first, broken, last=at + 5, end=False)
    first.flush()
    first._file.close()
    path = broken / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"kind": "step", "st')
    drive(JsonLines(broken), broken, first=at + 1)
    assert path.read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_run_that_starts_afresh_drops_the_lines_of_an_earlier_one(tmp_path):
    drive(JsonLines(tmp_path), tmp_path)
    drive(JsonLines(tmp_path), tmp_path, last=3)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3]


def test_a_file_that_stops_before_the_checkpoint_is_refused(tmp_path):
    drive(JsonLines(tmp_path), tmp_path, last=30)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: readable up to update 30, .* after update 60; delete"):
        cut(tmp_path / "metrics.jsonl", 60)
    assert len(lines_of(tmp_path)) == 30


def test_a_deleted_file_does_not_keep_a_run_from_resuming(tmp_path):
    drive(JsonLines(tmp_path), tmp_path, first=41, last=44)
    assert [line["step"] for line in lines_of(tmp_path)] == [41, 42, 43, 44]


def test_a_reader_skips_a_line_still_being_written_and_refuses_a_spoilt_one(tmp_path):
    drive(JsonLines(tmp_path), tmp_path, last=2)
    path = tmp_path / "metrics.jsonl"
    text = path.read_text()
    path.write_text(text + '{"kind": "st')
    assert [line.step for line in read_history(tmp_path).steps] == [1, 2]
    path.write_text('{"kind": "sleep", "step": 1, "epoch": 1}\n' + text)
    with pytest.raises(CheckpointError, match="line 1: found kind 'sleep'"):
        read_history(tmp_path)
    path.write_text(text + "nonsense\n")
    with pytest.raises(CheckpointError, match="line 3: not a line of"):
        read_history(tmp_path)


def test_tensorboard_holds_terms_knobs_rate_and_metrics(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watcher = TensorBoard(tmp_path)
    drive(watcher, tmp_path, last=45)
    # Resumed after update 40: what was written beyond is purged.
    drive(TensorBoard(tmp_path), tmp_path, first=41, last=42)
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    tags = {"terms/ce", "terms/total", "knobs/losses.kd.temperature", "train/lr", "val/accuracy", "val/cross_entropy"}
    assert set(events.Tags()["scalars"]) == tags
    assert [event.step for event in events.Scalars("terms/ce")] == list(range(1, 43))
    assert events.Scalars("terms/ce")[3].value == pytest.approx(0.25)
    assert [(event.step, event.value) for event in events.Scalars("val/accuracy")] == [(40, pytest.approx(0.2))]


def test_tensorboard_is_loaded_for_the_first_number_that_is_written(tmp_path):
    code = f"""
import sys
from pathlib import Path
from test_watchers import EVERY, drive
from kdx.builtin.watchers import TensorBoard
watcher = TensorBoard(Path({str(tmp_path)!r}))
drive(watcher, watcher.folder, last=EVERY // 2, end=False)
assert "tensorboard" not in sys.modules
watcher.kdx_run_end(None)
assert "tensorboard" in sys.modules
"""
    assert EVERY // 2 < PER_EPOCH
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
    assert len([*(tmp_path / "events").iterdir()]) == 1


def test_off_a_terminal_each_evaluation_is_one_plain_line(tmp_path):
    out = io.StringIO()
    drive(Progress(Console(file=out, width=60), "tiny", False), tmp_path)
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    # The loss is the mean since it was last read, which was at update 50.
    loss = sum(2.0 / step for step in range(EVERY + 1, 81)) / 30
    assert lines[1] == f"tiny: epoch 2/3, val accuracy 40.00 %, loss {loss:.4g}, best"
    assert [line.endswith("best") for line in lines] == [False, True, False]


def test_another_model_is_named_in_its_line(tmp_path):
    out = io.StringIO()
    Progress(Console(file=out, width=60), "tiny", False).kdx_eval_end(eval_report(40, who="committee"))
    assert out.getvalue() == "tiny: epoch 1/3, committee val accuracy 20.00 %\n"


def test_a_terminal_shows_epoch_rate_loss_and_accuracy(tmp_path):
    out = io.StringIO()
    console = Console(file=out, width=140, force_terminal=True, color_system=None)
    drive(Progress(console, "tiny", False), tmp_path)
    shown = out.getvalue()
    for part in ("tiny", "epoch 3/3", "updates/s", "samples/s", "loss 0.0", "val accuracy 60.00 %"):
        assert part in shown


def test_quiet_shows_nothing(tmp_path):
    for terminal in (True, False):
        out = io.StringIO()
        drive(Progress(Console(file=out, force_terminal=terminal), "tiny", True), tmp_path)
        assert out.getvalue() == ""


def test_a_run_that_never_started_can_be_ended(tmp_path):
    watchers = (JsonLines(tmp_path), TensorBoard(tmp_path), Progress(Console(file=io.StringIO()), "tiny", False))
    for watcher in watchers:
        watcher.kdx_run_end(run_info(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_writing_outside_of_a_run_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"metrics\.jsonl: written to before kdx_run_start"):
        JsonLines(tmp_path).kdx_eval_end(eval_report(40))
    with pytest.raises(RuntimeError, match="events: written to before kdx_run_start"):
        TensorBoard(tmp_path).kdx_eval_end(eval_report(40))
