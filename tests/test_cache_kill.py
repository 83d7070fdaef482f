"""Caches are filled by real processes that are killed, come two at a time, or are read while they fill."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_run import PLAIN, PLUGIN, Command, config_of, write_config

from kdx.cache import BLOCKS, META, open_store
from kdx.cli import STOPPED

KD = {"use": "kd", "inputs": {"student": "student.logits", "teacher": "wide.logits"}}
CONFIG = config_of(
    PLAIN,
    {
        "plugins": [str(PLUGIN), str(PLUGIN.with_name("mortal_plugin.py"))],
        "data": {"size": 1200, "views": 2},
        "teachers": {"wide": {"use": "mortal", "cache": True, "taps": {"mid": "body"}}},
        "losses": {"kd": KD},
        "train": {"updates": 4},
        "runtime": {"threads": 1},
    },
)
"""Two views of 1,188 samples, each three blocks of up to 516 rows, which are 43 calls of the teacher."""
HINT: dict[str, Any] = {
    "align": {"mid": {"use": "conv1x1", "source": "student.mid", "like": "wide.mid"}},
    "losses": {"hint": {"use": "mse", "inputs": {"student": "mid", "teacher": "wide.mid"}}},
}


def started(folder: Path, word: str, order: str = "", layer: dict[str, Any] | None = None) -> Command:
    """`kdx WORD` in a folder, with the caches beside it, and an order for the teacher."""
    folder.mkdir(exist_ok=True)
    path = write_config(folder / "config.yaml", CONFIG, layer or {}, {"out": str(folder.parent / "runs")})
    (folder / "order.txt").unlink(missing_ok=True)
    (folder / "calls.txt").write_text("")
    if order:
        (folder / "order.txt").write_text(order)
    return Command(word, str(path), folder=folder)


def calls(folder: Path) -> int:
    return len((folder / "calls.txt").read_text().splitlines())


def wait_for(what: Callable[[], bool], command: Command) -> None:
    while not what():
        assert command.process.is_alive(), command.output.read_text()
        time.sleep(0.01)


def waits(command: Command) -> bool:
    return command.output.exists() and "another process fills it; waiting" in command.output.read_text()


def caches(folder: Path) -> list[Path]:
    return sorted(path.parent for path in (folder / "runs" / "cache").glob(f"*/{META}"))


def content(folder: Path) -> list[Any]:
    """All answers of the only cache beside a folder, and the blocks that it says to be whole."""
    (cache,) = caches(folder)
    assert open_store(cache, verify=True) is not None
    return [(cache / "logits.bin").read_bytes(), sorted((cache / BLOCKS).read_text().splitlines())]


@pytest.mark.slow
def test_a_filling_that_is_killed_at_any_moment_goes_on_and_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    whole, often = tmp_path / "whole" / "a", tmp_path / "often" / "a"
    for folder in (whole.parent, often.parent):
        folder.mkdir()
    assert started(whole, "cache").wait(120) == 0
    everything = calls(whole)
    finished: list[int] = []
    # Before a block is whole, with the rows of a block and no line of it, again from there, and in the second view.
    for call in (3, 60, 95, 130):
        command = started(often, "cache", f"kill {call}")
        assert command.wait(120) == -signal.SIGKILL, command.output.read_text()
        (cache,) = caches(often.parent)
        assert open_store(cache) is None
        finished.append((cache / BLOCKS).read_bytes().count(b"\n") if (cache / BLOCKS).exists() else 0)
    assert finished == [0, 0, 0, 3]
    assert any((cache / "logits.bin").read_bytes())
    assert started(often, "cache").wait(120) == 0
    assert calls(often) < everything - 90
    assert content(often.parent) == content(whole.parent)


@pytest.mark.slow
def test_a_cache_that_gets_more_views_is_killed_and_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    whole, grown, more = tmp_path / "whole" / "a", tmp_path / "grown" / "a", {"data": {"views": 3}}
    for folder in (whole.parent, grown.parent):
        folder.mkdir()
    assert started(whole, "cache", layer=more).wait(120) == 0
    assert started(grown, "cache").wait(120) == 0
    (smaller,) = caches(grown.parent)
    assert started(grown, "cache", "kill 20", layer=more).wait(120) == -signal.SIGKILL
    (larger,) = {*caches(grown.parent)} - {smaller}
    assert (larger / BLOCKS).read_bytes().count(b"\n") == 6  # those of the two views that were copied
    assert started(grown, "cache", layer=more).wait(120) == 0
    assert calls(whole) - calls(grown) == 198  # two views of 99 batches
    shutil.rmtree(smaller)
    assert content(grown.parent) == content(whole.parent)


@pytest.mark.slow
@pytest.mark.parametrize("word", ["run", "cache"])
def test_a_signal_ends_a_filling_as_it_ends_a_training(word: str, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    command = started(folder, word, "hold 60")  # in the second block
    wait_for(lambda: calls(folder) == 60, command)
    assert command.process.pid is not None
    os.kill(command.process.pid, signal.SIGTERM)
    wait_for(lambda: "stopping after this update, or this batch of a cache" in command.output.read_text(), command)
    (folder / "order.txt").unlink()
    assert command.wait(60) == STOPPED
    assert calls(folder) == 60
    text = command.output.read_text()
    assert "what is stored is kept; start it again to go on" in text
    assert "Traceback" not in text
    (cache,) = caches(tmp_path)
    assert (cache / BLOCKS).read_bytes().count(b"\n") == 1


@pytest.mark.slow
def test_who_reads_while_another_fills_waits_for_it_and_reads_what_is_there_already(tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    filling = started(first, "cache", "hold 60")
    wait_for(lambda: calls(first) == 60, filling)
    (cache,) = caches(tmp_path)
    assert open_store(cache) is None
    reading = started(second, "run")
    wait_for(lambda: waits(reading), reading)
    (first / "order.txt").unlink()
    assert [filling.wait(120), reading.wait(120)] == [0, 0]
    before = content(tmp_path)
    filling = started(third, "cache", "hold 60", HINT)  # the map alone, beside the logits
    wait_for(lambda: calls(third) == 60, filling)
    (beside,) = set(caches(tmp_path)) - {cache}
    assert open_store(beside) is None
    again = started(second, "run", layer={"train": {"lr": 0.01}})
    assert again.wait(120) == 0, again.output.read_text()
    (third / "order.txt").unlink()
    assert filling.wait(120) == 0
    assert open_store(beside, verify=True) is not None
    assert [(cache / "logits.bin").read_bytes(), sorted((cache / BLOCKS).read_text().splitlines())] == before
