"""Files that outlive what happens to a disk and to a process: altered ones, full disks, locks, signals."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
from rich.console import Console
from small_run import (
    DISTIL,
    PLAIN,
    STATEFUL,
    Command,
    config_of,
    prepared,
    quiet,
    run_in,
    server,
    session_of,
    write_config,
)
from torch import Tensor, nn

import kdx
from kdx.checkpoint import check_best, checked_sum, load_state, read_weights, save_state, save_weights
from kdx.errors import CheckpointError, KdxError
from kdx.files import full_disk_is_said, remove_folder, write_file
from kdx.result import Result, from_json, read_result, to_json
from kdx.runs import Options, Stopped, carry_out

LONG = config_of(
    PLAIN, {"name": "long", "train": {"updates": 240, "steps_per_epoch": 20, "save": 2, "save_minutes": None}}
)


# --- checksums


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0x04]) + content[place + 1 :]


def net_of(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_no_altered_bit_of_a_file_of_weights_gives_other_weights(tmp_path: Path) -> None:
    path, net = tmp_path / "a.safetensors", net_of(0)
    save_weights(net, path, {"about": "größer"})
    content, found = path.read_bytes(), 0
    for place in range(0, len(content), 5):
        path.write_bytes(flipped(content, place))
        os.utime(path, ns=(place, place))  # so that no earlier look at it is taken for this one
        try:
            assert equal(read_weights(path), dict(net.state_dict())), f"byte {place}"
        except CheckpointError:
            found += 1
    assert found > 0.9 * len(range(0, len(content), 5))


def test_weights_of_others_have_no_checksum_and_are_read(tmp_path: Path) -> None:
    import safetensors.torch

    safetensors.torch.save_file(net_of(0).state_dict(), tmp_path / "a.safetensors")
    assert checked_sum(tmp_path / "a.safetensors") is None
    assert equal(read_weights(tmp_path / "a.safetensors"), dict(net_of(0).state_dict()))


def test_an_altered_state_dict_of_torch_is_named(tmp_path: Path) -> None:
    torch.save(net_of(0).state_dict(), tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    value = net_of(0).state_dict()["0.weight"].numpy().tobytes()
    (tmp_path / "a.pt").write_bytes(flipped(content, content.index(value) + 9))
    with pytest.raises(CheckpointError, match=r"a\.pt is no readable file of weights: its part .* is altered"):
        read_weights(tmp_path / "a.pt")


def test_no_altered_bit_of_a_state_gives_another_state(tmp_path: Path) -> None:
    for step in (1, 2):
        save_state(tmp_path, {"step": step, "weights": torch.full((20,), float(step))})
    content = (tmp_path / "last.pt").read_bytes()
    before = (tmp_path / "previous.pt").read_bytes()
    passed_over = 0
    for place in range(0, len(content), 29):
        (tmp_path / "last.pt").write_bytes(flipped(content, place))
        (tmp_path / "previous.pt").write_bytes(before)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*last.pt is not usable")
            state = load_state(tmp_path)
        assert state is not None
        assert torch.equal(state["weights"], torch.full((20,), float(state["step"])))
        passed_over += state["step"] == 1
    assert passed_over > 10


def test_a_kill_between_the_renames_of_a_save_leaves_the_state_before(tmp_path: Path) -> None:
    for step in (1, 2):
        save_state(tmp_path, {"step": step})
    (tmp_path / "last.pt").replace(tmp_path / "previous.pt")  # the first of the two
    state = load_state(tmp_path)
    assert state is not None
    assert state["step"] == 2
    save_state(tmp_path, {"step": 3})
    assert torch.load(tmp_path / "previous.pt", weights_only=True)["step"] == 2


def test_a_state_whose_best_student_is_altered_is_passed_over(tmp_path: Path) -> None:
    for step in (1, 2):
        digest = save_weights(net_of(step), tmp_path / f"best-{step}.safetensors")
        save_state(tmp_path, {"step": step, "best_file": [f"best-{step}.safetensors", digest]})
    path = tmp_path / "best-2.safetensors"
    path.write_bytes(flipped(path.read_bytes(), path.stat().st_size - 3))
    with pytest.warns(UserWarning, match=r"last\.pt is not usable: .*best-2\.safetensors is altered.*previous"):
        state = load_state(tmp_path)
    assert state is not None
    assert state["step"] == 1


def test_the_best_student_of_another_moment_is_not_taken(tmp_path: Path) -> None:
    digest = save_weights(net_of(1), tmp_path / "best-1.safetensors")
    assert check_best(tmp_path, "best-1.safetensors", digest) == tmp_path / "best-1.safetensors"
    save_weights(net_of(2), tmp_path / "best-1.safetensors")
    with pytest.raises(CheckpointError, match="is not the best student so far: it has another checksum"):
        check_best(tmp_path, "best-1.safetensors", digest)
    with pytest.raises(CheckpointError, match="is missing"):
        check_best(tmp_path, "best-3.safetensors", digest)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> kdx.RunResult:
    return run_in(tmp_path_factory.mktemp("finished"), STATEFUL)


def test_an_altered_number_of_a_result_is_named(finished: kdx.RunResult) -> None:
    text = (finished.folder / "result.json").read_text()
    assert from_json(text) == read_result(finished.folder)
    data = json.loads(text)
    data["best"]["test"]["accuracy"] = 0.999
    with pytest.raises(CheckpointError, match="here: altered: it does not say what its sha256 is of"):
        from_json(json.dumps(data), "here")


def test_a_result_without_a_checksum_is_one_of_an_earlier_version(finished: kdx.RunResult) -> None:
    data = json.loads(to_json(finished.result))
    del data["sha256"]
    found: Result = from_json(json.dumps(data))
    assert found == finished.result


def test_altered_lines_of_metrics_are_named_before_a_run_goes_on(tmp_path: Path) -> None:
    found = prepared(STATEFUL, {"out": str(tmp_path)})
    asked = iter(range(100))
    with pytest.raises(Stopped):
        carry_out(found, quiet(stop=lambda: next(asked) >= 3))
    lines = found.folder / "metrics.jsonl"
    lines.write_text(lines.read_text().replace('"step": 1,', '"step": 2,', 1))
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is altered: the lines up to update \d are not those"):
        carry_out(found, quiet())
    lines.unlink()
    assert carry_out(found, quiet()).status == "finished"


# --- full disks


def limited(arguments: tuple[str, ...], folder: str, size: int) -> None:
    """`kdx` in a process whose files may not grow beyond `size` bytes."""
    from small_run import _command

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    _command(arguments, folder)


@pytest.mark.slow
def test_a_full_disk_ends_a_run_with_a_message_and_it_goes_on_when_there_is_room(tmp_path: Path) -> None:
    config = write_config(tmp_path / "long.yaml", LONG, {"out": str(tmp_path / "runs")})
    found = prepared(LONG, {"out": str(tmp_path / "runs")})
    process = server().Process(target=limited, args=(("run", str(config), "--quiet"), str(tmp_path), 28_000))
    process.start()
    process.join(100)
    text = (tmp_path / "output.txt").read_text()
    assert process.exitcode == 2, text
    assert "no file may grow so large here" in text
    assert "Traceback" not in text
    assert "intact" in text or "as it was before" in text
    state = load_state(found.folder / "checkpoint")
    assert state is not None
    assert 0 < state["step"] < 240
    carry_out(found, quiet())
    whole = run_in(tmp_path / "whole", LONG)
    assert (found.folder / "metrics.jsonl").read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()
    assert checked_sum(found.folder / "student.safetensors") == checked_sum(whole.folder / "student.safetensors")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_metrics_that_do_not_fit_are_a_message(tmp_path: Path) -> None:
    found = prepared(PLAIN, {"out": str(tmp_path)})
    found.folder.mkdir()
    (found.folder / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(KdxError, match=r"cannot write into .*small-\w+: no space is left on the device"):
        carry_out(found, quiet())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_said_whoever_writes(tmp_path: Path) -> None:
    def write() -> None:
        with full_disk_is_said(tmp_path), open("/dev/full", "wb") as file:
            file.write(b"x")

    with pytest.raises(KdxError, match=r"cannot write into .*: no space is left .*; what was saved before is intact"):
        write()
    with pytest.raises(FileNotFoundError), full_disk_is_said(tmp_path):
        (tmp_path / "none").read_bytes()


def test_the_file_before_is_kept_whatever_happens_to_the_new_one(tmp_path: Path) -> None:
    path, kept = tmp_path / "a", tmp_path / "b"
    for text in (b"1", b"2"):
        write_file(path, lambda file, text=text: file.write(text), keep=kept)
    assert (path.read_bytes(), kept.read_bytes()) == (b"2", b"1")

    def fails(file: io.BufferedIOBase) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_file(path, fails, keep=kept)
    assert (path.read_bytes(), kept.read_bytes()) == (b"2", b"1")
    path.unlink()  # as a kill between the two renames leaves them
    write_file(path, lambda file: file.write(b"3"), keep=kept)
    assert (path.read_bytes(), kept.read_bytes()) == (b"3", b"1")


# --- two commands, and what they are told


def test_a_fresh_command_begins_a_folder_once_and_goes_on_with_it_when_it_is_started_again(tmp_path: Path) -> None:
    run_in(tmp_path, DISTIL)
    asked = iter(range(100))
    found = prepared(DISTIL, {"out": str(tmp_path)})
    first = quiet(fresh=True, stop=lambda: next(asked) >= 4)
    with pytest.raises(Stopped):
        carry_out(found, first)
    assert not (found.folder / "result.json").exists(), "it did not begin afresh"
    again = Options(fresh=True, console=Console(file=io.StringIO(), width=200), command=first.command)
    carry_out(found, again)
    assert "goes on after update" in again.console.file.getvalue()  # type: ignore[attr-defined]
    other = Options(fresh=True, console=Console(file=io.StringIO(), width=200))
    carry_out(found, other)
    assert "goes on" not in other.console.file.getvalue()  # type: ignore[attr-defined]


def test_a_folder_that_was_half_taken_away_is_taken_away_whole(tmp_path: Path) -> None:
    (tmp_path / ".run.old").mkdir()  # as a kill while it was removed leaves it
    (tmp_path / ".run.old" / "rest").write_text("")
    (tmp_path / "run").mkdir()
    remove_folder(tmp_path / "run")
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait_for_another_process(tmp_path: Path, number: int) -> None:
    found = prepared(PLAIN, {"out": str(tmp_path / "runs")})
    config = write_config(tmp_path / "a.yaml", PLAIN, {"out": str(tmp_path / "runs")})
    found.folder.parent.mkdir()
    with filelock.FileLock(found.folder.parent / f".{found.folder.name}.lock"):
        command = Command("run", str(config), folder=tmp_path)
        waits_for(lambda: "another process works on it; waiting" in read(command.output), command)
        assert command.process.pid is not None
        os.kill(command.process.pid, number)
        assert command.wait() == 75, command.output.read_text()
    assert "stopped while another process works on it" in command.output.read_text()


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def waits_for(condition: Callable[[], bool], command: Command) -> None:
    end = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < end
        assert command.process.is_alive(), command.output.read_text()
        time.sleep(0.01)


@pytest.mark.slow
def test_a_signal_in_the_middle_of_an_epoch_saves_at_once(tmp_path: Path) -> None:
    endless: dict[str, Any] = {"train": {"updates": 10**6, "steps_per_epoch": 10**6, "save_minutes": None}}
    found = prepared(PLAIN, endless, {"out": str(tmp_path / "runs")})
    config = write_config(tmp_path / "a.yaml", PLAIN, endless, {"out": str(tmp_path / "runs")})
    command = Command("run", str(config), "--quiet", folder=tmp_path)
    waits_for((found.folder / "metrics.jsonl").exists, command)
    time.sleep(0.2)
    assert command.process.pid is not None
    os.kill(command.process.pid, signal.SIGTERM)
    assert command.wait() == 75, command.output.read_text()
    state = load_state(found.folder / "checkpoint")
    assert state is not None
    assert f"stopped after update {state['step']} of 1000000" in command.output.read_text()


# --- data


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")
def test_the_batch_of_an_update_depends_on_the_seed_alone() -> None:
    """Not on the number of workers, and not on where reading began."""
    config = config_of(DISTIL, {"data": {"views": {"still": {"flip": False}}}})
    here = session_of(config)
    expected = [here.feed.at(step) for step in range(8)]
    assert not torch.equal(expected[0]["image"], expected[3]["image"])
    for workers in (1, 4):
        for first in (0, 2, 4):  # an epoch has three updates
            there = session_of(config, {"runtime": {"workers": workers}})
            for step in range(first, 8):
                batch = there.feed.at(step)
                assert all(torch.equal(batch[name], value) for name, value in expected[step].items()), (workers, step)


def test_minutes_between_saves_are_above_zero_and_count_for_no_hash() -> None:
    with pytest.raises(kdx.ConfigError, match=r"train\.save_minutes: found 0.*expected a number above 0, or null"):
        prepared(PLAIN, {"train": {"save_minutes": 0}})
    hashes = {prepared(PLAIN, {"train": {"save_minutes": minutes}}).hash for minutes in (1, 2.5, 10)}
    assert hashes == {prepared(PLAIN).hash}
