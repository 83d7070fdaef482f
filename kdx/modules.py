"""What a step is made of: `Teachers` (frozen), `Learner` (all that has a gradient) and `Knobs` (numbers that move)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from kdx.calls import Call, Key, ModelCall, NodeCall, StandIn, Values, execute, weighted
from kdx.components import Network, Node, Schedule
from kdx.devices import without_autocast
from kdx.guard import Marks
from kdx.joint import joined
from kdx.optim import Trained
from kdx.plan import Plan
from kdx.recall import IdleCall, RecallCall, RecallTarget
from kdx.spec import RunSpec
from kdx.streams import Lane, in_turn
from kdx.taps import Tapped
from kdx.types import Batch, Clock, Losses


class Knobs:
    """The constants and schedules of a plan, as 0-d tensors on the device by config path.

    One small tensor is made when a value changes, and read as views; a compiled step never sees a Python number.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self._knobs = plan.knobs
        self._device = device
        self._numbers: list[float] = []
        self._views: dict[Key, Tensor] = {}
        self.moving = tuple(key for key, knob in plan.knobs.items() if isinstance(knob, Schedule))

    def at(self, clock: Clock) -> dict[Key, Tensor]:
        """The value of every knob during the update that the clock is at."""
        if self._views and not self.moving:
            return self._views
        numbers = [knob if isinstance(knob, float) else knob.at(clock) for knob in self._knobs.values()]
        if numbers != self._numbers:
            self._numbers = numbers
            whole = torch.tensor(numbers, dtype=torch.float32)
            whole = whole.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else whole
            self._views = dict(zip(self._knobs, whole.to(self._device).unbind(), strict=True))
        return self._views


