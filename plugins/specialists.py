"""Teachers that each answer for a part: for some samples (`route`), or for some of the classes (`class_subset`).

A softmax over some classes is a distribution on the condition that the class is among them. It says nothing of how
likely that is: any number may be added to a teacher's logits. How much of a sample each teacher has to say must come
from elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdx

LEAST = 1e-12
"""The least share of a teacher in a mixture, so that logarithms and gradients stay finite."""
RULES = ("confidence", "energy", "student")


def embed(logits: Tensor, classes: Tensor, count: int, temperature: Tensor) -> Tensor:
    """Log-probabilities [B, count] of a teacher that knows `classes` [S] alone; -inf for all others.

    `logits` [B, S] are in the order of `classes`, `temperature` is 0-d or [B].
    """
    known = torch.log_softmax(logits / kdx.per_sample(temperature, logits), dim=1)
    return known.new_full((len(known), count), -math.inf).index_copy(1, classes, known)


def mixed(parts: Sequence[Tensor], weights: Tensor, temperature: Tensor) -> Tensor:
    """Logits [B, K] of a mixture at a temperature: `tau log sum_k w_k p_k`, of log-probabilities [B, K] and weights
    [B, M]. Each class must be known to one of the parts.
    """
    log_weights = weights.clamp(min=LEAST).log().unsqueeze(2)
    found = torch.logsumexp(torch.stack(list(parts), 1) + log_weights, dim=1)
    return found * kdx.per_sample(temperature, found)


class Route(kdx.Target):
    """Each sample is answered by one teacher: its logits [B, K], and `weights` [B, M] of 0 and 1. A rule of kdx itself.

    `by` says which: the number of the teacher, in the order of the inputs, from a stream `teacher` of the data; or with
    a `table` the class of the sample:

        route: {use: route, inputs: {by: batch.label}, table: {wide: [0, 1, 2], vit: [3, 4]}}

    A sample with -1, which names no teacher and has no class, gets the mixture of all teachers at `temperature`, with
    equal weights. Any other number that names no teacher is refused.

    table: the classes of each teacher, by name; each class of the data once.
    """

    name = "route"
    inputs = {"logits": kdx.Many("*.logits"), "by": "batch.teacher"}
    knobs = {"temperature": kdx.Knob(1.0, above=0.0)}
    outputs = ("logits", "weights")

    @dataclass(frozen=True)
    class Config:
        table: dict[str, list[int]] = field(default_factory=dict)

    config: Config
    teacher_of: Tensor

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        shapes: list[kdx.Shape] = given.shapes["logits"]
        if any(len(shape) != 1 or shape != shapes[0] for shape in shapes):
            found = ", ".join(str(list(shape)) for shape in shapes)
            raise kdx.PlanError(f"logits: found {found} for one sample, expected [K] with the same K for each teacher")
        if given.shape("by") != ():
            raise kdx.PlanError(f"by: found {list(given.shape('by'))} for one sample, expected one whole number")
        teachers = range(len(shapes))
        chosen = _table(config.table, given, shapes[0][0]) if config.table else list(teachers)
        self.register_buffer("teacher_of", torch.tensor(chosen))

    def calibrate(self, **tensors: Any) -> None:
        wrong = self._is_wrong(tensors["by"])
        if wrong.any():
            raise kdx.DataError(f"by: found {int(tensors['by'][wrong][0])}, {self._expected()}")

    def forward(self, logits: list[Tensor], by: Tensor, temperature: Tensor) -> dict[str, Tensor]:
        torch._assert_async(~self._is_wrong(by).any(), f"route: a number names no teacher, {self._expected()}")
        count = len(logits)
        is_named = (by >= 0).unsqueeze(1)
        teacher = self.teacher_of[by.long().clamp(0, len(self.teacher_of) - 1)]
        stacked = torch.stack([kdx.precise(z) for z in logits], 1)
        weights = torch.where(is_named, F.one_hot(teacher, count).to(stacked.dtype), 1 / count)
        tau = temperature.reshape(-1, 1, 1)
        evenly = mixed((stacked / tau).log_softmax(2).unbind(1), torch.full_like(weights, 1 / count), temperature)
        own = stacked[torch.arange(len(by), device=by.device), teacher]
        return {"logits": torch.where(is_named, own, evenly), "weights": weights}

    def _is_wrong(self, by: Tensor) -> Tensor:
        return (by < -1) | (by >= len(self.teacher_of))

    def _expected(self) -> str:
        what = "the number of a class" if self.config.table else "the number of a teacher"
        return f"expected {what}, 0 to {len(self.teacher_of) - 1}, or -1 for none"


def confidence(logits: Tensor) -> Tensor:
    """`1 - H / log S` with H the entropy of the softmax of logits [B, S], [B]: 1 where sure, 0 for an even answer."""
    log_p = logits.log_softmax(1)
    return 1 + (log_p.exp() * log_p).sum(1) / math.log(logits.shape[1])


def energy(logits: Tensor) -> Tensor:
    """`logsumexp(z) - log S` of logits [B, S], [B], which does not grow with the number of classes."""
    return torch.logsumexp(logits, 1) - math.log(logits.shape[1])


def log_mass(student: Tensor, knows: Tensor) -> Tensor:
    """The logarithm of what a student with logits [B, K] gives to the classes of each teacher as a whole, [B, M].

    `knows` [M, K] is 1 where a teacher knows a class.
    """
    log_q = student.log_softmax(1).unsqueeze(1)
    return torch.logsumexp(torch.where(knows > 0, log_q, -math.inf), dim=2)


def subset_weights(signs: Tensor, sharpness: Tensor) -> Tensor:
    """How much of a sample falls to each teacher, `softmax(sharpness signs)` of what speaks for each [B, M], [B, M]."""
    return torch.softmax(signs * kdx.per_sample(sharpness, signs), dim=1)


def labelled_weights(weights: Tensor, label: Tensor, knows: Tensor) -> Tensor:
    """Weights [B, M] in which a sample with a label [B] falls to the teachers that know its class alone.

    `knows` [M, K] is 1 where a teacher knows a class. Samples with -1 keep their weights; where several teachers know
    the class, they share it in the proportion of their weights.
    """
    allowed = weights.clamp(min=LEAST) * knows[:, label.clamp(min=0)].T
    allowed = allowed / allowed.sum(1, keepdim=True)
    return torch.where((label >= 0).unsqueeze(1), allowed, weights)


class ClassSubset(kdx.Target):
    """One distribution over all classes from teachers that each know some of them. A rule of kdx itself.

    Gives `logits` [B, K] of `sum_k w_k p_k`, with p_k the softmax of teacher k over its own classes and 0 elsewhere,
    and the `weights` [B, M]. For classes that are known to one teacher each this is the law of total probability: w_k
    is the probability that the class is one of teacher k's, which no teacher can say. Rules guess it, as
    `softmax(sharpness c)` over the teachers:

    `confidence`: `c = 1 - H / log S`. A teacher is sure of its own classes and in doubt before others, as far as it is
        calibrated. A number added to all logits of a teacher changes nothing.
    `energy`: `c = logsumexp z - log S`; at sharpness 1, with as many classes each, the softmax of all logits side by
        side. Fit for teachers that were trained alike, so that their logits share a scale.
    `student`: the logarithm of what the student gives to the classes of a teacher, without gradient. At sharpness 1 the
        student alone says what falls to whom, and teachers only how it divides there. For it the config names the input
        `student: student.logits`, and it fits where labels teach the student the rest.

    The union of greatest entropy, `w ~ exp(H)`, is no rule here: it gives most to the teacher that is most in doubt.

    classes: the classes that each teacher knows, by its name and in the order of its logits, as
        `{birds: [0, 1], cars: [2, 3, 4]}`; a teacher that is not named knows all. Each class must be known to one.
    `label`: may be named, as `batch.label`. A sample with a label falls to the teachers that know its class; one
        without (-1) follows the rule.
    """

    name = "class_subset"
    inputs = {"logits": kdx.Many("*.logits"), "label": kdx.OPTIONAL, "student": kdx.OPTIONAL}
    knobs = {"sharpness": kdx.Knob(4.0, at_least=0.0), "temperature": kdx.Knob(1.0, above=0.0)}
    outputs = ("logits", "weights")

    @dataclass(frozen=True)
    class Config:
        classes: dict[str, list[int]] = field(default_factory=dict)
        rule: str = "confidence"

    config: Config
    knows: Tensor

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_choice("rule", config.rule, RULES)
        if (config.rule == "student") != ("student" in given.shapes):
            raise kdx.ConfigError(
                f"rule: found {config.rule!r}, but the input `student` is named for the rule `student` and for no other"
            )
        named = [1 + max(classes) for classes in config.classes.values() if classes]
        count = len(given.facts.classes) or max((*named, *(shape[0] for shape in given.shapes["logits"])))
        if given.shapes.get("student", (count,)) != (count,):
            raise kdx.PlanError(f"student: found {list(given.shape('student'))} for one sample, expected [{count}]")
        own = known_classes(config.classes, given, "logits", count)
        missing = sorted(set(range(count)).difference(*own))
        if missing:
            raise kdx.PlanError(f"classes: no teacher knows {_listed(missing, given)}, so nothing can be said of them")
        self.subsets = _buffers(self, own)
        knows = torch.zeros(len(own), count)
        for teacher, classes in enumerate(own):
            knows[teacher, classes] = 1
        self.register_buffer("knows", knows)

    def forward(
        self,
        logits: list[Tensor],
        label: Tensor | None,
        student: Tensor | None,
        sharpness: Tensor,
        temperature: Tensor,
    ) -> dict[str, Tensor]:
        logits = [kdx.precise(z) for z in logits]
        if student is not None:
            signs = log_mass(kdx.precise(student.detach()), self.knows)
        else:
            signs = torch.stack([(confidence if self.config.rule == "confidence" else energy)(z) for z in logits], 1)
        weights = subset_weights(signs, sharpness)
        if label is not None:
            weights = labelled_weights(weights, label, self.knows.to(weights.dtype))
        parts = [
            embed(z, self.get_buffer(subset), self.knows.shape[1], temperature)
            for z, subset in zip(logits, self.subsets, strict=True)
        ]
        return {"logits": mixed(parts, weights, temperature), "weights": weights}


def conditional_divergence(student: Tensor, teacher: Tensor, classes: Tensor, temperature: Tensor) -> Tensor:
    """`tau^2 KL` from a teacher of some `classes` [S] to the student among the same classes, [B].

    `student` [B, K] and `teacher` [B, S] are logits. The student's probabilities are taken on the condition that the
    class is one of these, so its logits of other classes get no gradient.
    """
    tau = kdx.per_sample(temperature, student)
    log_p = torch.log_softmax(teacher.detach() / tau, dim=1)
    log_q = torch.log_softmax(student.index_select(1, classes) / tau, dim=1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1) * temperature.square()


class SubsetDivergence(kdx.Loss):
    """What teachers of some classes each say of these, one value per sample. A rule of kdx itself.

    `tau^2 KL(p_k || q_k)` for each teacher k, with p_k its softmax and q_k the student's among the same classes,
    averaged over the teachers, or summed with `shares` [B, M] where the config names them, as `union.weights` for a
    target `union: {use: class_subset}`. 0 for a student with the teachers' proportions, whatever it gives to a set of
    classes as a whole: that is for the labels, or for `kd` on the target, to teach. At temperature 1, for classes that
    are known to one teacher each, `kd` on `class_subset` is this value, with its weights as shares, plus the divergence
    of how much falls to each teacher.

    Without shares each teacher also speaks on samples of classes that it does not know.

    classes: the classes that each teacher knows, by its name and in the order of its logits; a teacher that is not
        named knows all.
    """

    name = "subset_kd"
    inputs = {"student": "student.logits", "teachers": kdx.Many("*.logits"), "shares": kdx.OPTIONAL}
    knobs = {"temperature": kdx.Knob(4.0, above=0.0)}

    @dataclass(frozen=True)
    class Config:
        classes: dict[str, list[int]] = field(default_factory=dict)

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_classes("subset_kd", given, "student")
        own = known_classes(config.classes, given, "teachers", given.shape("student")[0])
        self.subsets = _buffers(self, own)
        shares = given.shapes.get("shares")
        if shares is not None and shares != (len(self.subsets),):
            raise kdx.PlanError(
                f"shares: found {list(shares)} for one sample, expected one for each of {len(self.subsets)} teachers"
            )

    def forward(self, student: Tensor, teachers: list[Tensor], shares: Tensor | None, temperature: Tensor) -> Tensor:
        found = [
            conditional_divergence(student, teacher, self.get_buffer(subset), temperature)
            for teacher, subset in zip(teachers, self.subsets, strict=True)
        ]
        values = torch.stack(found, 1)
        return values.mean(1) if shares is None else (shares.detach() * values).sum(1)


def known_classes(found: Mapping[str, list[int]], given: kdx.Given, name: str, count: int) -> list[list[int]]:
    """The classes that each teacher behind the input `name` knows, of `count`, in the order of its logits."""
    owners = given.owners(name)
    _check_owners("classes", found, owners)
    own = [list(found.get(owner, range(count))) for owner in owners]
    for owner, classes, shape in zip(owners, own, given.shapes[name], strict=True):
        if len(set(classes)) != len(classes) or not all(0 <= number < count for number in classes):
            raise kdx.PlanError(
                f"classes.{owner}: found {classes}, expected different numbers from 0 to {count - 1}, as there are "
                f"{count} classes"
            )
        if len(shape) != 1 or shape[0] != len(classes) or len(classes) < 2:
            raise kdx.PlanError(
                f"classes.{owner}: found {len(classes)} classes for logits of shape {list(shape)}, expected two or "
                "more, one for each logit"
            )
    return own


def _buffers(node: kdx.Node, own: Sequence[Sequence[int]]) -> list[str]:
    """Keep the classes of each teacher where the node keeps its tensors; gives the names of the buffers."""
    names = [f"subset_{place}" for place in range(len(own))]
    for name, classes in zip(names, own, strict=True):
        node.register_buffer(name, torch.tensor(classes))
    return names


def _table(table: Mapping[str, list[int]], given: kdx.Given, outputs: int) -> list[int]:
    """The place of the teacher of each class."""
    owners = given.owners("logits")
    _check_owners("table", table, owners)
    count = len(given.facts.classes) or outputs
    listed = [(number, owners.index(owner)) for owner, numbers in table.items() for number in numbers]
    if sorted(number for number, _ in listed) != list(range(count)):
        raise kdx.PlanError(
            f"table: found {dict(table)}, expected each class from 0 to {count - 1} once, for there are {count} classes"
        )
    return [teacher for _, teacher in sorted(listed)]


def _check_owners(name: str, found: Mapping[str, Any], owners: Sequence[str]) -> None:
    for owner in found:
        if owner not in owners:
            raise kdx.PlanError(f"{name}.{owner}: there is no such teacher, only {', '.join(owners)}")


def _listed(numbers: Sequence[int], given: kdx.Given) -> str:
    """Classes by number and, where the data names them, by name."""
    names = given.facts.classes
    return ", ".join(f"{number} ({names[number]})" if names else str(number) for number in numbers)


@kdx.hookimpl
def kdx_targets() -> list[type[kdx.Target]]:
    return [Route, ClassSubset]


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [SubsetDivergence]
