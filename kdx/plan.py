"""Compiles a spec: which calls, in which order, on which side. `make_plan` reads from top to bottom."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from kdx.cache_options import read_cache
from kdx.calls import Call, Key, ModelCall, NodeCall, Values
from kdx.components import Loss, Model, Network, Schedule
from kdx.errors import KdxError, PlanError, did_you_mean
from kdx.gaps import all_there, gap_notes, settled, told
from kdx.guard import Guarded, guarded
from kdx.presence import Presence
from kdx.probe import probe, shape_of, without_trace
from kdx.randomness import derive_seed
from kdx.reach import Reach, base_of, flat, reach, unasked, upstream
from kdx.recall import IdleCall, RecallCall, Recalled, RecallTarget, Stored, recalled
from kdx.rough import RoughDraws
from kdx.seats import Seat, seat_of
from kdx.shown import Shown, find_shown, read_knobs
from kdx.spec import ModelSpec, NodeSpec, RunSpec
from kdx.storable import check_storable
from kdx.taps import LOGITS, Tapped, read_taps
from kdx.types import Batch, Clock, DataFacts, Shape
from kdx.wiring import node_call

Ready = Callable[[ModelSpec, Network], None]
"""Called with each network when it is built: puts weights into it. Without it nothing is fetched or loaded."""
_TO_BE_STORED = "its answers for training are stored before it, and read from then on"


@dataclass(frozen=True)
class Plan:
    """The compiled run.

    `teacher_calls` run without gradient and hand over the tensors `kept`, and for reports those that are `reported`;
    `learner_calls` and `loss_calls` have a gradient. `knobs` are all constants and schedules, `read_knobs` those that
    are refs; `shapes` are per sample, by key. `notes` say in words what was chosen, `unused` which parts of the config
    no loss needs.
    """

    spec: RunSpec
    facts: DataFacts
    student: Tapped
    teacher_calls: tuple[Call, ...]
    learner_calls: tuple[Call, ...]
    loss_calls: tuple[NodeCall, ...]
    kept: tuple[Key, ...]
    knobs: Mapping[Key, float | Schedule]
    shapes: Mapping[Key, Shape]
    unused: tuple[str, ...]
    notes: tuple[str, ...]
    shown: tuple[Shown, ...] = ()
    read_knobs: Mapping[str, Key] = field(default_factory=dict)
    reported: tuple[Key, ...] = ()
    guarded: Guarded = field(default_factory=Guarded)
    others: frozenset[str] = frozenset()
    """The teachers that tell other classes apart than those of the data."""
    idle: frozenset[str] = frozenset()
    """The teachers and targets that stored targets alone read, so that no batch of training runs them."""

    def knows_classes(self, name: str) -> bool:
        """Whether a model's logits are over the classes of the data."""
        return name not in self.others and logits_shape(self.shapes, name) == (len(self.facts.classes),)

    @property
    def calls(self) -> tuple[Call, ...]:
        return (*self.teacher_calls, *self.learner_calls, *self.loss_calls)

    @property
    def teachers(self) -> dict[str, Tapped]:
        """The frozen teachers that are run, by name, on whatever view."""
        return {name: call.module for name, call in self.teacher_models.items()}

    @property
    def teacher_models(self) -> dict[str, ModelCall]:
        """The calls of the frozen teachers, by name, one for each."""
        found: dict[str, ModelCall] = {}
        for call in self.teacher_calls:
            if isinstance(call, ModelCall):
                found.setdefault(base_of(call.name), call)
        return found


