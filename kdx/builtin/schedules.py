"""Schedules: numbers as closed forms of the clock.

Each is a function of one position `x`. With `per: step`, the default, `x` is the number of epochs finished so far with
the fraction of the current one: 0 in the first update, changing with every update. With `per: epoch`, `x` is the
1-based number of the current epoch, as published formulas count. Lengths and places are in epochs in both cases.

`warmup: W` is a linear rise over the first `W` epochs, from `warmup_start` to the schedule's own value:
`warmup_start + (value(x) - warmup_start) * min(x / W, 1)`. A schedule that has a `begin` begins when the warm-up ends,
unless it says otherwise. So under `per: step` the first update sees exactly `warmup_start`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from kdx.components import Schedule
from kdx.errors import ConfigError, did_you_mean
from kdx.types import Clock


@dataclass(frozen=True, kw_only=True)
class Pace:
    """The options that every schedule takes."""

    warmup: float = 0.0
    warmup_start: float = 0.0
    per: str = "step"


class Constant(Schedule):
    """`value`, from the first update to the last one: with `per: epoch` and `warmup: W` it is `value * min(e/W, 1)`."""

    name = "constant"

    @dataclass(frozen=True, kw_only=True)
    class Config(Pace):
        value: float

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        _check_pace(config, value=config.value)

    def at(self, clock: Clock) -> float:
        return _warmed(self.config, clock, float(self.config.value))


class Linear(Schedule):
    """From `start` at `begin` (default: where the warm-up ends) to `end` at `finish` (default: the last epoch)."""

    name = "linear"

    @dataclass(frozen=True, kw_only=True)
    class Config(Pace):
        start: float
        end: float
        begin: float | None = None
        finish: float | None = None

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        _check_pace(config, start=config.start, end=config.end)
        _check_span(config)

    def at(self, clock: Clock) -> float:
        config = self.config
        done = _share(config, clock)
        return _warmed(config, clock, config.start + (config.end - config.start) * done)


class Cosine(Schedule):
    """Half a cosine from `peak` at `begin` (default: where the warm-up ends) to `end` at `finish` (default: the last
    epoch): `end + (peak - end) * (1 + cos(pi * share)) / 2`.
    """

    name = "cosine"

    @dataclass(frozen=True, kw_only=True)
    class Config(Pace):
        peak: float
        end: float = 0.0
        begin: float | None = None
        finish: float | None = None

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        _check_pace(config, peak=config.peak, end=config.end)
        _check_span(config)

    def at(self, clock: Clock) -> float:
        config = self.config
        fall = (1 + math.cos(math.pi * _share(config, clock))) / 2
        return _warmed(config, clock, config.end + (config.peak - config.end) * fall)


class Step(Schedule):
    """`start`, times `factor` after each of the epochs in `at`: `at: [150]` acts from the first update of epoch 151.

    `factor: 0` switches a term off for good.
    """

    name = "step"

    @dataclass(frozen=True, kw_only=True)
    class Config(Pace):
        start: float
        at: list[float]
        factor: float = 0.1

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        _check_pace(config, start=config.start, factor=config.factor)
        if not config.at:
            raise ConfigError("at: found no epoch, expected at least one")
        if not all(before < after < math.inf for before, after in pairwise([0.0, *config.at])):
            raise ConfigError(f"at: found {list(config.at)}, expected rising numbers of epochs above 0")

    def at(self, clock: Clock) -> float:
        config = self.config
        finished = _position(config, clock) - (1 if config.per == "epoch" else 0)
        return _warmed(config, clock, config.start * config.factor ** bisect_right(config.at, finished))


class ExpRampup(Schedule):
    """`peak * exp(-5 * (1 - min(x, L) / L)^2)` with `L = epochs`: 0.0067 of the peak at 0, the peak from `L` on.

    Laine and Aila, ICLR 2017; with `per: epoch` and `epochs: 80` it is the ramp-up of online ensembles (Lan et al.,
    NeurIPS 2018).
    """

    name = "exp_rampup"

    @dataclass(frozen=True, kw_only=True)
    class Config(Pace):
        epochs: float
        peak: float = 1.0

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        _check_pace(config, peak=config.peak)
        if not 0 < config.epochs < math.inf:
            raise ConfigError(f"epochs: found {config.epochs}, expected a number above 0")

    def at(self, clock: Clock) -> float:
        config = self.config
        left = 1 - min(_position(config, clock), config.epochs) / config.epochs
        return _warmed(config, clock, config.peak * math.exp(-5 * left**2))


class Table(Schedule):
    """The value that stands at the last place of `values` that is reached; `interpolate: linear` joins the places.

    Places are positions on the schedule's axis: epoch numbers from 1 with `per: epoch`, finished epochs from 0 with
    `per: step`. Before the first place, its value holds. `{1: 0, 2: 1}` with `per: epoch` leaves out epoch 1.
    """

    name = "table"

    @dataclass(frozen=True, kw_only=True)
    class Config(Pace):
        values: dict[int, float]
        interpolate: str = "step"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        _check_pace(config, **{f"values.{place}": value for place, value in config.values.items()})
        _check_word("interpolate", config.interpolate, ("step", "linear"))
        if not config.values:
            raise ConfigError("values: found none, expected at least one, as in {1: 0.1, 30: 0.01}")
        if min(config.values) < 0:
            raise ConfigError(f"values: found the place {min(config.values)}, expected epochs from 0")
        self.places: list[int] = sorted(config.values)
        self.values = [float(config.values[place]) for place in self.places]

    def at(self, clock: Clock) -> float:
        x = _position(self.config, clock)
        right = bisect_right(self.places, x)
        left = max(right - 1, 0)
        value = self.values[left]
        if self.config.interpolate == "linear" and 0 < right < len(self.places):
            share = (x - self.places[left]) / (self.places[right] - self.places[left])
            value += (self.values[right] - value) * share
        return _warmed(self.config, clock, value)


SCHEDULES: list[type[Schedule]] = [Constant, Linear, Cosine, Step, ExpRampup, Table]


def _position(config: Pace, clock: Clock) -> float:
    return float(clock.epoch) if config.per == "epoch" else clock.time


def _warmed(config: Pace, clock: Clock, value: float) -> float:
    x = _position(config, clock)
    if x >= config.warmup:
        return value
    return config.warmup_start + (value - config.warmup_start) * x / config.warmup


def _share(config: Any, clock: Clock) -> float:
    """How much of the way from `begin` to `finish` is done, 0 to 1."""
    x = _position(config, clock)
    begin = config.warmup if config.begin is None else config.begin
    finish = clock.epochs if config.finish is None else config.finish
    if x <= begin:
        return 0.0
    return 1.0 if x >= finish else (x - begin) / (finish - begin)


def _check_pace(config: Pace, **values: float) -> None:
    _check_word("per", config.per, ("step", "epoch"))
    if not 0 <= config.warmup < math.inf:
        raise ConfigError(f"warmup: found {config.warmup}, expected a number of epochs from 0")
    if config.warmup == 0 and config.warmup_start != 0:
        raise ConfigError(
            f"warmup_start: found {config.warmup_start} without a warmup; say `warmup` too or leave it out"
        )
    for name, value in {"warmup_start": config.warmup_start, **values}.items():
        if not math.isfinite(value):
            raise ConfigError(f"{name}: found {value}, expected a finite number")


def _check_span(config: Any) -> None:
    if config.begin is not None and not 0 <= config.begin < math.inf:
        raise ConfigError(f"begin: found {config.begin}, expected a number of epochs from 0")
    begin = config.warmup if config.begin is None else config.begin
    if config.finish is not None and not begin < config.finish < math.inf:
        raise ConfigError(f"finish: found {config.finish}, expected a number of epochs above its begin ({begin:g})")


def _check_word(name: str, found: str, choices: Sequence[str]) -> None:
    if found not in choices:
        raise ConfigError(f"{name}: found {found!r}; {did_you_mean(found, choices)}")
