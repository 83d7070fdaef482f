"""Meta-learned temperatures and weights of teachers: what they do to the student is tried out, and followed back.

The updater `look_ahead` takes virtual steps of the student on one part of the batch, and changes temperatures or weight
nets so that the student which comes out of them is better on the other part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdx


def two_temperatures(student: Tensor, teacher: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
    """`tau_s tau_t KL(softmax(z_t / tau_t) || softmax(z_s / tau_s))`, [B], from logits [B, K].

    The gradient reaches both temperatures, 0-d or [B], and not the teacher.
    """
    log_q = F.log_softmax(student / kdx.per_sample(ours, student), dim=1)
    log_p = F.log_softmax(teacher.detach() / kdx.per_sample(theirs, teacher), dim=1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1) * ours * theirs


class TwoTemperatures(kdx.Loss):
    """Soft targets with a temperature for either side (Liu et al.: Meta knowledge distillation, 2022), [B].

    `tau_s tau_t KL(softmax(z_t / tau_t) || softmax(z_s / tau_s))` from logits [B, K]; `kd` where both are equal. The
    two come from the target `meta_temperatures`. 0 for a student whose logits are the teacher's times `tau_s / tau_t`.
    The factor is that of `kd`; the published description names none.
    """

    name = "mkd"
    confidence = "paper"
    inputs = {"student": "student.logits", "teacher": "teacher.logits"}
    knobs = {"student_temperature": kdx.Knob(4.0, above=0.0), "teacher_temperature": kdx.Knob(4.0, above=0.0)}
    same_shape = (("student", "teacher"),)

    def __init__(self, config: TwoTemperatures.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_classes(self.name, given, "student")

    def forward(
        self, student: Tensor, teacher: Tensor, student_temperature: Tensor, teacher_temperature: Tensor
    ) -> Tensor:
        return two_temperatures(student, teacher, student_temperature, teacher_temperature)


class MetaTemperatures(kdx.Target):
    """The two temperatures of `mkd`, `student` and `teacher`, 0-d (Liu et al.: Meta knowledge distillation, 2022).

    They are the exponentials of two weights that the updater `look_ahead` learns, and start at `start`. Their learning
    rate is that of the student times `lr_scale`; a small one is published. With any other updater they would only make
    the loss small, which is refused. Published: judged on validation batches; here on a part of each training batch.
    """

    name = "meta_temperatures"
    confidence = "paper"
    outputs = ("student", "teacher")
    shown = ("student", "teacher")

    @dataclass(frozen=True)
    class Config:
        start: float = 4.0

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        if not 0 < config.start < math.inf:
            raise kdx.ConfigError(f"start: found {config.start}, expected a number above 0")
        self.logarithms = nn.Parameter(torch.full((2,), math.log(config.start)))

    def forward(self) -> dict[str, Tensor]:
        ours, theirs = self.logarithms.exp().unbind()
        return {"student": ours, "teacher": theirs}


def similarities(maps: Tensor, width: int) -> Tensor:
    """Cosines of each sample of [B, ...] with all of the batch, filled up with zeros to [B, width]."""
    rows = F.normalize(maps.detach().flatten(1), dim=1)
    return F.pad(rows @ rows.T, (0, width - len(rows)))


class MetaWeights(kdx.Target):
    """Weights of M teachers from two nets that learn by looking ahead (Zhang et al.: MMKD, ICME 2023), both [B, M].

    `weights` are for `weighted_kd`: from all logits [B, K], the student's among them. `feature_weights` are for
    `weighted_hints`: from the cosines of a sample's maps [B, ...] with those of the whole batch, for the student and
    each teacher. Either net has one hidden layer of half the width of its input and ends in a softmax over the
    teachers. The updater `look_ahead` learns them; their learning rate is that of the student times `lr_scale`.

        L = CE + sum_k w_k KL_k + 100 sum_k v_k MSE_k

    batch: the largest batch, `train.batch`; smaller ones are filled up, so that it need not be fixed.

    No gradient reaches the student through the inputs of the nets, also not in virtual steps. Published: Adam for the
    nets; two virtual steps on the terms of the teachers and one on the labels, every fifth update, on 256 stored
    samples that the student gets wrong. Here they learn with the optimizer of the run, on the samples of the update.
    """

    name = "mmkd"
    confidence = "code"
    inputs = {
        "student": "student.logits",
        "logits": kdx.Many("*.logits"),
        "feature": "student.depth_100",
        "features": kdx.Many("*.depth_100"),
    }
    outputs = ("weights", "feature_weights")
    shown = ("weights", "feature_weights")

    @dataclass(frozen=True)
    class Config:
        batch: int = 64

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_classes(self.name, given, "student")
        count, maps = len(given.shapes["logits"]), len(given.shapes["features"])
        if count < 2 or count != maps:
            raise kdx.PlanError(f"mmkd weighs teachers against each other, but was given the logits of {count} and the "
                                f"maps of {maps}; expected those of the same two or more")  # fmt: skip
        if config.batch < 1:
            raise kdx.ConfigError(f"batch: found {config.batch}, expected the number of samples of a batch")
        classes = given.shape("student")[0] + sum(math.prod(shape) for shape in given.shapes["logits"])
        self.logit_net = _weight_net(classes, count)
        self.feature_net = _weight_net((count + 1) * config.batch, count)

    def forward(
        self, student: Tensor, logits: list[Tensor], feature: Tensor, features: list[Tensor]
    ) -> dict[str, Tensor]:
        if len(student) > self.config.batch:
            raise kdx.ConfigError(f"batch: found {self.config.batch}, but a batch has {len(student)} samples; expected "
                                  "train.batch")  # fmt: skip
        answers = torch.cat([*logits, student], 1).detach()
        maps = torch.cat([similarities(x, self.config.batch) for x in (*features, feature)], 1)
        return {"weights": self.logit_net(answers).softmax(1), "feature_weights": self.feature_net(maps).softmax(1)}


class LookAhead(kdx.Updater):
    """Learns temperatures or weights of teachers by their effect on the student, through virtual steps.

    Each update, for a part of the batch: `inner_steps` virtual steps of plain gradient descent on the losses `inner`
    and `outer_steps` on the losses `outer`; the gradient of `outer` at the weights that come out of them, on the rest
    of the batch, goes back through the steps to the weights of the targets `learns`, which the optimizer then changes
    along with the real update of everything else. Their plain gradient is not used.

    learns: names of targets, such as `meta_temperatures` and `mmkd`. held_out: the part of the batch on which the
    outcome is judged. every: looks ahead once in so many updates; in the others the targets `learns` stay as they are.
    lr: of the virtual steps; by default that of the update.

    Costs a further forward and backward pass for each virtual step and one for the judgement, with second derivatives.
    Nothing else notices the virtual steps: not the batch statistics, not the memories of nodes.
    """

    name = "look_ahead"
    eager = True
    needs_teachers = True
    steps: Tensor

    @dataclass(frozen=True)
    class Config:
        learns: list[str] = field(default_factory=list)
        inner: list[str] = field(default_factory=lambda: ["kd"])
        outer: list[str] = field(default_factory=lambda: ["ce"])
        inner_steps: int = 1
        outer_steps: int = 0
        every: int = 1
        held_out: float = 0.5
        lr: float | None = None

    config: Config

    def __init__(self, config: Config, given: kdx.Given | None = None) -> None:
        super().__init__(config, given)
        for name in ("learns", "inner", "outer"):
            if not getattr(config, name):
                what = "targets" if name == "learns" else "losses"
                raise kdx.ConfigError(f"train.updater.{name}: it is empty; expected the names of {what}")
        if config.inner_steps < 1 or config.outer_steps < 0:
            found = f"inner_steps {config.inner_steps} and outer_steps {config.outer_steps}"
            raise kdx.ConfigError(f"train.updater: found {found}, expected at least 1 and at least 0")
        if config.every < 1:
            raise kdx.ConfigError(f"train.updater.every: found {config.every}, expected at least 1 update")
        if not 0 < config.held_out < 1:
            raise kdx.ConfigError(f"train.updater.held_out: found {config.held_out}, expected a part between 0 and 1")
        if config.lr is not None and not 0 < config.lr < math.inf:
            raise kdx.ConfigError(f"train.updater.lr: found {config.lr}, expected a number above 0")
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._steps: int | None = None
        self._found: list[Tensor] = []

    def backward(self, losses: kdx.Losses, share: float, engine: kdx.Engine) -> None:
        engine.backward(losses.total * share)
        if self._steps is None:
            self._steps = int(self.steps)  # once, as a resumed run left it: reading it waits for the device
        if self._steps % self.config.every:
            return
        found = [gradient * share for gradient in self.gradients(engine)]
        self._found = [a + b for a, b in zip(self._found, found, strict=True)] if self._found else found

    def step(self, engine: kdx.Engine) -> None:
        learned = [*self.learned(engine).values()]
        for weight in learned:
            weight.grad = None
        if self._found:
            pairs = zip(learned, self._found, strict=True)
            engine.backward(torch.stack([(weight * gradient).sum() for weight, gradient in pairs]).sum())
            self._found = []
        engine.update()

    def after_update(self, clock: kdx.Clock) -> None:
        self._steps = clock.step
        self.steps.fill_(clock.step)

    def learned(self, engine: kdx.Engine) -> dict[str, nn.Parameter]:
        """The weights that learn by looking ahead, by name."""
        return {
            name: weight for owner in self.config.learns for name, weight in engine.weights(f"targets.{owner}").items()
        }

    def gradients(self, engine: kdx.Engine) -> list[Tensor]:
        """The gradients of the outcome with respect to `learned`, for the present micro-batch."""
        config, size = self.config, len(engine.batch["index"])
        held = min(max(1, round(size * config.held_out)), size - 1)
        tried = {name: stream[: size - held] for name, stream in engine.batch.items()}
        judged = {name: stream[size - held :] for name, stream in engine.batch.items()}
        own = self.learned(engine)
        meta = {name: weight.detach().requires_grad_() for name, weight in own.items()}
        student = {
            name: weight.detach().requires_grad_() for name, weight in engine.weights().items() if name not in own
        }
        lr = engine.optimizer.param_groups[0]["lr"] if config.lr is None else config.lr
        for names in [config.inner] * config.inner_steps + [config.outer] * config.outer_steps:
            value = _sum(engine.losses({**student, **meta}, tried), names)
            steps = torch.autograd.grad(value, [*student.values()], create_graph=True, allow_unused=True)
            moved = zip(student.items(), steps, strict=True)
            student = {name: weight if step is None else weight - lr * step for (name, weight), step in moved}
        outcome = _sum(engine.losses({**student, **meta}, judged), config.outer)
        return [*torch.autograd.grad(outcome, [*meta.values()], allow_unused=True, materialize_grads=True)]


def _sum(losses: kdx.Losses, names: Sequence[str]) -> Tensor:
    return torch.stack([losses.parts[name] for name in names]).sum()


def _weight_net(width: int, count: int) -> nn.Module:
    half = max(1, width // 2)
    return nn.Sequential(nn.Linear(width, half), nn.ReLU(), nn.Linear(half, count))


def _check(plan: kdx.Plan) -> None:
    """Raise `PlanError` unless what learns by looking ahead has the updater that does it, and the names exist."""
    nodes = {call.name: call.module for call in plan.calls}
    ahead = {name for name, node in nodes.items() if isinstance(node, MetaTemperatures | MetaWeights)}
    options = plan.spec.updater.options
    is_ahead = isinstance(options, LookAhead.Config)
    for name in sorted(ahead - set(options.learns if is_ahead else ())):
        raise kdx.PlanError(f"targets.{name}: it learns by looking ahead, but the updater is "
                            f"{plan.spec.updater.entry.component.name}; expected "
                            f"`train: {{updater: {{use: look_ahead, learns: [{name}]}}}}`")  # fmt: skip
    if not is_ahead:
        return
    losses = {call.name.removeprefix("losses.") for call in plan.loss_calls}
    targets = {name for name, node in nodes.items() if isinstance(node, kdx.Target) and _is_trained(node)}
    for option, names, known, what in (
        ("learns", options.learns, targets, "targets with weights"),
        ("inner", options.inner, losses, "losses"),
        ("outer", options.outer, losses, "losses"),
    ):
        for name in set(names) - known:
            listed = ", ".join(sorted(known)) or "none"
            raise kdx.PlanError(f"train.updater.{option}: found {name!r}, expected one of the {what}: {listed}")
    if plan.spec.train.batch // plan.spec.train.accumulate < 2:
        raise kdx.PlanError(
            "train.batch: look_ahead splits each part of a batch in two, so it needs at least 2 samples"
        )


def _is_trained(node: nn.Module) -> bool:
    return any(weight.requires_grad for weight in node.parameters())


@kdx.hookimpl
def kdx_plan_ready(plan: kdx.Plan) -> None:
    _check(plan)


@kdx.hookimpl
def kdx_targets() -> list[type[kdx.Target]]:
    return [MetaTemperatures, MetaWeights]


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [TwoTemperatures]


@kdx.hookimpl
def kdx_updaters() -> list[type[kdx.Updater]]:
    return [LookAhead]
