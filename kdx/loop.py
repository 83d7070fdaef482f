"""The one training loop, and evaluation.

    batch -> Teachers -> Learner -> backward -> update -> report        (then, by the clock: evaluate, save)

Nothing between a batch and its report waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdx.calls import Key
from kdx.components import Dataset, Given, Metric, Network, Schedule
from kdx.data import Splits, View
from kdx.deploy import deployed
from kdx.diagnosis import check_numbers
from kdx.distributed import leave_out_exchange
from kdx.errors import ConfigError
from kdx.feed import Feed, streams_read
from kdx.functional import Present
from kdx.group import Group
from kdx.guard import EVERY, Guard, Marks
from kdx.loader import Loader, in_order
from kdx.memory import EVALUATION, TRAINING, explained
from kdx.modules import Average, Knobs, Learner, Teachers, overrides, trained
from kdx.nonfinite import SKIP, Rollback, finite_names
from kdx.optim import Trained, make_optimizer, set_lr
from kdx.plan import Plan
from kdx.probe import without_trace
from kdx.randomness import seeded
from kdx.recall import stored_of
from kdx.runtime import Runtime
from kdx.shards import whole
from kdx.shown import Tally
from kdx.spec import Part, RunSpec
from kdx.spread import check_alike, lends, spread
from kdx.types import Batch, Clock, DataFacts, EvalReport, Losses, StepReport
from kdx.updater import Updater

Watch = Callable[[Any], None]


@dataclass
class Session:
    """A plan made ready to train: its modules on the device, its data, and how far it has come."""

    spec: RunSpec
    plan: Plan
    dataset: Dataset
    splits: Splits
    runtime: Runtime
    teachers: Teachers
    learner: Learner
    forward: Callable[..., Losses]
    deployed: Network
    knobs: Knobs
    updater: Updater
    loader: Loader
    feed: Feed
    average: Average | None
    tally: Tally
    guard: Guard
    steps: int
    steps_per_epoch: int
    step: int = 0
    best: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    accumulate: int = 1
    rollback: Rollback | None = None
    sound: frozenset[str] = frozenset()
    """The weights and statistics that were finite at the start."""

    @property
    def clock(self) -> Clock:
        return Clock(self.step, self.steps_per_epoch, self.steps)

    @property
    def student(self) -> Network:
        """The student that is evaluated and kept: the averaged one where there is one."""
        return self.average.model if self.average is not None else self.deployed

    def schedule(self) -> float:
        """The learning rate of the update that the clock is at."""
        return self.spec.lr if isinstance(self.spec.lr, float) else self.spec.lr.at(self.clock)


@dataclass(frozen=True)
class Watchers:
    """Who looks on: each a callable made once. `save` is called when the state is worth keeping, which within an epoch
    is when `is_due` says so.
    """

    step_end: Watch
    eval_end: Watch
    improved: Callable[[Session], None]
    save: Callable[[Session], None]
    stop: Callable[[], bool] = field(default=lambda: False)
    is_due: Callable[[Session], bool] = field(default=lambda session: False)


def make_session(spec: RunSpec, plan: Plan, dataset: Dataset, splits: Splits, runtime: Runtime) -> Session:
    """Modules on the device, optimizer, loader: all that can be made before the first step."""
    options, group = spec.train, runtime.group
    plan = spread(plan, group)
    teachers, learner = Teachers(plan), Learner(plan)
    runtime.place(teachers)
    runtime.place(learner)
    own = partial(group.own, parts=options.accumulate) if group.size > 1 else None
    loader = Loader(splits.train, options.batch, spec.root.seed, spec.runtime.workers, own)
    group.expect(loader.size, options.accumulate)
    steps_per_epoch, steps = length(spec, len(splits.train))
    peak = highest(spec.lr, steps_per_epoch, steps)
    updater = make_updater(spec, plan).to(runtime.device)
    network, reads = runtime.mirror(deployed(plan)), streams_read(plan)
    forward = runtime.join(learner, by_hand=updater.eager, by_total=updater.by_total, lent=lends(plan))
    groups = [*trained(spec, learner), Trained([*updater.parameters()], 1.0, 0.0)]
    optimizer = make_optimizer(groups, options.optimizer, device=runtime.device, peak=peak)
    runtime.prepare(learner, optimizer, options.clip, [*updater.parameters()])
    updater.prepare(runtime)
    average = Average(network, options.ema) if options.ema is not None else None
    knobs = Knobs(plan, runtime.device)
    runtime.faults.skip = spec.root.on_nonfinite == SKIP
    rollback = Rollback([learner, teachers.nodes, updater], runtime.faults.found) if runtime.faults.skip else None
    stored, wanted = stored_of(plan.teacher_calls), streams_read(plan, training=True)
    feed = Feed(loader, dataset, runtime, spec.root.seed, spec.view_count, stored, wanted)
    return Session(
        spec, plan, dataset.reading(reads), splits, runtime, teachers, learner, forward, network, knobs, updater,
        loader, feed, average, Tally(plan.shown, plan.facts.classes),
        Guard(plan.guarded.without(plan.idle), runtime.device), steps, steps_per_epoch,
        accumulate=options.accumulate, rollback=rollback, sound=finite_names(whole(learner.state_dict())),
    )  # fmt: skip


def make_updater(spec: RunSpec, plan: Plan) -> Updater:
    """The updater of a run, told of its losses. Raises `ConfigError` where it cannot work in a compiled step."""
    names = [call.name.removeprefix("losses.") for call in plan.loss_calls]
    losses = {name: spec.losses[name].entry.component.name for name in names}
    given = Given({}, plan.facts, seeded(spec.root.seed, "generator", "train.updater"), losses=losses)
    updater: Updater = spec.updater.entry.component(spec.updater.options, given)
    if updater.eager and spec.runtime.compile:
        raise ConfigError(
            f"runtime.compile: the updater {updater.name} takes the step apart, which a compiled step does not allow; "
            f"expected false"
        )
    return updater


def length(spec: RunSpec, samples: int) -> tuple[int, int]:
    """Updates in an epoch and in the whole training, for this many training samples."""
    options = spec.train
    steps_per_epoch = options.steps_per_epoch or max(1, samples // options.batch)
    return steps_per_epoch, options.updates or max(1, round((options.epochs or 0) * steps_per_epoch))


def highest(lr: float | Schedule, steps_per_epoch: int, steps: int) -> float:
    """The highest learning rate of a training."""
    if isinstance(lr, float):
        return lr
    return max(lr.at(Clock(step, steps_per_epoch, steps)) for step in range(steps))


def train(session: Session, watchers: Watchers) -> None:
    """Train from where the session stands to its end, or until `watchers.stop` says so."""
    for _ in training(session, watchers):
        pass


def training(session: Session, watchers: Watchers) -> Iterator[None]:
    """As `train`, with a pause before each update, in which another session may have its turn."""
    if session.step == 0:
        calibrate(session)
    session.learner.train()
    nodes = (*session.teachers.nodes.values(), *session.learner.nodes.values())
    changers: list[Any] = [node for node in nodes if overrides(node, "after_update")]  # type: ignore[arg-type]
    if type(session.updater).after_update is not Updater.after_update:
        changers.append(session.updater)
    named = {**session.teachers.nodes, **session.learner.nodes}
    runtime, updater, tally, options = session.runtime, session.updater, session.tally, session.spec.train
    in_training = explained(session, TRAINING)
    clock = session.clock
    while session.step < session.steps:
        yield
        batch = session.feed.at(session.step)
        knobs = session.knobs.at(clock)
        lr = session.schedule()
        set_lr(runtime.optimizer, lr)
        runtime.group.begin(session.spec.root.seed, session.step)
        with in_training:
            terms, moved = step(session, batch, knobs)
        runtime.look({})  # or the batch would lie in memory beside the next one
        for key in session.knobs.moving:
            moved[key] = knobs[key]
        if factors := updater.shown():
            moved |= products(factors, {**knobs, **moved})
        session.step += 1
        clock = session.clock
        if session.rollback is not None:
            session.rollback.restore()
        if session.average is not None:
            runtime.refresh()
            session.average.update(clock)
        if changers:
            with torch.no_grad():
                for one in changers:
                    one.after_update(clock)
        if session.rollback is not None:
            session.rollback.restore()  # what these hooks put into buffers
        shown = {**tally.update(), **session.guard.update(), **runtime.faults.update()}
        watchers.step_end(StepReport(clock, lr, terms, moved, runtime.group.samples(batch), shown))
        epoch_ends = _epoch_is_due(session, 1)
        if epoch_ends or session.step % EVERY == 0:
            check_numbers(session, weights=epoch_ends)  # waits for the device
            check_alike(runtime.group, named)
        if epoch_ends:
            for report in tally.epoch(clock):
                watchers.eval_end(report)
        if epoch_ends and _epoch_is_due(session, options.evaluate):
            with explained(session, EVALUATION):
                validate(session, watchers)
        if (epoch_ends and _epoch_is_due(session, options.save)) or watchers.is_due(session) or watchers.stop():
            check_numbers(session, weights=not epoch_ends)
            watchers.save(session)
            if watchers.stop():
                return


def step(session: Session, batch: Batch, knobs: Mapping[Key, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One update. Returns the terms, `total` among them, and the knobs read from nodes, as means over the batch."""
    runtime, group = session.runtime, session.runtime.group
    terms: dict[str, Tensor] = {}
    moved: dict[str, Tensor] = {}
    if session.rollback is not None:
        session.rollback.save()
    for part, share, last in group.parts(batch, session.accumulate):
        with runtime.stopwatch.phase("teachers"), runtime.autocast():
            kept = session.teachers(part, knobs)
        session.guard.add(session.step + 1, *everywhere(group, part, session.teachers.marks))
        with runtime.stopwatch.phase("student"), runtime.syncing(last):
            with runtime.autocast():
                own: Losses = session.forward(part, kept, knobs)
            runtime.faults.add(session.step + 1, part["index"], own)
            losses = group.over_all(own)
            runtime.look(part, _ahead(session, part, kept, knobs) if session.updater.eager else None)
            session.updater.backward(losses, share, runtime)
        add_means(terms, {"total": losses.total.detach(), **losses.means}, share)
        add_means(moved, losses.knobs, share)
        if session.tally.any:
            with torch.no_grad():
                session.tally.add(*group.seen(part, losses.shown))
    with runtime.stopwatch.phase("student"):
        session.updater.step(runtime)
    return terms, moved


