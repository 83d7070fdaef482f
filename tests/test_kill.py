"""Runs that are killed at any moment, several times, and started again by the same command: they end as undisturbed.

Real processes and SIGKILL; compared are the bytes of weights and metrics of every run that the command carries out.
"""

from __future__ import annotations

import hashlib
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from small_run import CASCADE, PLUGIN, STATEFUL, TEACHER, Command, config_of, write_config

from kdx.result import read_result

KILLER = PLUGIN.with_name("killing_plugin.py")
EVERY_UPDATE = 1e-9
"""Minutes between saves, so that a kill may also come while a state is written, and loses little."""
COMMON: dict[str, Any] = {
    "plugins": [str(PLUGIN), str(KILLER)],
    "train": {"updates": 24, "steps_per_epoch": 5, "save_minutes": EVERY_UPDATE},
    "runtime": {"threads": 1},
}
RICH = config_of(
    CASCADE,
    STATEFUL,
    COMMON,
    {
        "name": "rich",
        "baseline": True,
        "data": {"views": {"still": {"flip": False}}},
        "student": {"taps": {"mid": "second"}},
        "teachers": {"wide": {"run": config_of(TEACHER, COMMON, {"train": {"updates": 8}})}},
        "targets": {"tau": {"use": "ctkd"}},
        "losses": {
            "kd": {"temperature": "tau"},
            "calm": {"use": "mse", "inputs": {"student": "student@still.logits", "teacher": "wide@still.logits"}},
            "crd": {"use": "crd", "inputs": {"student": "student.mid", "teacher": "wide.mid"}, "weight": 0.1},
        },
        "runtime": {"workers": 2},
    },
)
"""Accumulation, an average, a memory bank and one that grows, a learnt temperature, schedules, views, workers, dropout,
a live teacher that is a run, and a plain student."""
CACHED = config_of(
    CASCADE,
    COMMON,
    {
        "name": "cached",
        "baseline": False,
        "data": {"views": 2},
        "teachers": {"wide": {"cache": True, "run": config_of(TEACHER, COMMON, {"train": {"updates": 4}})}},
        "train": {"updater": {"use": "gradnorm"}},
    },
)
"""A teacher whose answers for two views of each sample are cached, an updater with weights of its own, no workers."""


def started(folder: Path, config: dict[str, Any]) -> Command:
    write_config(folder / "config.yaml", config, {"out": str(folder / "runs")})
    return Command("run", str(folder / "config.yaml"), "--quiet", folder=folder)


def run_folders(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in (folder / "runs").iterdir() if (path / "config.yaml").is_file()}


def digests(folder: Path) -> dict[str, list[str]]:
    return {
        name: [hashlib.sha256((path / file).read_bytes()).hexdigest()
               for file in ("student.safetensors", "metrics.jsonl")]
        for name, path in run_folders(folder).items()
    }  # fmt: skip


def found(folder: Path) -> dict[str, Any]:
    results = {name: read_result(path) for name, path in run_folders(folder).items()}
    return {name: (one.best, one.last, one.confusion, one.agreement) for name, one in results.items()}


def finish(folder: Path, config: dict[str, Any]) -> None:
    command = started(folder, config)
    assert command.wait(120) == 0, command.output.read_text()


def undisturbed(folder: Path, config: dict[str, Any]) -> Path:
    """The same run in one go, without workers and with no save within an epoch, which must change nothing."""
    plain: dict[str, Any] = {"train": {"save_minutes": None}, "runtime": {"workers": 0}}
    finish(folder, config_of(config, plain, {"teachers": {"wide": {"run": plain}}}))
    return folder


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return undisturbed(tmp_path_factory.mktemp("rich"), RICH)


def assert_same(folder: Path, expected: Path) -> None:
    assert digests(folder) == digests(expected)
    assert found(folder) == found(expected)


@pytest.mark.slow
def test_kills_at_every_kind_of_moment_of_every_run_of_a_command_change_nothing(tmp_path: Path, rich: Path) -> None:
    orders = (
        "wide eval 5",
        "wide end 8",
        "plain eval 15",
        "rich eval 10",
        "rich step 12",
        "rich end 24",
    )
    for order in orders:
        (tmp_path / "kill.txt").write_text(order)
        command = started(tmp_path, RICH)
        assert command.wait(120) == -signal.SIGKILL, f"{order}: {command.output.read_text()}"
    finish(tmp_path, RICH)
    assert_same(tmp_path, rich)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_kills_at_random_moments_change_nothing(tmp_path: Path, rich: Path, seed: int) -> None:
    draw = random.Random(seed)
    killed = 0
    while killed < 4:
        before = lines(tmp_path)
        command = started(tmp_path, RICH)
        wanted = before + draw.randrange(1, 16)
        while lines(tmp_path) < wanted and command.process.is_alive():
            time.sleep(0.001)
        time.sleep(draw.uniform(0.0, 0.03))
        command.process.kill()
        if command.wait(120) != -signal.SIGKILL:
            break
        killed += 1
    assert killed >= 3, "it was finished before it was killed often enough"
    finish(tmp_path, RICH)
    assert_same(tmp_path, rich)


def lines(folder: Path) -> int:
    """How many lines of metrics lie on the disk."""
    return sum(file.read_bytes().count(b"\n") for file in folder.glob("runs/*/metrics.jsonl"))


@pytest.mark.slow
def test_kills_with_a_cached_teacher_and_an_updater_of_its_own_change_nothing(tmp_path: Path) -> None:
    once, often = tmp_path / "once", tmp_path / "often"
    for folder in (once, often):
        folder.mkdir()
    undisturbed(once, CACHED)
    for order in ("cached step 2", "cached eval 10", "cached step 13"):
        (often / "kill.txt").write_text(order)
        command = started(often, CACHED)
        assert command.wait(120) == -signal.SIGKILL, f"{order}: {command.output.read_text()}"
    finish(often, CACHED)
    assert_same(often, once)


@pytest.mark.slow
def test_a_kill_loses_no_more_than_the_minutes_between_saves(tmp_path: Path) -> None:
    (tmp_path / "kill.txt").write_text("wide step 4")
    command = started(tmp_path, CACHED)
    assert command.wait(120) == -signal.SIGKILL, command.output.read_text()
    write_config(tmp_path / "config.yaml", CACHED, {"out": str(tmp_path / "runs")})
    command = Command("run", str(tmp_path / "config.yaml"), folder=tmp_path)
    assert command.wait(120) == 0
    assert "goes on after update 3 of 4" in command.output.read_text()