def make_plan(
    spec: RunSpec,
    facts: DataFacts,
    sample: Batch,
    *,
    device: torch.device | None = None,
    ready: Ready | None = None,
    networks: Mapping[str, nn.Module] | None = None,
    classes: Mapping[str, tuple[str, ...]] | None = None,
    stored: Mapping[str, Stored] | None = None,
    rough: bool = False,
) -> Plan:
    """Reach, wire, probe, build, split.

    `sample` holds at least two samples as they come from `Dataset.on_device`. `networks` are modules that stand in
    for model sections; `classes` those that a teacher tells apart where it learnt others than those of the data;
    `stored` holds answers by teacher and view (`wide@strong`), in place of a net that is built when first asked. Raises
    `PlanError` where parts do not fit, naming path, shapes and component. Without `device` the plan is for reading and
    checking alone, and everything is in main memory. A `rough` plan has no weights to train from, and is sooner made.
    """
    seats = {name: seat_of(model.engine, device, model.where) for name, model in spec.models.items()}
    device = device or torch.device("cpu")
    sample = all_there({name: value[:2].to(device) for name, value in sample.items()}, facts)
    reached = reach(spec, facts)
    stored = stored or {}
    idle = unasked(reached, stored)

    @functools.cache
    def network_of(name: str) -> Network:
        known = replace(facts, classes=(classes or {}).get(name, facts.classes))
        network = build_model(spec.models[name], known, spec.root.seed, networks, ready, rough=rough)
        if (seat := seats[name]) is None:
            network.to(device)
        else:
            seat.settle(network)
        return network

    lent = {model for parts in reached.borrowed.values() for model, _ in flat(parts)}
    asked = {base_of(owner) for owner in reached.fields if owner not in stored and owner not in idle} | lent
    models = {name: network_of(name) for name in reached.models if name in asked}
    values: Values = {f"batch.{name}": value for name, value in sample.items()}
    knobs = _knob_values(reached, device, values)
    shapes: dict[Key, Shape] = {key: shape_of(value) for key, value in values.items()}
    for one in stored.values():
        values |= {f"batch.{name}": rows.to(device) for name, rows in one.rows(sample["index"].cpu(), 0).items()}
    for name in reached.nodes.keys() & stored.keys():
        shapes |= stored[name].inputs

    def live(item: str) -> ModelCall:
        name = base_of(item)
        call = _model_call(item, spec.models[name], network_of(name), reached.fields[item], seats[name])
        with without_trace(call.module), torch.no_grad():
            call.protect({f"batch.{stream}": value for stream, value in sample.items()})
        return call

    def node(item: str, seed: int) -> NodeCall:
        return node_call(item, reached, facts, spec, shapes, models, device, seed)

    calls: list[Call] = []
    tapped: dict[str, Tapped] = {}
    presences: dict[Key, Presence] = {}
    for item in reached.order:
        call: Call
        if (name := base_of(item)) not in spec.models:
            call = node(item, spec.root.seed)
            call = recalled(call, stored[item]) if item in stored else call
        elif item in stored or item in idle:
            call = _late_call(item, spec.models[name], reached.fields[item], stored.get(item), facts, live)
        else:
            call = _model_call(item, spec.models[name], models[name], reached.fields[item], seats[name])
        if isinstance(call, ModelCall):
            tapped[item] = call.module
        call = told(call, facts, presences)
        if item not in idle:
            probe(call, values, shapes)
            call = settled(call, values)
        calls.append(call)
    student = next((module for name, module in tapped.items() if base_of(name) == "student"), None)
    if student is None:
        raise PlanError("losses: none of them reads the student, so nothing would be learnt")
    _check_student(spec, student, shapes, facts)
    losses = tuple(call for call in calls if isinstance(call, NodeCall) and call.kind == "losses")
    others = {name: own for name, own in (classes or {}).items() if own != facts.classes}
    teacher_side = _teacher_side(spec, calls)
    nodes = {call.name: call for call in calls if isinstance(call, NodeCall)}
    unfilled = [item for item in reached.fields if item not in stored and item not in idle]
    notes = [
        f"{item}: {_TO_BE_STORED}"
        for item in unfilled
        if reached.fields[item] and _asks_for_cache(spec.models[base_of(item)])
    ]
    for name, target in spec.targets.items():
        if name in nodes and name not in stored and _asks_for_cache(target):
            chain = [nodes[one] for one in upstream(reached, name) if one in nodes and one not in idle]
            check_storable(chain, values, teacher_side, lambda call: node(call.name, spec.root.seed + 1).module)
            notes.append(f"{target.where}: {_TO_BE_STORED}")
    teacher_calls = tuple(call for call in calls if call.name in teacher_side and call not in losses)
    learner_calls = tuple(call for call in calls if call not in teacher_calls and call not in losses)
    made = {key for call in teacher_calls for key in call.gives}
    kept = dict.fromkeys(key for call in (*learner_calls, *losses) for key in call.reads if key in made)
    awake = [call for call in calls if call.name not in idle]
    shown, read = find_shown(awake, values, shapes), read_knobs(awake)
    reported = dict.fromkeys(key for key in (*(one.key for one in shown), *read.values()) if key in made)
    return Plan(
        spec, facts, student, teacher_calls, learner_calls, losses, tuple(kept), knobs, shapes, reached.unused,
        (*_notes(calls, teacher_side, idle), *notes), shown, read, tuple(key for key in reported if key not in kept),
        guarded(teacher_calls, shapes, spec.root.on_bad_teacher, others), frozenset(others), idle,
    )  # fmt: skip