class Teachers(nn.Module):
    """The frozen side. Gives the tensors that the learner reads, without gradient."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self._models = tuple(call for call in plan.teacher_calls if isinstance(call, ModelCall))
        self._idle = tuple(call for call in self._models if call.name in plan.idle)
        self._recalled = tuple(call for call in self._models if isinstance(call, RecallCall))
        self.live = tuple(call for call in self._models if not isinstance(call, IdleCall))
        self.stand_ins: tuple[StandIn, ...] = ()
        self.lane: Lane = in_turn
        self._nodes = tuple(call for call in plan.teacher_calls if isinstance(call, NodeCall))
        self._awake = tuple(call for call in self._nodes if call.name not in plan.idle)
        self._stored = tuple(call.stored for call in self._nodes if isinstance(call, RecallTarget))
        self._everyone, self._guarded = plan.guarded, plan.guarded.without(plan.idle)
        self.marks: Marks | None = None
        self._source: Callable[[Batch], Values] | None = None
        self._kept = (*plan.kept, *plan.reported)
        self._compiler: Mapping[str, Any] | None = None
        self._rest: Callable[[Values], dict[Key, Tensor]] | None = None
        self.models = nn.ModuleDict(_models(tuple(call for call in self._models if call.seat is None)))
        self.nodes = nn.ModuleDict(_nodes(plan.teacher_calls))
        super().train(False)

    def train(self, mode: bool = True) -> Self:
        """Ignored: nothing puts a frozen teacher into training mode by accident."""
        return self

    def share(self, source: Callable[[Batch], Values], names: Container[str]) -> None:
        """Take what the models `names` give for a batch from `source`, which runs them for several learners at once."""
        self._source = source
        self.live = tuple(call for call in self.live if call.name not in names)
        if self._compiler is not None:
            self._compile_around()

    def adopt(self, stand_ins: Sequence[StandIn]) -> None:
        """Let these answer for training batches in place of the live models that they name."""
        taken = {call.name for one in stand_ins for call in one.calls}
        self.stand_ins = (*self.stand_ins, *stand_ins)
        self.live = tuple(call for call in self.live if call.name not in taken)
        if stand_ins and self._compiler is not None:
            self._compile_around()

    def compile(self, *arguments: Any, **options: Any) -> None:
        """One graph of all, or of what lies around stand-ins and shared models, which no compiler follows."""
        self._compiler = options
        super().compile(*arguments, **options)

    def _compile_around(self) -> None:
        assert self._compiler is not None
        self._compiled_call_impl = None
        for call in self.live:
            call.module.compile(**self._compiler)
        if self._awake:  # a compiled call costs more than to look at a few answers
            self._rest = torch.compile(self._after_models, **self._compiler)

    @torch.no_grad()
    def forward(self, batch: Batch, knobs: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """The kept tensors for a batch."""
        values = _start(batch, knobs)
        if self._source is not None:
            values.update(self._source(batch))
        execute(self._recalled, values)
        self.lane((*self.live, *self.stand_ins), values)
        return (self._rest or self._after_models)(values)

    def _after_models(self, values: Values) -> dict[Key, Tensor]:
        """Look at what live models gave, and run the nodes; gives what is kept."""
        asleep = self._asleep(values)
        if not asleep:
            execute(self._idle, values)
        self._guard(values, asleep=asleep)
        execute(self._awake if asleep else self._nodes, values)
        return {key: values[key] for key in self._kept}

    @torch.no_grad()
    def answers(self, batch: Batch, knobs: Mapping[Key, Tensor]) -> Values:
        """Every tensor of the teacher side for a batch that is not of training."""
        values = _start(batch, knobs)
        execute(self._models, values)
        if self._models:
            self._everyone.inspect(values)
        execute(self._nodes, values)
        return values

    @torch.no_grad()
    def calibrate(self, batch: Batch, knobs: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """As a forward pass, with the batch handed to the targets that want to see data before training."""
        values = _start(batch, knobs)
        asleep = self._asleep(values)
        execute([call for call in self._models if not (asleep and call in self._idle)], values)
        self._guard(values, asleep=asleep)
        for call in self._awake if asleep else self._nodes:
            _calibrate(call, values)
            call.run(values)
        return {key: values[key] for key in self._kept}

    def _asleep(self, values: Values) -> bool:
        """Whether the answers of all stored targets came with the batch, so that what they alone read is not needed."""
        return all(one.among(values) for one in self._stored)

    def _guard(self, values: Values, *, asleep: bool) -> None:
        """Leave the marks of the batch for the loop to count, which are of the teachers that training runs."""
        if self._idle and not asleep:
            self._everyone.inspect(values)
        self.marks = self._guarded.inspect(values) if self._guarded.calls else None


class Learner(nn.Module):
    """The side that learns: the student, trainable peers, aligners and losses with their parameters.

    One module, so that the optimizer, a process group, `compile` and the checkpoint each see one object.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self._calls = plan.learner_calls
        self._losses = plan.loss_calls
        self._joined = joined(plan)
        self._terms = [(call.name.removeprefix("losses."), call.gives[0]) for call in plan.loss_calls]
        self._units = frozenset(key for key, knob in plan.knobs.items() if knob == 1.0)
        self._knobs = plan.read_knobs
        self._shown = plan.shown
        self.models = nn.ModuleDict(_models(plan.learner_calls))
        self.nodes = nn.ModuleDict(_nodes((*plan.learner_calls, *plan.loss_calls)))

    @property
    def student(self) -> Tapped:
        student = self.models["model/student"]
        assert isinstance(student, Tapped)
        return student

    def forward(self, batch: Batch, kept: Mapping[Key, Tensor], knobs: Mapping[Key, Tensor]) -> Losses:
        """The terms for a batch, computed in float32 whatever the precision of the networks."""
        values = _start(batch, knobs)
        values.update(kept)
        execute(self._calls, values)
        with without_autocast(next(iter(batch.values())).device.type):
            execute(self._joined, values)
            means, parts = weighted(self._losses, values, self._units)
            total = functools.reduce(torch.add, parts.values())
        means = {name: mean.detach() for name, mean in means.items()}
        given = {name: values[key] for name, key in self._terms}
        terms = {name: term.detach() if term.ndim else means[name] for name, term in given.items()}
        knobs = {name: values[key].detach() for name, key in self._knobs.items()}
        shown = {one.key: values[one.key].detach() for one in self._shown}
        return Losses(total, terms, knobs, parts, shown, means)

    def calibrate(self, batch: Batch, kept: Mapping[Key, Tensor], knobs: Mapping[Key, Tensor]) -> None:
        """Hand one batch to the nodes that want to see data before training."""
        values = _start(batch, knobs)
        values.update(kept)
        for call in self._calls:
            _calibrate(call, values)
            call.run(values)
        for loss in self._losses:  # not run: nothing reads them, and some remember what they have seen
            _calibrate(loss, values)


