"""Chooses the settings of `runtime` that a config leaves to a measurement, before a run starts.

One after another: device, precision, layout, compilation, reading processes. Each is tried on whole updates
of sessions that are thrown away, in turn with the best that was found before it, and taken only where it is faster.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from kdx.devices import DTYPES, low_precision, pick_device, present_devices
from kdx.distributed import the_group
from kdx.errors import CheckpointError, ConfigError, KdxError
from kdx.formats import duration, milliseconds
from kdx.loader import Loader
from kdx.loop import Session, step
from kdx.parallel import pick_own_device
from kdx.ranges import AUTO, PRECISIONS, UNMEASURED
from kdx.report import environment_of
from kdx.sections import RuntimeOptions
from kdx.spec import RunSpec
from kdx.timing import GAIN, ROUNDS, at_once
from kdx.types import Batch

PRECISION_GAIN = 0.8
"""A lower precision, which changes numbers by more than rounding, must take less than this part of the time."""
HOPELESS = 1.5
"""A setting that takes more than so many times as long once its first update is over is not timed any further."""
FAR = 4.0
"""A CPU whose products of matrices alone would take so many times as long as an update elsewhere is not tried."""
CLEARLY = 0.5
"""Where no update can be timed, products of matrices must take less than this part of the time in a lower precision."""
SIDE = 512
"""Rows and columns of the matrices whose products are timed."""
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
    plain: str | None = None,
    devices: Sequence[str] | None = None,
    worth_compiling: float = WORTH_COMPILING,
) -> Chosen:
    """Choose what `spec` leaves open; a resumed run takes what it began with (`known`).

    `make` gives a session with some settings that may be trained and thrown away. `plain` is the precision of the plain
    student, which a run that is compared with it takes as well. `devices` are those to choose from, in place of all
    that are here. Several processes time no updates.
    """
    options, measured = spec.runtime, spec.measured
    if not measured:
        return Chosen(options, {})
    if known is not None:
        return _as_begun(options, {name: known.get(name) for name in measured})
    if the_group().size > 1:
        return _for_several(options, measured, plain)
    why: dict[str, str] = {}
    if "precision" in measured and plain is not None:
        options = replace(options, precision=plain)
    here = devices or present_devices()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        trial = _Trial(make(replace(options, device=here[0]) if "device" in measured else options), make)
        if "device" in measured:
            why["device"] = _device(trial, here[1:])
        if "precision" in measured:
            why["precision"] = _precision(trial) if plain is None else _as_plain(plain)
        if "channels_last" in measured:
            why["channels_last"] = _channels_last(trial)
        if "compile" in measured:
            why["compile"] = _compile(trial, worth_compiling)
        if "workers" in measured:
            why["workers"] = _workers(trial)
    best = trial.best.spec.runtime
    return Chosen(best, {**why, **_batching(spec, best)})


def settings(spec: RunSpec) -> dict[str, Any]:
    """What a checkpoint keeps of the choice."""
    return {name: getattr(spec.runtime, name) for name in UNMEASURED}


def check_shared_precision(spec: RunSpec) -> None:
    """Raise `ConfigError` where each of several runs that are compared would measure a precision of its own."""
    if "precision" in spec.measured:
        raise ConfigError(
            "runtime.precision: found 'auto', which may come to something else in each run that is compared; expected "
            f"one of {', '.join(PRECISIONS)}, beside whatever else is left open"
        )


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


def _as_begun(options: RuntimeOptions, began: dict[str, Any]) -> Chosen:
    """The settings that a run began with; on another kind of device only where its own is not here.

    Raises `CheckpointError` for a checkpoint that does not say in which precision the run computed.
    """
    if (precision := began.get("precision", "fp32")) not in PRECISIONS:
        raise CheckpointError(
            f"runtime.precision: found {precision!r} in the checkpoint, expected one of {', '.join(PRECISIONS)}; start "
            "afresh with --fresh"
        )
    why = {name: f"{_text(value)}, as the run began" for name, value in began.items()}
    if "device" in began and began["device"] not in present_devices():
        began["device"] = None
        why["device"] = f"{pick_device(None)}, the first that is here; what the run began on is not"
    return Chosen(replace(options, **began), why)


def _for_several(options: RuntimeOptions, measured: Sequence[str], plain: str | None) -> Chosen:
    """The settings of several processes that train together: the precision by products of matrices alone."""
    device = pick_own_device(options.device)
    why = {name: f"{_text(getattr(options, name))}, not measured" for name in measured}
    if "device" in why:
        why["device"] = f"{device.type}, the first that is here"
    if "precision" in why and plain is not None:
        options, why["precision"] = replace(options, precision=plain), _as_plain(plain)
    elif "precision" in why and (low := low_precision(device)) is not None:
        times = the_group().agreed(_half_of_products(device, low))
        options = replace(options, precision=low if times < CLEARLY else "fp32")
        why["precision"] = f"{options.precision}, as products of matrices take {times:.2g} times as long in {low}"
    return Chosen(options, {name: f"{text}; several processes train together" for name, text in why.items()})


class _Trial:
    """The best session so far, on a batch that all have in common."""

    def __init__(self, first: Session, make: Callable[[RuntimeOptions], Session]) -> None:
        self.best = first
        self._make = make
        self._batch: Batch = first.feed.at(0)
        self.best.learner.train()
        for _ in range(2):  # the first updates make the state of the optimizer
            self._seconds(self.best)
        self._count = at_once(self._seconds(self.best))
        self.ms = 1000 * statistics.median(self._seconds(self.best, self._count) for _ in range(ROUNDS))

    @property
    def seconds_of_training(self) -> float:
        return self.best.steps * self.ms / 1000

    def against(self, gain: float, **change: Any) -> tuple[float, float, bool]:
        """The milliseconds of an update with other settings and of the best so far in turn with it, and whether the
        others are taken from now on.

        What the other settings raise goes through.
        """
        other = self._make(replace(self.best.spec.runtime, **change))
        other.learner.train()
        self._seconds(other)
        second = 1000 * min(self._seconds(other), self._seconds(other))  # a compiler may still be at work in the first
        if second > HOPELESS * self.ms:
            return second, self.ms, False
        times: dict[str, list[float]] = {"best": [], "other": []}
        for _ in range(ROUNDS):
            times["best"].append(1000 * self._seconds(self.best, self._count))
            times["other"].append(1000 * self._seconds(other, self._count))
        if other.runtime.faults.found.item():
            raise KdxError("losses or gradients were nan or inf in updates that were timed")
        best, found = (statistics.median(values) for values in times.values())
        taken = found < gain * best
        if taken:
            self.best = other
        self.ms = found if taken else best
        return found, best, taken

    def operations(self) -> int:
        """The floating-point operations of an update of the best session, as torch counts them."""
        with FlopCounterMode(display=False) as counter:
            self._seconds(self.best)
        return int(counter.get_total_flops())

    def _seconds(self, session: Session, count: int = 1) -> float:
        """The mean of so many updates, of several without the first."""
        device = session.runtime.device
        batch = {name: value.to(device) for name, value in self._batch.items()}
        knobs = session.knobs.at(session.clock)
        if count > 1:
            step(session, batch, knobs)
        session.runtime.wait()
        began = time.perf_counter()
        for _ in range(count):
            step(session, batch, knobs)
        session.runtime.wait()
        return (time.perf_counter() - began) / count


def _device(trial: _Trial, others: Sequence[str]) -> str:
    """Try other devices than that of the best session, and say what came of it."""
    first = str(trial.best.spec.runtime.device)
    if not others:
        return f"{first}, the only one here"
    times, notes = {first: trial.ms}, []
    for name in others:
        least = 1000 * trial.operations() / _operations_a_second(torch.device(name)) if name == "cpu" else 0.0
        if least > FAR * trial.ms:
            notes.append(f"{name} not tried, as its products of matrices alone would take {milliseconds(least)}")
            continue
        try:
            times[name], _, _ = trial.against(GAIN, device=name)
        except Exception as error:
            notes.append(f"{name} does not work: {_reason(error)}")
    best = str(trial.best.spec.runtime.device)
    slower = [f"{name} {milliseconds(ms)}" for name, ms in times.items() if name != best]
    return "; ".join([f"{best}, {milliseconds(trial.ms)} an update", *slower, *notes])


def _precision(trial: _Trial) -> str:
    device = trial.best.runtime.device
    low = low_precision(device)
    if low is None:
        return "fp32, the only one that is tried there"
    if device.type == "cpu" and (times := _half_of_products(device, low)) > 1:
        return f"fp32, as products of matrices take {times:.2g} times as long in {low}"
    return _told(trial, low, "fp32", {"precision": low}, PRECISION_GAIN)


def _as_plain(precision: str) -> str:
    return f"{precision}, as the plain student has it"


def _half_of_products(device: torch.device, low: str) -> float:
    """How many times as long a product of matrices takes on a device in a lower precision."""
    return _product(device, DTYPES[low]) / _product(device, torch.float32)


def _operations_a_second(device: torch.device) -> float:
    return 2 * SIDE**3 / _product(device, torch.float32)


def _product(device: torch.device, dtype: torch.dtype) -> float:
    """The seconds of a product of two matrices."""
    matrix = torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(device, dtype)

    def multiply() -> None:
        matrix @ matrix
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    multiply()
    return statistics.median(_timed(multiply) for _ in range(ROUNDS)) / 1000


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
    try:
        found, before, taken = trial.against(gain, **change)
    except KdxError as error:
        return f"{_text(old)}: {error}"
    except Exception as error:  # compilers raise anything, and memory may be short
        return f"{_text(old)}, as {_text(new)} does not work: {_reason(error)}"
    now, than = (new, old) if taken else (old, new)
    mine, other = (found, before) if taken else (before, found)
    return f"{_text(now)}, {milliseconds(mine)} an update; {_text(than)} {milliseconds(other)}"


def _batching(spec: RunSpec, chosen: RuntimeOptions) -> dict[str, str]:
    """Why teachers will not be one call, where a layout that was just chosen excludes it."""
    layouts = [name for name in ("channels_last", "compile") if name in spec.measured and getattr(chosen, name)]
    several = sum(teacher.frozen for teacher in spec.teachers.values()) > 1
    if chosen.teacher_batching != AUTO or not layouts or not several:
        return {}
    return {"teacher_batching": f"never, as stacked weights do not go with {' and '.join(layouts)}"}


def _reason(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or ["no reason given"]
    return lines[0] if isinstance(error, KdxError) else f"{type(error).__name__}: {lines[0]}"


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