def build_model(
    spec: ModelSpec,
    facts: DataFacts,
    seed: int,
    networks: Mapping[str, nn.Module] | None = None,
    ready: Ready | None = None,
    *,
    rough: bool = False,
) -> Network:
    """A network whose first weights depend on the seed and its role alone; `rough` ones repeat a few numbers."""
    streams = streams_of(spec, facts)
    with torch.random.fork_rng(), warnings.catch_warnings(), RoughDraws() if rough else nullcontext():  # type: ignore[no-untyped-call]
        torch.manual_seed(derive_seed(seed, "model", spec.name))
        if networks is not None and spec.name in networks:
            own = networks[spec.name]
            network = own if isinstance(own, Network) else Network(own, streams)
        else:
            try:
                model: Model = spec.entry.component(spec.options, facts, streams)
                filled = ready is None or spec.engine.run is not None or spec.engine.checkpoint is not None
                network = model.skeleton() if filled else model.build()
            except KdxError as error:
                raise type(error)(f"{spec.where}: {error}") from error
            except Exception as error:
                raise PlanError(f"{spec.where}: {spec.entry.component.name} could not be built: {error}") from error
    if not isinstance(network, Network):
        raise PlanError(
            f"{spec.where}: {spec.entry.component.name} (plugin {spec.entry.plugin.name}) built a "
            f"{type(network).__name__}, expected a kdx.Network"
        )
    if ready is not None:
        ready(spec, network)
    if spec.frozen:
        network.requires_grad_(False).eval()
    return network


def streams_of(spec: ModelSpec, facts: DataFacts) -> tuple[str, ...]:
    """The streams that a model reads: those that it names, else the only one that is no label."""
    named = spec.engine.input
    if named is None:
        choices = [
            name for name, stream in facts.streams.items() if stream.kind not in ("label", "mask") and "@" not in name
        ]
        if len(choices) != 1:
            raise PlanError(f"{spec.where}.input: the data has {', '.join(choices)}; say which of them the model reads")
        return (choices[0],)
    streams = [named] if isinstance(named, str) else named
    if not isinstance(streams, list) or not streams or not all(isinstance(stream, str) for stream in streams):
        raise PlanError(f"{spec.where}.input: found {named!r}, expected the name of a stream or a list of them")
    for stream in streams:
        if stream not in facts.streams:
            near = did_you_mean(stream, facts.streams, what="streams")
            raise PlanError(f"{spec.where}.input: the data has no stream {stream!r}; {near}")
    return tuple(streams)


def _model_call(name: str, spec: ModelSpec, network: Network, wanted: tuple[str, ...], seat: Seat | None) -> ModelCall:
    tapped = Tapped(network, wanted, read_taps(spec.engine.taps, f"{spec.where}.taps"), spec.where)
    tapped.train(not spec.frozen)
    view = name.removeprefix(spec.name)
    streams = {stream: f"batch.{stream}{view}" for stream in network.streams}
    return ModelCall(name, spec.where, tapped, streams, tuple(f"{name}.{field}" for field in wanted), seat)


