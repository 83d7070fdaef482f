"""How each frozen teacher is computed: by itself, in one call with others, or by a backend in its place.

One decision for each teacher, said in one line. Where the config leaves it open it is taken by a measurement on
training samples when a run starts; a checkpoint keeps it, so that a resumed run goes on in the same way.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kdx.backends import WAYS, Backend, backend_of, compare, make_backend, problem_of, start, where_of
from kdx.batched import BATCHED, alike, choose
from kdx.calls import ModelCall, StandIn
from kdx.errors import PlanError
from kdx.formats import milliseconds
from kdx.loop import Session
from kdx.ranges import AUTO, EAGER
from kdx.types import Batch

Known = Sequence[Sequence[Any]]
"""What a checkpoint keeps of a decision: `[way, [names of the teachers]]` for each stand-in."""
ROUNDS = 5
"""How often each way is timed, in turn."""
GAIN = 0.95
"""A way must take less than this part of the time of eager calls."""
WORTH = {"folded": 5.0, "onnxruntime": 20.0, "openvino": 20.0, "compile": 300.0}
"""How many seconds of eager calls a training must have left for a way to be tried: about ten times what that costs."""


@dataclass(frozen=True)
class _Single:
    """What answers for a teacher if it is not one call with others."""

    runs: StandIn | ModelCall
    line: str


def ways(session: Session) -> list[list[Any]]:
    """The decision of a session, as a checkpoint keeps it."""
    known = (BATCHED, *WAYS)
    stand_ins = (one for one in session.teachers.stand_ins if one.way in known)
    return [[one.way, [call.name for call in one.calls]] for one in stand_ins]


def decide(session: Session, known: Known | None, *, worth: Mapping[str, float] = WORTH) -> tuple[str, ...]:
    """Decide how each live teacher is computed, or take what was decided before (`known`); gives what to say of it.

    Raises `PlanError` where a way that was asked for, or that the run began with, is not possible here.
    """
    plan, options, live = session.plan, session.spec.runtime, session.teachers.live
    asked = {call.name: backend_of(plan, call) for call in live}
    groups = _groups(session, [call for call in live if asked[call.name] in (EAGER, AUTO)], known)
    if not groups and all(way == EAGER for way in asked.values()):
        return ()
    batch = training_samples(session)
    before = {name: str(way) for way, names in known or () for name in names}
    untouched = torch.random.fork_rng(devices=range(torch.cuda.device_count()))  # by other people's compilers
    with torch.no_grad(), session.runtime.autocast(), untouched:
        singles: dict[str, _Single] = {}
        for call in live:
            way = asked[call.name]
            if way == AUTO and known is None:
                singles[call.name] = _fastest(session, call, batch, worth)
            elif way == AUTO and before.get(call.name) in WAYS:
                singles[call.name] = _named(before[call.name], call, batch, f"{call.where}, as the run began")
            elif way not in (AUTO, EAGER):
                singles[call.name] = _named(way, call, batch, where_of(plan, call))
        runs = {name: one.runs for name, one in singles.items()}
        always = options.teacher_batching == "always" or known is not None
        choice = choose(groups, batch, always=always, wait=session.runtime.wait, runs=runs)
    together = {call.name for one in choice.adopted for call in one.calls}
    alone = [one for name, one in singles.items() if name not in together]
    session.teachers.adopt([*choice.adopted, *(one.runs for one in alone if not isinstance(one.runs, ModelCall))])
    return (*(one.line for one in alone), *choice.lines)


def training_samples(session: Session) -> Batch:
    """As many training samples as a call of the teachers sees at once, on the device, not augmented."""
    count = session.loader.size
    for parts in (session.accumulate, session.runtime.group.size):
        count = -(-count // parts)
    with torch.no_grad():
        return session.feed.plain(session.splits.train.fetch(range(count)))


def medians(
    contenders: Mapping[str, StandIn | ModelCall], batch: Batch, wait: Callable[[], None], rounds: int = ROUNDS
) -> dict[str, float]:
    """The median milliseconds of each contender, timed in turn."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            values = start(batch)
            wait()
            began = time.perf_counter()
            contender.run(values)
            wait()
            times[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(found) for name, found in times.items()}


def _groups(session: Session, calls: Sequence[ModelCall], known: Known | None) -> list[tuple[ModelCall, ...]]:
    """The teachers that may be one call, or that were."""
    options = session.spec.runtime
    if options.teacher_batching == "never" or options.compile or options.channels_last:
        return []
    groups = alike(session.plan, calls)
    if known is None or options.teacher_batching == "always":
        return groups
    before = [[*names] for way, names in known if way == BATCHED]
    return [group for group in groups if [call.name for call in group] in before]


def _named(way: str, call: ModelCall, batch: Batch, where: str) -> _Single:
    """The way that was asked for."""
    try:
        backend = make_backend(way, call, batch)
    except PlanError as error:
        raise PlanError(f"{where}: the teacher {call.name} cannot be computed by {way}: {error}") from error
    return _Single(backend, f"teacher {call.name}: {way}{_gap(backend, call, batch)}")


def _fastest(session: Session, call: ModelCall, batch: Batch, worth: Mapping[str, float]) -> _Single:
    """The fastest of all ways that are possible and worth trying, eager calls among them."""
    if call.seat is not None:
        return _Single(call, f"teacher {call.name}: eager, as {problem_of(EAGER, call, session.runtime.device)}")
    wait = session.runtime.wait
    call.run(start(batch))  # the first call of a net costs more
    eager = medians({EAGER: call}, batch, wait)[EAGER]
    left = (session.steps - session.step) * session.accumulate * eager / 1000
    made: dict[str, Backend] = {}
    notes: list[str] = []
    for way in WAYS:
        problem = problem_of(way, call, session.runtime.device)
        if problem is None and left < worth[way]:
            problem = f"not tried, as all calls take {left:.2g} s"
        if problem is None:
            try:
                made[way] = make_backend(way, call, batch)
            except PlanError as error:
                problem = f"not possible: {error}"
        if problem is not None:
            notes.append(f"{way} {problem}")
    contenders: dict[str, StandIn | ModelCall] = {EAGER: call, **made}
    found = medians(contenders, batch, wait)
    best = min(found, key=lambda way: found[way])
    best = best if found[best] < GAIN * found[EAGER] else EAGER
    others = [f"{way} {milliseconds(time)}" for way, time in found.items() if way != best]
    why = "; ".join([f"{best}{_gap(made.get(best), call, batch)}, {milliseconds(found[best])}", *others, *notes])
    return _Single(contenders[best], f"teacher {call.name}: {why}")


def _gap(backend: Backend | None, call: ModelCall, batch: Batch) -> str:
    """By how much a backend differs, in words."""
    if backend is None:
        return ""
    values = start(batch)
    backend.run(values)
    return f" (within {compare(call, values, batch):.1g} of eager)"