class Average:
    """An exponential moving average of what is deployed: `average <- decay * average + (1 - decay) * student`.

    Buffers (batch statistics) are copied. The decay rises with the number of updates, `min(decay, (1+n)/(10+n))`, so
    that the first weights are soon forgotten.
    """

    def __init__(self, student: Network, decay: float) -> None:
        self.model = copy.deepcopy(student).requires_grad_(False).eval()
        self._decay = decay
        self._source: list[Tensor] = [*student.parameters()]
        self._average: list[Tensor] = [*self.model.parameters()]
        parts = zip(self.model.modules(), student.modules(), strict=True)
        self._buffers = [(mine._buffers, own._buffers) for mine, own in parts if own._buffers]

    @torch.no_grad()
    def update(self, clock: Clock) -> None:
        """Take in the student's weights after an update."""
        decay = min(self._decay, (1 + clock.step) / (10 + clock.step))
        torch._foreach_lerp_(self._average, self._source, 1 - decay)
        for mine, own in self._buffers:  # looked up by name: a module may have put another tensor there
            for name, value in own.items():
                now = mine.get(name)
                if value is None or now is None or now.shape != value.shape:
                    mine[name] = None if value is None else value.clone()
                else:
                    now.copy_(value)


def trained(spec: RunSpec, learner: Learner) -> list[Trained]:
    """What the optimizer trains: the networks, then each node as its section says."""
    decay, vectors = spec.train.weight_decay, spec.train.decay_vectors
    groups = [Trained([*learner.models.parameters()], 1.0, decay, vectors)]
    sections = {"targets": spec.targets, "align": spec.align, "losses": spec.losses}
    for name, node in learner.nodes.items():
        section, _, own = name.partition("/")
        engine = sections[section][own].engine
        node_decay = decay if engine.weight_decay is None else engine.weight_decay
        groups.append(Trained([*node.parameters()], engine.lr_scale, node_decay, vectors))
    return groups


def overrides(node: Node, method: str) -> bool:
    """Whether a node brings its own version of an optional method."""
    return getattr(type(node), method) is not getattr(Node, method)


def generators(plan: Plan) -> dict[str, torch.Generator]:
    """The random generator of every node, by the node's name."""
    return {call.name: call.module.given.generator for call in plan.calls if isinstance(call, NodeCall)}


def _calibrate(call: Call, values: Values) -> None:
    if not isinstance(call, NodeCall) or not overrides(call.module, "calibrate"):
        return
    if (arguments := call.seen(values)) is not None:
        call.module.calibrate(**arguments)


def _models(calls: tuple[Call, ...]) -> dict[str, nn.Module]:
    """Keyed with a slash: a name alone might be that of an attribute of `ModuleDict`."""
    return {f"model/{call.name}": call.module for call in calls if isinstance(call, ModelCall)}


def _nodes(calls: tuple[Call, ...]) -> dict[str, nn.Module]:
    return {
        f"{call.kind}/{call.name.removeprefix('losses.')}": call.module for call in calls if isinstance(call, NodeCall)
    }


def _start(batch: Batch, knobs: Mapping[Key, Tensor]) -> Values:
    values: Values = {f"batch.{name}": tensor for name, tensor in batch.items()}
    values.update(knobs)
    return values