def _late_call(
    name: str,
    spec: ModelSpec,
    wanted: tuple[str, ...],
    stored: Stored | None,
    facts: DataFacts,
    live: Callable[[str], ModelCall],
) -> IdleCall:
    """A teacher whose network is built when it is first asked for; without `stored`, one that is idle."""
    view = name.removeprefix(spec.name)
    streams = {stream: f"batch.{stream}{view}" for stream in streams_of(spec, facts)}
    gives = tuple(f"{name}.{field}" for field in wanted)
    network = functools.cache(functools.partial(live, name)) if spec.at_hand else None
    if stored is None:
        return IdleCall(name, spec.where, Recalled(wanted), streams, gives, live=network)
    return RecallCall(name, spec.where, Recalled(wanted), streams, gives, stored=stored, live=network)


def logits_shape(shapes: Mapping[Key, Shape], model: str) -> Shape | None:
    """The shape of a model's logits, on whatever view; None where nothing reads them."""
    for key, shape in shapes.items():
        owner, _, name = key.rpartition(".")
        if base_of(owner) == model and name == LOGITS:
            return shape
    return None


def _knob_values(reached: Reach, device: torch.device, values: Values) -> dict[Key, float | Schedule]:
    knobs: dict[Key, float | Schedule] = {}
    start = Clock(0, 1, 1)
    for node in reached.nodes.values():
        for name, knob in node.knobs.items():
            if isinstance(knob, str):
                continue
            key = f"{node.where}.{name}"
            knobs[key] = knob
            number = knob if isinstance(knob, float) else knob.at(start)
            values[key] = torch.tensor(number, device=device)
    return knobs


def _teacher_side(spec: RunSpec, calls: list[Call]) -> set[str]:
    """The calls that read nothing with a gradient, have no parameters and train no borrowed part."""
    side: set[str] = set()
    made: dict[Key, str] = {key: call.name for call in calls for key in call.gives}
    for call in calls:
        if isinstance(call, ModelCall):
            if spec.models[base_of(call.name)].frozen:
                side.add(call.name)
        elif all(made[key] in side for key in call.reads if key in made) and not (
            any(True for _ in call.module.parameters()) or any(part.trains for part in call.borrowed)
        ):
            side.add(call.name)
    return side


def _check_student(spec: RunSpec, student: Tapped, shapes: Mapping[Key, Shape], facts: DataFacts) -> None:
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise PlanError(f"student: {spec.student.entry.component.name} has no parameters that could be trained")
    found = logits_shape(shapes, "student")
    if facts.classes and found is not None and found != (len(facts.classes),):
        raise PlanError(f"student: its logits have shape {list(found)}, but the data has {len(facts.classes)} classes")


def _asks_for_cache(part: ModelSpec | NodeSpec) -> bool:
    return read_cache(part.engine.cache, f"{part.where}.cache") is not None


def _notes(calls: list[Call], teacher_side: set[str], idle: frozenset[str]) -> Iterator[str]:
    if idle:
        names = ", ".join(call.name for call in calls if call.name in idle)
        yield f"not run in training, for only stored targets read it: {names}"
    for call in calls:
        if isinstance(call, RecallCall):
            yield f"{call.name}: its answers for training are read from {call.stored.store.folder}"
        if isinstance(call, RecallTarget):
            yield f"{call.where}: its answers for training are read from {call.stored.store.folder}"
        if isinstance(call, ModelCall) and call.name in teacher_side and call.module.stops_early:
            yield f"{call.where} stops early: nothing after {', '.join(call.module.wanted)} is asked of it"
        if isinstance(call, ModelCall):
            for name, stage in call.module.stages_meant.items():
                yield f"{call.name}.{name} is stage {stage}"
        if isinstance(call, NodeCall) and isinstance(call.module, Loss) and call.module.answers:
            yield f"{call.where} changes what is deployed: it answers from {', '.join(call.module.answers)}"
        describe = getattr(call.module, "describe", None)
        if isinstance(call, NodeCall) and describe is not None:
            yield f"{call.where}: {describe()}"
    yield from gap_notes(calls)
