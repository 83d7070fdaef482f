"""How each frozen teacher is computed: by itself, in one call or one graph with others, or by a backend in its place.

One decision for each teacher or group of them, said in one line. Where the config leaves it open it is taken by a
measurement on training samples when a run starts; a checkpoint keeps it, so that a resumed run goes on in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kdx.backends import (
    WAYS,
    Backend,
    backend_of,
    compare,
    make_backend,
    named_graphs,
    problem_of,
    reading_the_same,
    ways_on,
    where_of,
)
from kdx.batched import BATCHED, Together, alike, choose
from kdx.calls import ModelCall, StandIn
from kdx.errors import PlanError
from kdx.formats import duration, milliseconds
from kdx.loop import Session
from kdx.ranges import AUTO, EAGER
from kdx.timing import GAIN, InTurn, medians, start
from kdx.types import Batch

Known = Sequence[Sequence[Any]]
"""What a checkpoint keeps of a decision: `[way, [names of the teachers]]` for each stand-in."""
SEVERAL = "one after another"
"""The ways that were found for several teachers without a graph of all."""
WORTH = {"folded": 5.0, "cuda_graph": 5.0, "onnxruntime": 20.0, "openvino": 20.0, "compile": 300.0}
"""How many seconds of eager calls a training must have left for a way to be tried: about ten times what that costs. One
graph of several teachers needs as many for each of them."""


@dataclass(frozen=True)
class _Single:
    """What answers for a teacher if it is not one call or one graph with others."""

    runs: StandIn | ModelCall
    line: str
    eager: float = math.inf
    """Milliseconds of an eager call, where that was measured."""


@dataclass(frozen=True)
class _Graph:
    """One graph of several teachers; None where they stay as they are."""

    runs: Backend | None
    calls: tuple[ModelCall, ...]
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
        graphs = [_named_graph(*one, batch) for one in _graphs_asked_for(session, known)]
        singles: dict[str, _Single] = {}
        in_graphs = {call.name for one in graphs for call in one.calls}
        for call in (call for call in live if call.name not in in_graphs):
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
        if options.teacher_batching == "auto" and known is None:
            open_calls = [call for call in live if asked[call.name] == AUTO]
            graphs += _measured_graphs(session, open_calls, singles, choice.adopted, batch, worth)
    taken = {call.name for one in graphs if one.runs is not None for call in one.calls}
    batched = [one for one in choice.adopted if not any(call.name in taken for call in one.calls)]
    together = taken | {call.name for one in batched for call in one.calls}
    alone = [one for name, one in singles.items() if name not in together]
    backends = [one.runs for one in alone if not isinstance(one.runs, ModelCall)]
    session.teachers.adopt([*batched, *backends, *(one.runs for one in graphs if one.runs is not None)])
    lines = [line for calls, line in zip(groups, choice.lines, strict=True) if calls[0].name not in taken]
    return (*(one.line for one in alone), *lines, *(one.line for one in graphs))


def training_samples(session: Session) -> Batch:
    """As many training samples as a call of the teachers sees at once, on the device, not augmented."""
    count = session.loader.size
    for parts in (session.accumulate, session.runtime.group.size):
        count = -(-count // parts)
    with torch.no_grad():
        return session.feed.plain(session.splits.train.fetch(range(count)))


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


def _graphs_asked_for(session: Session, known: Known | None) -> list[tuple[str, tuple[ModelCall, ...], str]]:
    """Backend, teachers and where that is said, for the graphs that the config asks for or that there were before."""
    plan, batching = session.plan, session.spec.runtime.teacher_batching
    live = {call.name: call for call in session.teachers.live}
    found: list[tuple[str, tuple[ModelCall, ...], str]] = []
    if batching == "always":
        found += [(way, calls, "runtime.teacher_batching") for way, calls in named_graphs(plan, live.values())]
    for way, names in known or ():
        calls = tuple(live[name] for name in names if name in live and backend_of(plan, live[name]) == AUTO)
        if way in WAYS and batching == "auto" and len(calls) == len(names) > 1:
            found.append((way, calls, "teachers, as the run began"))
    return found


def _named_graph(way: str, calls: tuple[ModelCall, ...], where: str, batch: Batch) -> _Graph:
    """The graph that was asked for."""
    who = ", ".join(call.name for call in calls)
    try:
        backend = make_backend(way, calls, batch)
    except PlanError as error:
        raise PlanError(f"{where}: {who} cannot be one graph of {way}: {error}") from error
    return _Graph(backend, calls, f"teachers {who}: one graph of {way}{_gap(backend, batch)}")


def _measured_graphs(
    session: Session,
    calls: Sequence[ModelCall],
    singles: Mapping[str, _Single],
    batched: Sequence[Together],
    batch: Batch,
    worth: Mapping[str, float],
) -> list[_Graph]:
    """For teachers that read the same: one graph of them, if it takes less time than what was found without it."""
    names = {call.name for call in calls}
    inside = [one for one in batched if all(call.name in names for call in one.calls)]
    elsewhere = {call.name for one in batched if one not in inside for call in one.calls}
    found: list[_Graph] = []
    for group in reading_the_same(call for call in calls if call.name not in elsewhere):
        one_call = [one for one in inside if one.calls[0] in group]
        in_one_call = {call.name for one in one_call for call in one.calls}
        rest = [singles[call.name].runs for call in group if call.name not in in_one_call]
        eager = sum(singles[call.name].eager for call in group)
        found.append(_fastest_graph(session, group, InTurn([*one_call, *rest]), eager, batch, worth))
    return found


def _fastest_graph(
    session: Session,
    calls: tuple[ModelCall, ...],
    best: InTurn,
    eager: float,
    batch: Batch,
    worth: Mapping[str, float],
) -> _Graph:
    """The fastest graph of several teachers that is possible and worth trying, if it is faster than `best`."""
    who = ", ".join(call.name for call in calls)
    made, notes = _made(session, calls, eager, batch, worth)
    if not made:
        return _Graph(None, calls, f"teachers {who}: no graph of all; {'; '.join(notes)}")
    found = medians({SEVERAL: best, **made}, batch, session.runtime.wait)
    times = {way: f"{way} {milliseconds(time)}" for way, time in found.items()}
    way = min(made, key=lambda way: found[way])
    if found[way] < GAIN * found[SEVERAL]:
        del times[way]
        said = f"one graph of {way}{_gap(made[way], batch)}, {milliseconds(found[way])}"
        return _Graph(made[way], calls, f"teachers {who}: {'; '.join([said, *times.values(), *notes])}")
    return _Graph(None, calls, f"teachers {who}: no graph of all, as {'; '.join([*times.values(), *notes])}")


def _named(way: str, call: ModelCall, batch: Batch, where: str) -> _Single:
    """The way that was asked for."""
    try:
        backend = make_backend(way, [call], batch)
    except PlanError as error:
        raise PlanError(f"{where}: the teacher {call.name} cannot be computed by {way}: {error}") from error
    return _Single(backend, f"teacher {call.name}: {way}{_gap(backend, batch)}")


def _fastest(session: Session, call: ModelCall, batch: Batch, worth: Mapping[str, float]) -> _Single:
    """The fastest of all ways that are possible and worth trying, eager calls among them."""
    if call.seat is not None:
        return _Single(call, f"teacher {call.name}: eager, as {problem_of(EAGER, call, session.runtime.device)}")
    wait = session.runtime.wait
    call.run(start(batch))  # the first call of a net costs more
    eager = medians({EAGER: call}, batch, wait)[EAGER]
    made, notes = _made(session, [call], eager, batch, worth)
    contenders: dict[str, StandIn | ModelCall] = {EAGER: call, **made}
    found = medians(contenders, batch, wait)
    best = min(found, key=lambda way: found[way])
    best = best if found[best] < GAIN * found[EAGER] else EAGER
    others = [f"{way} {milliseconds(time)}" for way, time in found.items() if way != best]
    gap = _gap(made[best], batch) if best in made else ""
    why = "; ".join([f"{best}{gap}, {milliseconds(found[best])}", *others, *notes])
    return _Single(contenders[best], f"teacher {call.name}: {why}", found[EAGER])


def _made(
    session: Session, calls: Sequence[ModelCall], eager: float, batch: Batch, worth: Mapping[str, float]
) -> tuple[dict[str, Backend], list[str]]:
    """The backends that are possible and worth trying, and why others are not; eager calls take `eager` ms."""
    left = (session.steps - session.step) * session.accumulate * eager / 1000
    made: dict[str, Backend] = {}
    notes: list[str] = []
    for way in ways_on(session.runtime.device):
        problems = [problem_of(way, call, session.runtime.device) for call in calls]
        problem = next((one for one in problems if one is not None), None)
        if problem is None and left < len(calls) * worth[way]:
            problem = f"not tried, as all calls take {duration(left)}"
        if problem is None:
            try:
                made[way] = make_backend(way, calls, batch)
            except PlanError as error:
                problem = f"not possible: {error}"
        if problem is not None:
            notes.append(f"{way} {problem}")
    return made, notes


def _gap(backend: Backend, batch: Batch) -> str:
    """By how much a backend differs, in words."""
    values = start(batch)
    backend.run(values)
    return f" (within {compare(backend.calls, values, batch):.1g} of eager)"
