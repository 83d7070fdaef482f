"""Chooses the settings of `runtime` that a config leaves to a measurement, before a run starts.

One after another: precision, layout, compilation, reading processes. Each is tried on whole updates of sessions that
are thrown away, in turn with the best that was found before it, and taken only where it is clearly faster.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdx.data import Loader
from kdx.distributed import the_group
from kdx.errors import KdxError
from kdx.formats import duration, milliseconds
from kdx.loop import Session, step
from kdx.ranges import AUTO
from kdx.report import environment_of
from kdx.sections import RuntimeOptions
from kdx.spec import RunSpec
from kdx.types import Batch

SETTINGS = ("precision", "channels_last", "compile", "workers")
"""What may be left to a measurement, in the order of the choice."""
ROUNDS = 5
"""How often each of two is timed, in turn."""
GAIN = 0.95
"""A setting must take less than this part of the time."""
PRECISION_GAIN = 0.8
"""So must a lower precision, which changes numbers by more than rounding."""
HOPELESS = 1.5
"""A setting that takes more than so many times as long in its second update is not timed any further."""
WORTH_COMPILING = 900.0
"""How many seconds a training must take for compilation to be tried, which itself takes up to some minutes."""
WORTH_READING = 0.05
"""Reading that takes less than this part of an update is left to the training process."""


@dataclass(frozen=True)
class Chosen:
    """The settings that a run takes, and for each that was open a line that says why."""

    runtime: RuntimeOptions
    why: Mapping[str, str]

    @property
    def lines(self) -> list[str]:
        """What to say of it."""
        return [f"runtime.{name}: {why}" for name, why in self.why.items()]


def choose(
    spec: RunSpec,
    make: Callable[[RuntimeOptions], Session],
    known: Mapping[str, Any] | None = None,
    *,
    worth_compiling: float = WORTH_COMPILING,
) -> Chosen:
    """Choose what `spec` leaves open; a resumed run takes what it began with (`known`).

    `make` gives a session with some settings that may be trained and thrown away. Several processes measure nothing.
    """
    options, measured = spec.runtime, spec.measured
    if not measured:
        return Chosen(options, {})
    if known is not None:
        began = {name: known[name] for name in measured}
        why = {name: f"{_text(value)}, as the run began" for name, value in began.items()}
        return Chosen(replace(options, **began), why)
    if the_group().size > 1:
        return Chosen(options, dict.fromkeys(measured, "not measured, as several processes train together"))
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        first = make(replace(options, precision="fp32") if "precision" in measured else options)
        trial = _Trial(first, make)
        why = {}
        if options.device == AUTO:
            why["device"] = f"{first.runtime.device}, the first of GPU and CPU that is there"
        if "precision" in measured:
            why["precision"] = _precision(trial)
        if "channels_last" in measured:
            why["channels_last"] = _channels_last(trial)
        if "compile" in measured:
            why["compile"] = _compile(trial, worth_compiling)
        if "workers" in measured:
            why["workers"] = _workers(trial)
    return Chosen(trial.best.spec.runtime, why)


def settings(spec: RunSpec) -> dict[str, Any]:
    """What a checkpoint keeps of the choice."""
    return {name: getattr(spec.runtime, name) for name in SETTINGS}


def choice_remarks(spec: RunSpec, folder: Path) -> Iterator[str]:
    """What `kdx explain` says of settings that a measurement decides, and what was decided in the folder of the run."""
    names = [f"runtime.{name}" for name in (*spec.measured, *(["backend"] if spec.runtime.backend == AUTO else []))]
    names += [f"{teacher.where}.backend" for teacher in spec.teachers.values() if teacher.engine.backend == AUTO]
    if names:
        yield f"a measurement decides when the run starts: {', '.join(names)}"
    about = environment_of(folder)
    for name, why in (about.get("runtime") or {}).items():
        yield f"runtime.{name}: {why}"
    yield from about.get("teacher_calls") or ()


class _Trial:
    """The best session so far, on a batch that all have in common."""

    def __init__(self, first: Session, make: Callable[[RuntimeOptions], Session]) -> None:
        self.best = first
        self._make = make
        self.batch: Batch = first.feed.at(0)
        self.best.learner.train()
        for _ in range(2):  # the first updates make the state of the optimizer
            self._seconds(self.best)
        self.ms = 1000 * statistics.median(self._seconds(self.best) for _ in range(ROUNDS))

    @property
    def seconds_of_training(self) -> float:
        return self.best.steps * self.ms / 1000

    def against(self, gain: float, **change: Any) -> tuple[float, bool]:
        """The milliseconds of an update with other settings, and whether they are taken from now on.

        What the other settings raise goes through.
        """
        other = self._make(replace(self.best.spec.runtime, **change))
        other.learner.train()
        self._seconds(other)
        second = 1000 * self._seconds(other)
        if second > HOPELESS * self.ms:
            return second, False
        times: dict[str, list[float]] = {"best": [], "other": []}
        for _ in range(ROUNDS):
            times["best"].append(1000 * self._seconds(self.best))
            times["other"].append(1000 * self._seconds(other))
        self.ms, found = (statistics.median(values) for values in times.values())
        if found < gain * self.ms:
            self.best, self.ms = other, found
            return found, True
        return found, False

    def _seconds(self, session: Session) -> float:
        session.runtime.wait()
        began = time.perf_counter()
        step(session, self.batch, session.knobs.at(session.clock))
        session.runtime.wait()
        return time.perf_counter() - began


def _precision(trial: _Trial) -> str:
    device = trial.best.runtime.device
    if device.type == "mps":
        return "fp32, the only one that is tried there"
    low = "bf16" if device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and (times := _half_of_products()) > 1:
        return f"fp32, as products of matrices take {times:.2g} times as long in bf16"
    return _told(trial, low, "fp32", {"precision": low}, PRECISION_GAIN)


def _half_of_products() -> float:
    """How many times as long a product of matrices takes on the CPU in bf16."""

    def seconds(matrix: Tensor) -> float:
        matrix @ matrix
        times = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    matrix = torch.rand(512, 512, generator=torch.Generator().manual_seed(0))
    return seconds(matrix.bfloat16()) / seconds(matrix)


def _channels_last(trial: _Trial) -> str:
    if not any(weight.ndim == 4 for weight in trial.best.learner.parameters()):
        return "false, as the student has no convolution of images"
    return _told(trial, True, False, {"channels_last": True})


def _compile(trial: _Trial, worth: float) -> str:
    if trial.seconds_of_training < worth:
        return f"false, as the whole training takes about {duration(trial.seconds_of_training)}"
    return _told(trial, True, False, {"compile": True})


def _told(trial: _Trial, new: Any, old: Any, change: Mapping[str, Any], gain: float = GAIN) -> str:
    """Try a change, and say what came of it; one that does not work is not taken."""
    before = trial.ms
    try:
        found, taken = trial.against(gain, **change)
    except KdxError as error:
        return f"{_text(old)}: {error}"
    except Exception as error:  # compilers raise anything, and memory may be short
        lines = str(error).strip().splitlines() or ["no reason given"]
        return f"{_text(old)}, as {_text(new)} does not work: {type(error).__name__}: {lines[0]}"
    now, than = (new, old) if taken else (old, new)
    mine, other = (found, before) if taken else (trial.ms, found)
    return f"{_text(now)}, {milliseconds(mine)} an update; {_text(than)} {milliseconds(other)}"


def _workers(trial: _Trial) -> str:
    session, splits = trial.best, trial.best.splits
    indices = [i % len(splits.train) for i in range(session.loader.size)]
    reading = statistics.median(_timed(lambda: splits.train.fetch(indices)) for _ in range(ROUNDS))
    said = f"reading a batch takes {milliseconds(reading)} and an update {milliseconds(trial.ms)}"
    count = min(_cores() - 1, max(1, round(reading / trial.ms + 0.5)))
    if reading < WORTH_READING * trial.ms or count < 1 or session.loader.steps_per_epoch < 2 * ROUNDS:
        return f"0, as {said}" + (" on one core" if count < 1 else "")
    alone, read = (_with_workers(trial, number) for number in (0, count))
    if read >= GAIN * alone:
        return f"0, {milliseconds(alone)} an update with its batch; {count} {milliseconds(read)}"
    trial.best.spec = replace(session.spec, runtime=replace(session.spec.runtime, workers=count))
    return f"{count}, {milliseconds(read)} an update with its batch; 0 {milliseconds(alone)}"


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _with_workers(trial: _Trial, count: int) -> float:
    """The milliseconds of an update with the reading of its batch, once the workers have started."""
    session = trial.best
    source = Loader(session.splits.train, session.spec.train.batch, session.spec.root.seed, count).epoch(1)
    next(source)

    def update() -> None:
        batch = session.feed.plain(next(source))
        step(session, batch, session.knobs.at(session.clock))
        session.runtime.wait()

    return statistics.median(_timed(update) for _ in range(2 * ROUNDS - 1))


def _timed(work: Callable[[], object]) -> float:
    """The milliseconds of a call."""
    began = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - began)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
