"""Runs that train side by side: one pass over the data and one pass of the teachers serve them all.

Each run has its own learner, optimizer, random numbers and folder, and takes its turn of one update after the other, so
its numbers are those that it has alone. (Shared teachers are called one by one; a run that alone makes one call or one
compiled graph of its teachers agrees within rounding.)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import psutil
import torch

from kdx.backends import backend_of
from kdx.calls import ModelCall, Values, execute
from kdx.devices import pick_device
from kdx.feed import Feed
from kdx.loop import Session
from kdx.one_graph import compiler_of
from kdx.options import plain_options
from kdx.plan import Plan
from kdx.ranges import AUTO, EAGER
from kdx.reach import base_of
from kdx.recall import IdleCall
from kdx.result import Result
from kdx.runs import Options, Prepared, Stopped, carry_out, check_run, family, finished, steps_of, to_its_end
from kdx.taps import Tapped, read_taps
from kdx.types import Batch

ENDS = Callable[[int, "Result | Exception"], None]
"""Told of each run, by its place, when it has ended: its result, or why there is none."""
SHARE = 0.5
"""The part of the free memory that runs side by side may take."""


class Shared(Feed):
    """What sessions read in common: the batch of an update, and what frozen models give for it.

    Sessions join before their first update. A model is shared by sessions in which it has the same name, options and
    weights; it then gives whatever one of them wants, and lies in memory once.
    """

    def __init__(self) -> None:
        self._feed: Feed | None = None
        self._step = -1
        self._batch: Batch = {}
        self._given: dict[tuple[int, int], Values] = {}
        self._wanted: dict[str, list[tuple[Session, ModelCall]]] = {}
        self._calls: list[ModelCall] | None = None

    def join(self, session: Session) -> None:
        """Let a session read here instead of for itself."""
        own = session.feed
        self._feed = self._feed or own
        session.feed = self
        self._feed.recall.add(own.recall.stored)
        self._feed.read_also(own.streams)
        calls = [call for call in session.plan.teacher_calls
                 if isinstance(call, ModelCall) and not isinstance(call, IdleCall)]  # fmt: skip
        if session.spec.runtime.teacher_batching == "always":
            calls = []  # they are one call, which is the session's own
        calls = [call for call in calls if backend_of(session.plan, call) in (EAGER, AUTO)]  # others are its own, too
        names = {call.name for call in calls if self._take(session, call)}
        session.teachers.share(self.models, names)

    def at(self, step: int) -> Batch:
        if step != self._step:
            assert self._feed is not None
            self._given.clear()
            self._step, self._batch = step, self._feed.at(step)
        return self._batch

    def plain(self, batch: Batch) -> Batch:
        assert self._feed is not None
        return self._feed.plain(batch)

    def models(self, batch: Batch) -> Values:
        """What the shared models give for a batch, or for a part of one, of the present update."""
        part = (batch["index"].data_ptr(), len(batch["index"]))  # parts of a batch are views of it
        if part not in self._given:
            values: Values = {f"batch.{name}": tensor for name, tensor in batch.items()}
            before = set(values)
            if self._calls is None:
                self._calls = [_union(wanted) for wanted in self._wanted.values()]
            execute(self._calls, values)
            self._given[part] = {key: value for key, value in values.items() if key not in before}
        return self._given[part]

    def _take(self, session: Session, call: ModelCall) -> bool:
        """Whether a call is of a model that is here, or that is the first of its name."""
        wanted = self._wanted.setdefault(call.name, [])
        if wanted and not _same(wanted[0], (session, call)):
            return False
        if wanted:
            _lie_once(wanted[0][1].module, call.module)
        wanted.append((session, call))
        self._calls = None
        return True


def _same(one: tuple[Session, ModelCall], other: tuple[Session, ModelCall]) -> bool:
    """Whether two calls are of models with equal options and weights whose taps do not contradict each other."""
    (a, first), (b, second) = one, other
    mine, own = a.spec.models[base_of(first.name)], b.spec.models[base_of(second.name)]
    if mine.entry != own.entry or plain_options(mine.options) != plain_options(own.options):
        return False
    if first.streams != second.streams or first.seat != second.seat:
        return False
    if any(mine.engine.taps[name] != tap for name, tap in own.engine.taps.items() if name in mine.engine.taps):
        return False
    weights = zip(first.module.network.state_dict().values(), second.module.network.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in weights)


def _lie_once(kept: Tapped, copy: Tapped) -> None:
    """Let the weights of a copy be those of the model that is kept."""
    for mine, own in zip(_stored(kept), _stored(copy), strict=True):
        own.data = mine.data


def _stored(model: Tapped) -> Iterator[torch.Tensor]:
    yield from model.network.parameters()
    yield from model.network.buffers()


def _union(wanted: Sequence[tuple[Session, ModelCall]]) -> ModelCall:
    """One call that gives whatever the sessions want of a model."""
    session, first = wanted[0]
    fields = tuple(dict.fromkeys(name for _, call in wanted for name in call.module.wanted))
    tapped, gives = first.module, first.gives
    if fields != tapped.wanted:
        taps: dict[str, object] = {}
        for one, call in wanted:
            taps |= one.spec.models[base_of(call.name)].engine.taps
        tapped = Tapped(first.module.network, fields, read_taps(taps, f"{first.where}.taps"), first.where).train(False)
        tapped.copy_all()
        gives = tuple(f"{first.name}.{name}" for name in fields)
    if session.spec.runtime.compile:
        tapped.compile(**compiler_of(session.runtime.device))
    return replace(first, module=tapped, gives=gives)


@dataclass
class _Turn:
    """One of the runs, with torch's random numbers as it left them."""

    steps: Generator[None, None, Result]
    random: tuple[torch.Tensor, list[torch.Tensor]]


