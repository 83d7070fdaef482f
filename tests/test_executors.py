"""Facts of how the trials of a study are carried out: side by side, in processes, on Ray, and when something dies."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
import yaml
from small_run import CASCADE, DISTIL, PLAIN, dying, lines_of, prepared, quiet, weights_of, write_config

from kdx.checkpoint import load_state
from kdx.cli import STOPPED, main
from kdx.errors import ConfigError
from kdx.executors import Finding, Unit, _parcels, carry_out_study
from kdx.processes import Processes, shares
from kdx.runs import Stopped
from kdx.study import Outcome, Trial, plan_study, read_study

VARIANTS = {"full": {}, "no_hint": {"losses": {"hint": None}}, "hot": {"losses": {"kd": {"temperature": 8}}}}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, as workers have: with another number sums are rounded otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    write_config(Path("base.yaml"), CASCADE)
    yield
    torch.set_num_threads(threads)


def trials(out: str, variants: dict[str, Any] = VARIANTS, seeds: Sequence[int] = (0,)) -> list[Trial]:
    content = {"base": "base.yaml", "seeds": [*seeds], "variants": variants}
    Path("study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    found, _ = plan_study(read_study(Path("study.yaml")), quiet(), [f"out={out}"])
    return found


def carried_out(chosen: list[Trial], **ways: Any) -> tuple[list[Outcome], list[int]]:
    """The outcomes, and how many were known each time that somebody was told."""
    told: list[int] = []
    outcomes = carry_out_study(chosen, quiet(), lambda found, left: told.append(len(found)), **ways)
    return outcomes, told


def same_students(one: str, other: str, outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        mine, own = weights_of(Path(one) / outcome.folder), weights_of(Path(other) / outcome.folder)
        assert all(torch.equal(mine[name], own[name]) for name in mine)
        assert lines_of(Path(one) / outcome.folder) == lines_of(Path(other) / outcome.folder)


def test_side_by_side_and_one_by_one_find_the_same() -> None:
    outcomes, told = carried_out(trials("together", seeds=(0, 1)))
    alone, _ = carried_out(trials("alone", seeds=(0, 1)), fan_out=False)
    assert [(one.variant, one.seed) for one in outcomes] == [(name, seed) for seed in (0, 1) for name in VARIANTS]
    assert [one.result and one.result.best for one in outcomes] == [one.result and one.result.best for one in alone]
    assert told == [1, 2, 3, 4, 5, 6]
    same_students("together", "alone", outcomes)


def test_there_are_as_many_units_as_jobs_whatever_the_sizes_of_the_groups() -> None:
    layers = [{"losses": {"kd": {"temperature": degrees}}} for degrees in (1, 2, 3, 4, 5)]
    ready = dict(enumerate(prepared(DISTIL, layer) for layer in [*layers, {"train": {"batch": 6}}]))
    for jobs, expected in ((1, [1, 5]), (3, [1, 2, 3]), (5, [1, 1, 1, 1, 2]), (9, [1] * 6)):
        found = [*_parcels(ready, True, jobs)]
        assert sorted(map(len, found)) == expected
        assert sorted(place for parcel in found for place in parcel) == [*ready]


def test_what_is_finished_is_not_trained_again_and_what_is_new_is() -> None:
    carried_out(trials("runs"))
    times = {path: path.stat().st_mtime_ns for path in Path("runs").glob("*/student.safetensors")}
    outcomes, _ = carried_out(trials("runs", {**VARIANTS, "cold": {"losses": {"kd": {"temperature": 1}}}}))
    assert all(outcome.result is not None for outcome in outcomes)
    assert len(outcomes) == 4
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())


def test_a_trial_that_cannot_be_prepared_is_told_and_the_others_go_on() -> None:
    chosen = trials("runs")
    chosen[1] = Trial("broken", 0, {**chosen[1].config, "losses": {"ce": {"use": "no_such_loss"}}})
    outcomes, _ = carried_out(chosen)
    assert [outcome.result is None for outcome in outcomes] == [False, True, False]
    assert "no_such_loss" in outcomes[1].reason


@pytest.mark.slow
def test_processes_find_what_this_process_finds() -> None:
    outcomes, told = carried_out(trials("apart"), jobs=2, execute=Processes(2))
    carried_out(trials("here"), fan_out=False)
    assert [outcome.reason for outcome in outcomes] == ["", "", ""]
    assert told == [1, 2, 3]
    same_students("apart", "here", outcomes)


@pytest.mark.slow
def test_a_unit_whose_process_dies_once_is_begun_again_and_goes_on(tmp_path: Path) -> None:
    write_config(Path("base.yaml"), CASCADE, {"runtime": {"workers": 1}})  # a process may have processes of its own
    chosen = trials("runs", {"dies": dying(tmp_path / "mark")})
    outcomes, _ = carried_out(chosen, execute=Processes(1))
    assert outcomes[0].reason == ""
    assert (tmp_path / "mark").exists()


@pytest.mark.slow
def test_a_trial_whose_process_always_dies_fails_and_those_beside_it_do_not(tmp_path: Path) -> None:
    chosen = trials("runs", {"full": {}, "dies": dying(tmp_path / "mark", always=True)})
    outcomes, _ = carried_out(chosen, execute=Processes(2))
    assert outcomes[0].result is not None
    assert outcomes[1].reason == "its process died 2 times, at last with exit code 9"


@pytest.mark.slow
def test_needs_are_trained_before_the_units_that_wait_for_them_and_all_say_how_they_go() -> None:
    layers: list[list[str]] = []
    lines: list[str] = []

    def execute(units: Sequence[Unit], found: Callable[[Finding], None], stop: Callable[[], bool]) -> None:
        layers.append([str(config["name"]) for unit in units for config in unit.configs.values()])
        Processes(1, lines.append)(units, found, stop)

    outcomes, _ = carried_out(trials("runs", {"full": {}}), execute=execute)
    assert [sorted(layer) for layer in layers] == [["plain", "wide"], ["study"]]
    assert "[1] wide, seed 0: begins" in lines
    assert any(line.startswith("[1] study / full: epoch 2/2, val accuracy") for line in lines)
    assert outcomes[0].result is not None


@pytest.mark.slow
def test_a_study_that_is_asked_to_stop_stops_its_processes_and_goes_on_later() -> None:
    write_config(Path("base.yaml"), CASCADE, {"train": {"updates": 300}})
    chosen = trials("runs", {"full": {}})
    carried_out([Trial("plain", 0, {**chosen[0].config, "train": {**chosen[0].config["train"], "updates": 6}})])
    asked: list[None] = []

    def stop() -> bool:
        asked.append(None)
        return len(asked) > 4

    with pytest.raises(Stopped):
        carry_out_study(chosen, quiet(stop=stop), lambda found, left: None, execute=Processes(1))
    outcomes, _ = carried_out(chosen)
    assert outcomes[0].result is not None


def test_no_jobs_are_refused() -> None:
    with pytest.raises(ConfigError, match="--jobs: found 0, expected 1 or more"):
        Processes(0)


@pytest.mark.slow
def test_the_command_takes_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    write_config(Path("base.yaml"), PLAIN)
    trials("runs", {"full": {}, "slow": {"train": {"lr": 0.01}}})
    assert main(["ablate", "study.yaml", "--jobs", "2", "--quiet"]) == 0
    assert "[2/2]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--jobs", "0"], "--jobs: found 0, expected 1 or more"),
        (["--gpus", "1"], "--cpus, --gpus: only tasks of Ray have them"),
    ],
)
def test_flags_that_mean_nothing_are_refused(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(Path("base.yaml"), PLAIN)
    trials("runs", {"full": {}})
    assert main(["ablate", "study.yaml", *flags]) == 2
    assert message in capsys.readouterr().err


def test_processes_take_the_gpus_that_this_one_sees_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {share.gpu for share in shares(2)} == {None} or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [share.gpu for share in shares(3)] == ["3", "5", "3"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [share.gpu for share in shares(3)] == ["0", "1", "0"]
    assert all(share.threads >= 1 for share in shares(1000))


def at_work(tmp_path: Path) -> subprocess.Popen[bytes]:
    """A study of one long trial in a process of its own, in a session of its own; the trial has begun to train."""
    write_config(Path("base.yaml"), PLAIN, {"train": {"updates": 30000}})
    trials("runs", {"full": {}, "slow": {"train": {"lr": 0.01}}})
    words = [sys.executable, "-m", "kdx", "ablate", "study.yaml", "--jobs", "2", "--no-fanout", "--quiet"]
    process = subprocess.Popen(words, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: len([*tmp_path.glob("runs/study-*/checkpoint/last.pt")]) == 2)
    return process


def wait_for(holds: Callable[[], bool]) -> None:
    ends = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < ends, "it took too long"
        time.sleep(0.1)


def steps_saved(tmp_path: Path) -> list[int]:
    states = [load_state(path) for path in sorted(tmp_path.glob("runs/study-*/checkpoint"))]
    return [int(state["step"]) for state in states if state is not None]


@pytest.mark.slow
def test_ctrl_c_reaches_all_processes_of_a_terminal_and_each_of_them_saves(tmp_path: Path) -> None:
    process = at_work(tmp_path)
    before = steps_saved(tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == STOPPED
    after = steps_saved(tmp_path)
    assert all(now >= then for now, then in zip(after, before, strict=True))
    lines = [lines_of(folder)[-1]["step"] for folder in sorted(tmp_path.glob("runs/study-*"))]
    assert lines == after, "what was trained last has been saved"


@pytest.mark.slow
def test_processes_whose_command_was_killed_save_and_end(tmp_path: Path) -> None:
    process = at_work(tmp_path)
    process.kill()
    process.wait(60)
    locks = [filelock.FileLock(path.parent / f".{path.name}.lock") for path in tmp_path.glob("runs/study-*")]
    assert len(locks) == 2
    for lock in locks:
        lock.acquire(timeout=60)
        lock.release()
    lines = [lines_of(folder)[-1]["step"] for folder in sorted(tmp_path.glob("runs/study-*"))]
    assert lines == steps_saved(tmp_path)


# --- Ray

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")


@pytest.fixture(scope="module")
def ray_of_two() -> Any:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


@needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_workers_of_ray_find_what_this_process_finds_and_one_may_die(tmp_path: Path, ray_of_two: Any) -> None:
    from kdx.ray_executor import Ray

    variants = {**VARIANTS, "dies": dying(tmp_path / "mark")}
    outcomes, _ = carried_out(trials("ray", variants), fan_out=False, jobs=2, execute=Ray())
    assert [outcome.reason for outcome in outcomes] == [""] * 4
    assert (tmp_path / "mark").exists()
    carried_out(trials("here"), fan_out=False)
    same_students("ray", "here", outcomes[:3])


@needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_study_on_ray_that_is_asked_to_stop_saves(tmp_path: Path, ray_of_two: Any) -> None:
    from kdx.ray_executor import Ray

    write_config(Path("base.yaml"), PLAIN, {"train": {"updates": 30000}})
    chosen = trials("runs", {"full": {}})
    begun: list[bool] = []

    def stop() -> bool:
        begun[:] = [bool([*tmp_path.glob("runs/study-*/checkpoint/last.pt")])]
        return begun[0]

    with pytest.raises(Stopped):
        carry_out_study(chosen, quiet(stop=stop), lambda found, left: None, execute=Ray())
    (folder,) = tmp_path.glob("runs/study-*")
    assert [lines_of(folder)[-1]["step"]] == steps_saved(tmp_path)


@needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_no_machine_of_ray_has_is_refused(ray_of_two: Any) -> None:
    from kdx.ray_executor import Ray

    chosen = trials("runs", {"full": {}})
    with pytest.raises(ConfigError, match=r"--cpus 64 --gpus 0: no machine has them \(there are: 2 CPUs and 0 GPUs\)"):
        carried_out(chosen, execute=Ray(64))


def test_without_ray_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from kdx.errors import KdxError
    from kdx.ray_executor import Ray

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(KdxError, match=r"pip install 'kdx\[ray\]'"):
        Ray()
