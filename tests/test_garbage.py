"""Garbage is sought seldom while a command makes ready, and as usual while it trains."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from small_run import PLAIN

from kdx.cli import main
from kdx.config import load_mapping, overlay
from kdx.garbage import SELDOM, USUAL, as_usual, seldom_sought
from kdx.runs import Options, prepare, steps_of


def test_it_is_sought_seldom_within_the_block_and_as_usual_behind_it() -> None:
    with seldom_sought():
        assert gc.get_threshold() == SELDOM
    assert gc.get_threshold() == USUAL


def test_it_is_sought_as_usual_again_after_an_error() -> None:
    with pytest.raises(ValueError, match="mine"), seldom_sought():
        raise ValueError("mine")
    assert gc.get_threshold() == USUAL


def test_a_training_ends_the_putting_off(tmp_path: Path) -> None:
    options = Options(quiet=True)
    with seldom_sought():
        steps = steps_of(prepare(load_mapping(overlay(PLAIN, {"out": str(tmp_path)})), options), options)
        next(steps)  # up to the first update
        assert gc.get_threshold() == USUAL
    steps.close()


def test_a_program_keeps_its_own_say() -> None:
    own = (1_234, 5, 6)
    gc.set_threshold(*own)
    try:
        as_usual()
        assert gc.get_threshold() == own
    finally:
        gc.set_threshold(*USUAL)


def test_a_command_leaves_it_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "kd"]) == 0
    assert gc.get_threshold() == USUAL