def groups(runs: Sequence[Prepared]) -> list[list[int]]:
    """The places of the runs that may train side by side: those with equal data, batches, seed and device."""
    found: dict[str, list[int]] = {}
    for place, run in enumerate(runs):
        spec = run.spec
        data = [spec.data.entry.component.name, plain_options(spec.data.options), asdict(spec.splits)]
        views = {name: plain_options(spec.views[name].options) for name in run.reached.views}
        batches = [spec.view_count, spec.train.batch, spec.train.accumulate, spec.train.calibration, spec.root.seed]
        alone = place if spec.train.micro_batch == AUTO else None  # what fits is found out without others
        computed = [asdict(spec.runtime), spec.measured]
        key = json.dumps([alone, data, views, batches, computed, run.dataset.fingerprint()], default=str)
        found.setdefault(key, []).append(place)
    return list(found.values())


def side_by_side(runs: Sequence[Prepared], options: Options, ended: ENDS) -> None:
    """Train runs of one of the `groups`, as many at once as fit into memory.

    First come the runs that they need and their plain students, one after another. Of several that are one and the
    same run, the first is trained and the others take what it left. A run that fails is told of and does not stop the
    others. Raises `Stopped` when the runs were asked to stop; their state is saved.
    """
    ready: list[tuple[int, float]] = []
    firsts = {run.folder: place for place, run in reversed([*enumerate(runs)])}
    for place, run in enumerate(runs):
        if firsts[run.folder] != place:
            continue
        try:
            *needed, (own, how) = family(run, options)
            for one, way in needed:
                if options.fresh or not finished(one):
                    check_run(one, way)
                to_its_end(steps_of(one, way))
            ready.append((place, memory(check_run(own, how))))  # the plan itself would stay in memory
        except Stopped:
            raise
        except Exception as error:
            ended(place, error)
    for chunk in _that_fit(ready, pick_device(runs[0].spec.runtime.device)):
        _together(chunk, runs, options, ended)
    for place, run in enumerate(runs):
        if firsts[run.folder] != place:
            try:
                ended(place, carry_out(run, options))
            except Stopped:
                raise
            except Exception as error:
                ended(place, error)


def _together(places: Sequence[int], runs: Sequence[Prepared], options: Options, ended: ENDS) -> None:
    shared = Shared()
    sessions: dict[int, Session] = {}

    def joining(place: int) -> Callable[[Session], None]:
        def join(session: Session) -> None:
            sessions[place] = session
            shared.join(session)

        return join

    def step(place: int) -> int:
        return sessions[place].step if place in sessions else -1

    turns = {
        place: _Turn(steps_of(runs[place], replace(options, join=joining(place), quiet=True)), _random_state())
        # Each holds the lock of its folder: in one order, or two studies could wait for each other.
        for place in sorted(places, key=lambda place: runs[place].folder.name)
    }
    stopped: Stopped | None = None
    try:
        while turns:
            place = min(turns, key=step)  # so that they stay at the same update
            try:
                with _turn_of(turns[place]):
                    next(turns[place].steps)
                continue
            except StopIteration as end:
                ended(place, end.value)
            except Stopped as reason:
                stopped = reason
            except Exception as error:
                ended(place, error)
            del turns[place]
    finally:
        for turn in turns.values():
            turn.steps.close()
    if stopped is not None:
        raise stopped


@contextmanager
def _turn_of(turn: _Turn) -> Iterator[None]:
    """Torch's random numbers are those of the run within the block."""
    outside = _random_state()
    _set_random_state(turn.random)
    try:
        yield
    finally:
        turn.random = _random_state()
        _set_random_state(outside)


def _random_state() -> tuple[torch.Tensor, list[torch.Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _set_random_state(state: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


def _that_fit(ready: Sequence[tuple[int, float]], device: torch.device) -> Iterator[list[int]]:
    """Runs with the memory that they need, in chunks, each of which fits into a share of what is free now."""
    chunk: list[int] = []
    left = limit = SHARE * _free(device)
    for place, cost in ready:
        if chunk and cost > left:
            yield chunk
            chunk, left = [], limit
        chunk.append(place)
        left -= cost
    if chunk:
        yield chunk


def memory(plan: Plan) -> float:
    """Bytes that a run needs beside another one: what it trains, with gradients and two numbers of the optimizer for
    each weight, its average, what its nodes keep, and its teachers until they are known to be shared.
    """
    learner = [call.module for call in (*plan.learner_calls, *plan.loss_calls)]
    copies = 4 + (plan.spec.train.ema is not None)
    trained = sum(value.nbytes for module in learner for value in module.parameters())
    kept = sum(value.nbytes for call in plan.calls for value in call.module.buffers())
    frozen = sum(value.nbytes for call in plan.teacher_calls for value in call.module.parameters())
    return float(copies * trained + kept + frozen)


def _free(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().available)
