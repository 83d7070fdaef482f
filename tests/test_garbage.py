"""Garbage is sought seldom while a command makes ready, and as usual, among what is new, while it trains."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
from small_run import DISTIL, PLAIN

from kdx.cli import main
from kdx.config import load_mapping, overlay
from kdx.garbage import SELDOM, USUAL, as_usual, seldom_sought, set_aside
from kdx.runs import Options, check_run, fill_caches, prepare, steps_of
from kdx.runtime import Runtime

CACHED = {"data": {"flip": False}, "teachers": {"wide": {"cache": True}}}


class Ring:
    """Refers to itself, so that only a search for garbage takes it away."""

    def __init__(self) -> None:
        self.ring = self


def test_it_is_sought_seldom_within_the_block_and_as_usual_behind_it() -> None:
    with seldom_sought():
        assert gc.get_threshold() == SELDOM
    assert gc.get_threshold() == USUAL


def test_it_is_sought_as_usual_again_after_an_error() -> None:
    with pytest.raises(ValueError, match="mine"), seldom_sought():
        raise ValueError("mine")
    assert gc.get_threshold() == USUAL


def test_a_training_ends_the_putting_off_and_passes_over_what_was_there_before(tmp_path: Path) -> None:
    options = Options(quiet=True)
    with seldom_sought():
        steps = steps_of(prepare(load_mapping(overlay(PLAIN, {"out": str(tmp_path)})), options), options)
        next(steps)  # up to the first update
        assert gc.get_threshold() == USUAL
        assert gc.get_freeze_count() > 0
        steps.close()
        assert gc.get_freeze_count() == 0


def test_the_filling_of_a_cache_ends_the_putting_off_too(tmp_path: Path) -> None:
    found: list[tuple[int, int, int]] = []
    how = Options(quiet=True, stop=lambda: bool(found.append(gc.get_threshold())))
    run = prepare(load_mapping(overlay(DISTIL, {**CACHED, "out": str(tmp_path)})), how)
    with seldom_sought():
        fill_caches(run, how, Runtime(run.spec.runtime))
    assert {*found} == {USUAL}


def test_only_what_was_set_aside_outlasts_the_begin_of_a_training_and_not_its_end() -> None:
    with seldom_sought():
        library = weakref.ref(Ring())
        set_aside()
        checked = weakref.ref(Ring())
        with as_usual():
            assert library() is not None
            assert checked() is None
            within = weakref.ref(Ring())
            gc.collect()
            assert within() is None
        gc.collect()
        assert library() is None


def test_what_the_checks_of_a_study_leave_does_not_add_up(tmp_path: Path) -> None:
    run, options = prepare(load_mapping(overlay(PLAIN, {"out": str(tmp_path)}))), Options(quiet=True)
    with seldom_sought():
        check_run(run, options)
        assert gc.get_freeze_count() > 0
        left = weakref.ref(Ring())
        check_run(run, options)
        assert left() is None


def test_a_command_that_fails_before_its_training_leaves_nothing_aside() -> None:
    def fail() -> None:
        set_aside()
        raise ValueError(f"{gc.get_freeze_count() > 0}")

    with pytest.raises(ValueError, match="True"), seldom_sought():
        fail()
    assert gc.get_freeze_count() == 0


def test_a_program_keeps_its_own_say() -> None:
    own = (1_234, 5, 6)
    gc.set_threshold(*own)
    try:
        set_aside()
        with as_usual():
            assert gc.get_threshold() == own
            assert gc.get_freeze_count() == 0
    finally:
        gc.set_threshold(*USUAL)


def test_a_command_leaves_it_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "kd"]) == 0
    assert gc.get_threshold() == USUAL