def _ahead(
    session: Session, part: Batch, kept: Mapping[Key, Tensor], knobs: Mapping[Key, Tensor]
) -> Callable[[Mapping[str, Tensor], Batch | None], Losses]:
    """What evaluates the learner on a part of a batch with other weights."""
    return Present(session.teachers, session.learner, part, kept, knobs, session.runtime.autocast).losses


def products(factors: Mapping[str, Tensor], knobs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The numbers that an updater shows, those with the path of a knob times the knob."""
    return {path: number * knobs[path] if path in knobs else number for path, number in factors.items()}


def add_means(sums: dict[str, Tensor], values: Mapping[str, Tensor], share: float) -> None:
    """Add each value's mean, times its share of the batch, to the sums."""
    for name, value in values.items():
        mean = value.mean() if value.ndim else value
        sums[name] = mean if share == 1 else sums.get(name, 0.0) + mean * share


def everywhere(group: Group, part: Batch, marks: Marks | None) -> tuple[Batch, Marks | None]:
    """Marks of a part of a batch, and which samples they are of, of all processes."""
    if marks is None or group.size == 1:
        return part, marks
    index = {"index": group.gather(part["index"])}
    dropped = None if marks.dropped is None else group.gather(marks.dropped.T).T
    return index, Marks([[*map(group.gather, traces)] for traces in marks.traces], dropped)


def calibrate(session: Session) -> None:
    """Show some batches to the nodes that want to see data before training; models stay as they are."""
    nodes = [*session.teachers.nodes.values(), *session.learner.nodes.values()]
    if not any(overrides(node, "calibrate") for node in nodes):  # type: ignore[arg-type]
        return
    source = session.loader.epoch(1, 0, whole=True)
    for _, batch in zip(range(session.spec.train.calibration), source, strict=False):
        batch = session.feed.plain(batch)
        knobs = session.knobs.at(session.clock)
        models = session.learner.models.values()
        with torch.no_grad(), without_trace(*models), session.runtime.autocast():
            kept = session.teachers.calibrate(batch, knobs)
            session.learner.calibrate(batch, kept, knobs)


def validate(session: Session, watchers: Watchers) -> None:
    """Evaluate the student on the validation split and remember whether it is the best so far."""
    options, clock = session.spec.train, session.clock
    session.runtime.refresh()
    metrics: dict[str, float] = {}
    if session.splits.val is not None:
        metrics = evaluate(session, session.splits.val, session.student.answer).numbers
    found = {"epoch": _finished_epoch(clock), "step": clock.step, "val": metrics}
    session.last = found
    score, old = metrics.get(options.monitor), (session.best or {}).get("val", {}).get(options.monitor)
    sign = -1.0 if options.minimise else 1.0
    better = score is None or old is None or math.isnan(old) or sign * score > sign * old
    if better:
        session.best = found
        watchers.improved(session)
    if metrics:
        watchers.eval_end(EvalReport(clock, "val", "student", metrics, better))


@dataclass(frozen=True)
class Evaluation:
    """The numbers of all metrics, and the metrics themselves for what they keep besides."""

    numbers: dict[str, float]
    metrics: tuple[Metric, ...]


@torch.no_grad()
def evaluate(session: Session, view: View, answer: Callable[[Batch], Tensor]) -> Evaluation:
    """Every metric of the config for the logits that `answer` gives on a split."""
    metrics = tuple(make_metric(part, session.plan.facts, session.runtime.device) for part in session.spec.metrics)
    group, size = session.runtime.group, session.spec.runtime.eval_batch
    with session.runtime.stopwatch.phase("evaluation"), evaluating(session.learner):
        share = group.share if group.size > 1 else None
        for batch in group.over(in_order(view, size, session.spec.runtime.workers, share), len(view), size):
            batch = session.dataset.on_device(session.runtime.move(batch), None)
            with session.runtime.autocast():
                values = {"student.logits": answer(batch).float()}
            values |= {f"batch.{name}": value for name, value in batch.items()}
            for metric in metrics:
                metric.update(**{name: group.gather(values[key]) for name, key in metric.inputs.items()})
        numbers: dict[str, float] = {}
        for metric in metrics:
            numbers |= metric.compute()
    return Evaluation(group.agreed(numbers), metrics)


class evaluating:  # noqa: N801  (a context manager, used as a verb)
    """Evaluation mode for a module within the block."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    def __enter__(self) -> None:
        self._was = self._module.training
        self._module.eval()

    def __exit__(self, *error: object) -> None:
        self._module.train(self._was)


def make_metric(part: Part, facts: DataFacts, device: torch.device) -> Metric:
    """A fresh metric on the device."""
    metric: Metric = part.entry.component(part.options, facts, device)
    leave_out_exchange(metric)
    return metric


def _epoch_is_due(session: Session, every: int) -> bool:
    """Whether an epoch that counts has just ended; the end of training counts always."""
    per_epoch = session.steps_per_epoch
    if session.step == session.steps:
        return True
    return session.step % per_epoch == 0 and (session.step // per_epoch) % every == 0


def _finished_epoch(clock: Clock) -> int:
    return -(-clock.step // clock.steps_per_epoch)
