"""Schedules equal their closed forms, are pure, and refuse what has no meaning."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from kdx.builtin.schedules import SCHEDULES, Constant, Cosine, ExpRampup, Linear, Step, Table
from kdx.components import Schedule
from kdx.errors import ConfigError
from kdx.types import Clock

PER_EPOCH = 4


def make(kind: type[Any], **options: Any) -> Schedule:
    schedule: Schedule = kind(kind.Config(**options))
    return schedule


def clock(epoch: int, part: int = 0, epochs: int = 240) -> Clock:
    """Update number `part` of a 1-based epoch."""
    return Clock(step=(epoch - 1) * PER_EPOCH + part, steps_per_epoch=PER_EPOCH, steps=epochs * PER_EPOCH)


def by_epoch(schedule: Schedule, epochs: int = 240) -> list[float]:
    return [schedule.at(clock(epoch, PER_EPOCH - 1, epochs)) for epoch in range(1, epochs + 1)]


def test_linear_warmup_of_a_constant_is_min_of_epoch_over_length_and_one() -> None:
    schedule = make(Constant, value=3.0, warmup=20, per="epoch")
    assert by_epoch(schedule) == pytest.approx([3.0 * min(e / 20, 1) for e in range(1, 241)], abs=1e-12)


def test_early_stop_is_a_step_to_zero_after_its_epoch() -> None:
    schedule = make(Step, start=0.9, factor=0.0, at=[60], per="epoch")
    assert by_epoch(schedule) == [0.9 if e <= 60 else 0.0 for e in range(1, 241)]


def test_a_term_that_is_absent_in_the_first_epoch_is_a_table() -> None:
    by_number = make(Table, values={1: 0.0, 2: 5.0}, per="epoch")
    by_time = make(Table, values={0: 0.0, 1: 5.0})
    for schedule in (by_number, by_time):
        assert by_epoch(schedule) == [0.0] + [5.0] * 239
        assert schedule.at(clock(1, PER_EPOCH - 1)) == 0.0
        assert schedule.at(clock(2)) == 5.0


def test_decay_in_the_second_half_and_its_complement_add_up_to_one() -> None:
    decay = make(Linear, start=0.7, end=0.0, begin=120, per="epoch")
    rise = make(Linear, start=0.3, end=1.0, begin=120, per="epoch")
    expected = [0.7 if e <= 120 else 0.7 * (240 - e) / 120 for e in range(1, 241)]
    assert by_epoch(decay) == pytest.approx(expected, abs=1e-12)
    assert by_epoch(rise) == pytest.approx([1 - value for value in expected], abs=1e-12)


def test_a_curriculum_that_falls_over_ten_epochs_is_a_cosine_with_a_finish() -> None:
    schedule = make(Cosine, peak=0.0, end=-1.0, finish=10, per="epoch")
    expected = [-0.5 * (1 - math.cos(math.pi * min(e, 10) / 10)) for e in range(1, 241)]
    assert by_epoch(schedule) == pytest.approx(expected, abs=1e-12)
    assert schedule.at(clock(5)) == pytest.approx(-0.5, abs=1e-12)
    assert schedule.at(clock(11)) == -1.0


def test_exponential_ramp_up_has_its_published_values() -> None:
    schedule = make(ExpRampup, epochs=80)
    assert schedule.at(clock(1)) == pytest.approx(0.0067379470, abs=1e-10)
    assert schedule.at(clock(41)) == pytest.approx(0.2865047969, abs=1e-10)
    assert schedule.at(clock(81)) == 1.0
    numbered = make(ExpRampup, epochs=80, peak=2.0, per="epoch")
    assert by_epoch(numbered) == pytest.approx([2 * math.exp(-5 * (1 - min(e, 80) / 80) ** 2) for e in range(1, 241)])


def test_the_usual_step_decay_acts_from_the_epoch_after_each_place() -> None:
    for per in ("step", "epoch"):
        schedule = make(Step, start=0.05, at=[150, 180, 210], per=per)
        expected = [0.05 * 0.1 ** sum(e > place for place in (150, 180, 210)) for e in range(1, 241)]
        assert by_epoch(schedule) == pytest.approx(expected, rel=1e-12)


def test_cosine_with_warmup_rises_to_the_peak_and_falls_to_the_end() -> None:
    schedule = make(Cosine, peak=0.1, end=0.001, warmup=5)
    assert schedule.at(clock(1)) == 0.0
    assert schedule.at(clock(1, 2)) == pytest.approx(0.1 * 0.5 / 5)
    assert schedule.at(clock(6)) == pytest.approx(0.1)
    assert schedule.at(clock(6 + 235 // 5)) == pytest.approx(0.001 + 0.099 * (1 + math.cos(math.pi / 5)) / 2)
    assert schedule.at(Clock(step=960, steps_per_epoch=4, steps=960)) == pytest.approx(0.001)


def test_a_warmup_starts_where_it_is_told_to() -> None:
    schedule = make(Linear, start=1.0, end=0.0, warmup=10, warmup_start=0.5, finish=20)
    assert [schedule.at(clock(e)) for e in (1, 6, 11, 16, 21)] == pytest.approx([0.5, 0.75, 1.0, 0.5, 0.0])


def test_a_warmup_longer_than_training_stays_on_its_line() -> None:
    schedule = make(Cosine, peak=0.1, warmup=5)
    assert [schedule.at(clock(e, epochs=2)) for e in (1, 2)] == pytest.approx([0.0, 0.02])


def test_per_step_moves_within_an_epoch_and_per_epoch_does_not() -> None:
    smooth = make(Linear, start=0.0, end=240.0)
    stairs = make(Linear, start=0.0, end=240.0, per="epoch")
    assert [smooth.at(clock(3, part)) for part in range(4)] == pytest.approx([2.0, 2.25, 2.5, 2.75])
    assert {stairs.at(clock(3, part)) for part in range(4)} == {3.0}
    assert Linear.Config(start=0.0, end=1.0).per == "step"


def test_a_table_may_join_its_places_with_lines() -> None:
    schedule = make(Table, values={10: 1.0, 2: 0.0, 20: 3.0}, interpolate="linear")
    assert [schedule.at(clock(x + 1)) for x in (0, 2, 6, 10, 15, 20, 30)] == pytest.approx([0, 0, 0.5, 1, 2, 3, 3])


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Constant, {"value": math.nan}, "value: found nan"),
        (Constant, {"value": 1.0, "per": "epochs"}, "per: found 'epochs'; did you mean 'epoch'"),
        (Constant, {"value": 1.0, "warmup": -1}, "warmup: found -1"),
        (Constant, {"value": 1.0, "warmup_start": 0.5}, "warmup_start: found 0.5 without a warmup"),
        (Linear, {"start": 0.0, "end": math.inf}, "end: found inf"),
        (Linear, {"start": 0.0, "end": 1.0, "begin": -2}, "begin: found -2"),
        (Linear, {"start": 0.0, "end": 1.0, "begin": 5, "finish": 5}, r"finish: found 5, expected .* \(5\)"),
        (Cosine, {"peak": 1.0, "warmup": 5, "finish": 4}, r"finish: found 4, expected .* \(5\)"),
        (Step, {"start": 1.0, "at": []}, "at: found no epoch"),
        (Step, {"start": 1.0, "at": [20, 10]}, r"at: found \[20, 10\], expected rising"),
        (Step, {"start": 1.0, "at": [0]}, r"at: found \[0\]"),
        (ExpRampup, {"epochs": 0}, "epochs: found 0, expected a number above 0"),
        (Table, {"values": {}}, "values: found none"),
        (Table, {"values": {-1: 1.0}}, "values: found the place -1"),
        (Table, {"values": {3: math.nan}}, "values.3: found nan"),
        (Table, {"values": {1: 1.0}, "interpolate": "cubic"}, "interpolate: found 'cubic'"),
    ],
)
def test_options_without_meaning_are_refused_by_name(kind: type[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        make(kind, **options)


EXAMPLES: list[tuple[type[Any], dict[str, Any]]] = [
    (Constant, {"value": 2.0, "warmup": 3}),
    (Linear, {"start": 1.0, "end": 0.0, "warmup": 2}),
    (Cosine, {"peak": 0.1, "warmup": 1, "warmup_start": 0.01}),
    (Step, {"start": 0.05, "at": [2, 4]}),
    (ExpRampup, {"epochs": 5}),
    (Table, {"values": {1: 0.0, 2: 1.0}, "per": "epoch"}),
]


@pytest.mark.parametrize(("kind", "options"), EXAMPLES)
def test_every_schedule_can_be_filled_from_a_config_file(kind: type[Any], options: dict[str, Any]) -> None:
    filled = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind.Config), options))
    assert kind(filled).at(clock(2)) == make(kind, **options).at(clock(2))


@settings(deadline=None)
@given(step=st.integers(0, 200), pace=st.integers(1, 9))
def test_values_are_finite_floats_and_depend_on_the_clock_alone(step: int, pace: int) -> None:
    for kind, options in EXAMPLES:
        schedule = make(kind, **options)
        now = Clock(step=step, steps_per_epoch=pace, steps=200)
        first = schedule.at(now)
        schedule.at(Clock(step=0, steps_per_epoch=1, steps=1))
        assert type(first) is float
        assert math.isfinite(first)
        assert schedule.at(now) == first == copy.deepcopy(schedule).at(now)


def test_the_list_for_the_registry_holds_each_name_once() -> None:
    assert sorted(kind.name for kind in SCHEDULES) == ["constant", "cosine", "exp_rampup", "linear", "step", "table"]
