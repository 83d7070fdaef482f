"""Facts of `kdx/resume.py`: a run that was stopped, killed or damaged ends as the undisturbed one does."""

from __future__ import annotations

import io
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from small_run import (
    CASCADE,
    PLAIN,
    STATEFUL,
    Command,
    config_of,
    folders,
    prepared,
    quiet,
    run_in,
    weights_of,
    write_config,
)

import kdx
from kdx.result import read_result
from kdx.runs import Options, Stopped, carry_out

LONG = config_of(
    STATEFUL, {"train": {"updates": 150, "steps_per_epoch": 10}, "runtime": {"threads": 1}, "name": "long"}
)
"""Long enough to be killed at any moment."""


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def same_weights(one: Path, other: Path) -> bool:
    first, second = weights_of(one), weights_of(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def stops_after(updates: int) -> Any:
    asked = iter(range(10**6))
    return lambda: next(asked) >= updates


def stop(runs: Path, updates: int, *layers: dict[str, Any]) -> Path:
    """Run until some updates are done; the folder of the half-finished run."""
    found = prepared(*layers, {"out": str(runs)})
    with pytest.raises(Stopped, match="start it again to go on"):
        carry_out(found, quiet(stop=stops_after(updates)))
    assert not (found.folder / "result.json").exists()
    return found.folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    before = torch.get_num_threads()
    folder = run_in(tmp_path_factory.mktemp("undisturbed"), LONG).folder
    torch.set_num_threads(before)
    return folder


def assert_same_run(folder: Path, undisturbed: Path) -> None:
    assert same_weights(folder, undisturbed)
    assert (folder / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    found, expected = read_result(folder), read_result(undisturbed)
    assert (found.best, found.last, found.confusion) == (expected.best, expected.last, expected.confusion)


@pytest.mark.slow
def test_a_run_that_was_stopped_twice_goes_on_to_the_same_end(tmp_path: Path, undisturbed: Path) -> None:
    folder = stop(tmp_path, 7, LONG)
    at = torch.load(folder / "checkpoint" / "last.pt", weights_only=True)["step"]
    stop(tmp_path, 33, LONG)
    later = torch.load(folder / "checkpoint" / "last.pt", weights_only=True)["step"]
    assert 0 < at < later < 150
    console = Console(file=io.StringIO(), width=200)
    carry_out(prepared(LONG, {"out": str(tmp_path)}), Options(console=console))
    assert f"goes on after update {later} of 150" in console.file.getvalue()  # type: ignore[attr-defined]
    assert_same_run(folder, undisturbed)


def wait_for(path: Path, command: Command, *, lines: int = 0) -> None:
    end = time.monotonic() + 60
    while not path.exists() or (lines and path.read_bytes().count(b"\n") < lines):
        assert time.monotonic() < end
        assert command.process.is_alive(), command.output.read_text()
        time.sleep(0.002)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_end(tmp_path: Path, undisturbed: Path) -> None:
    config = write_config(tmp_path / "long.yaml", LONG, {"out": str(tmp_path / "runs")})
    command = Command("run", str(config), "--quiet", folder=tmp_path)
    folder = prepared(LONG, {"out": str(tmp_path / "runs")}).folder
    wait_for(folder / "metrics.jsonl", command, lines=random.randrange(80))
    time.sleep(random.uniform(0.0, 0.05))
    command.process.kill()
    assert command.wait() == -signal.SIGKILL, "it was finished before it was killed"
    assert not (folder / "result.json").exists()
    carry_out(prepared(LONG, {"out": str(tmp_path / "runs")}), quiet())
    assert_same_run(folder, undisturbed)


@pytest.mark.slow
def test_a_signal_stops_after_the_update_and_the_run_goes_on_later(tmp_path: Path, undisturbed: Path) -> None:
    config = write_config(tmp_path / "long.yaml", LONG, {"out": str(tmp_path / "runs")})
    command = Command("run", str(config), "--debug", folder=tmp_path)
    folder = prepared(LONG, {"out": str(tmp_path / "runs")}).folder
    wait_for(folder / "checkpoint" / "last.pt", command)
    assert command.process.pid is not None
    os.kill(command.process.pid, signal.SIGTERM)
    assert command.wait() == 75, command.output.read_text()
    text = command.output.read_text()
    assert "stopping after this update" in text
    assert "start it again to go on" in text
    assert "Traceback" not in text
    carry_out(prepared(LONG, {"out": str(tmp_path / "runs")}), quiet())
    assert_same_run(folder, undisturbed)


def test_a_stop_while_a_teacher_trains_ends_the_whole_run(tmp_path: Path) -> None:
    found = prepared(CASCADE, {"out": str(tmp_path)})
    with pytest.raises(Stopped, match=r"wide-.*: stopped after update"):
        carry_out(found, quiet(stop=stops_after(1)))
    assert folders(tmp_path) == ["wide"]


def test_a_torn_last_state_is_passed_over_and_the_end_is_the_same(tmp_path: Path, undisturbed: Path) -> None:
    folder = stop(tmp_path, 70, LONG)
    last = folder / "checkpoint" / "last.pt"
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=r"last\.pt is not usable: .*; going on from previous\.pt"):
        carry_out(prepared(LONG, {"out": str(tmp_path)}), quiet())
    assert_same_run(folder, undisturbed)


def test_two_torn_states_are_an_error_that_says_how_to_start_again(tmp_path: Path) -> None:
    folder = stop(tmp_path, 4, PLAIN)
    for name in ("last.pt", "previous.pt"):
        path = folder / "checkpoint" / name
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(kdx.CheckpointError, match=r"last\.pt is not usable.*previous\.pt is not usable.*--fresh"):
        carry_out(prepared(PLAIN, {"out": str(tmp_path)}), quiet())


@pytest.mark.slow
def test_two_processes_with_one_run_train_it_once(tmp_path: Path) -> None:
    config = write_config(tmp_path / "long.yaml", LONG, {"out": str(tmp_path / "runs"), "train": {"updates": 30}})
    commands = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        commands.append(Command("run", str(config), folder=tmp_path / name))
    assert [command.wait() for command in commands] == [0, 0]
    texts = [command.output.read_text() for command in commands]
    assert sum("finished before, taken as it is" in text for text in texts) == 1
    assert sum("another process works on it; waiting" in text for text in texts) == 1
    assert sum("long: epoch 3/3" in text for text in texts) == 1
