"""Losses on logits that take the true class and the other classes apart, for whole images and for regions of maps.

They need each sample's class. A sample without a label counts 0, and the mean over the batch is that over the labelled
ones, as it is for cross-entropy. The target `pseudo_label` gives all samples a class: name it as the input `label`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdx

WRAPPED = {"kd": (), "dkd": ("alpha", "beta"), "nkd": ("gamma",)}
"""What `sdd` applies to each region, with the options that each reads."""


def margin(logits: Tensor, label: Tensor) -> Tensor:
    """The log-odds of a class against all others together, [B], from logits [B, K] and classes [B]."""
    return logits.gather(1, label[:, None])[:, 0] - others(logits, label).logsumexp(1)


def others(logits: Tensor, label: Tensor) -> Tensor:
    """The logits of all classes but one, [B, K - 1], in their order."""
    place = torch.arange(logits.shape[1] - 1, device=logits.device)[None]
    return logits.gather(1, place + (place >= label[:, None]))


def binary_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL of two coins, the teacher's to the student's, from their log-odds; of any shape."""
    present = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    return present + (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))


def target_divergence(student: Tensor, teacher: Tensor, label: Tensor, temperature: Tensor) -> Tensor:
    """`tau^2` times the KL of "this class or another one", [B]."""
    tau = kdx.per_sample(temperature, student)
    return binary_divergence(margin(student / tau, label), margin(teacher / tau, label)) * temperature.square()


def other_divergence(student: Tensor, teacher: Tensor, label: Tensor, temperature: Tensor) -> Tensor:
    """`tau^2` times the KL of the distributions over the other classes, [B]."""
    tau = kdx.per_sample(temperature, student)
    ours, theirs = (F.log_softmax(others(logits / tau, label), dim=1) for logits in (student, teacher))
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1) * temperature.square()


def decoupled(
    student: Tensor, teacher: Tensor, label: Tensor, temperature: Tensor, *, alpha: Tensor | float, beta: Tensor | float
) -> Tensor:
    """`alpha` times the part of the true class plus `beta` times that of the others, [B], of logits [B, K].

    `kd` is the same with `alpha = 1` and `beta = 1 - p`, the teacher's softened probability of the other classes.
    """
    teacher = teacher.detach()
    true_class = target_divergence(student, teacher, label, temperature)
    return alpha * true_class + beta * other_divergence(student, teacher, label, temperature)


class Decoupled(kdx.Loss):
    """Decoupled distillation (Zhao et al., CVPR 2022), one value per sample, of logits [B, K] and labels [B].

    0 for a student with the teacher's distribution. Published for CIFAR-100: `beta` 2 to 8 by pair of nets, weight 1
    with a warm-up of 20 of 240 epochs; for ImageNet: temperature 1, `beta` 0.5, a warm-up of 1 epoch. The class is
    taken out exactly, where the authors subtract 1000 from its logit.
    """

    name = "dkd"
    confidence = "values"
    inputs = {"student": "student.logits", "teacher": "teacher.logits", "label": "batch.label"}
    knobs = {
        "temperature": kdx.Knob(4.0, above=0.0),
        "alpha": kdx.Knob(1.0, at_least=0.0),
        "beta": kdx.Knob(8.0, at_least=0.0),
    }
    same_shape = (("student", "teacher"),)

    def __init__(self, config: Decoupled.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_classes("dkd", given, "student")

    def forward(
        self, student: Tensor, teacher: Tensor, label: Tensor, temperature: Tensor, alpha: Tensor, beta: Tensor
    ) -> Tensor:
        value = decoupled(student, teacher, label.clamp(min=0), temperature, alpha=alpha, beta=beta)
        return kdx.over_labelled(value, label)


def normalised(
    student: Tensor, teacher: Tensor, label: Tensor, temperature: Tensor, *, gamma: Tensor | float
) -> Tensor:
    """The true class's cross-entropy as the teacher weighs it, and that of the others, [B], of logits [B, K].

    `-p_t[y] log p_s[y] - gamma tau^2 sum_k q_t[k] log q_s[k]`: p at temperature 1, q over the others at `temperature`.
    """
    teacher = teacher.detach()
    true_class = -margin(teacher, label).sigmoid() * F.logsigmoid(margin(student, label))
    tau = kdx.per_sample(temperature, student)
    wanted = others(teacher / tau, label).softmax(1)
    rest = -(wanted * F.log_softmax(others(student / tau, label), dim=1)).sum(1)
    return true_class + gamma * temperature.square() * rest


class Normalised(kdx.Loss):
    """Normalised distillation (Yang et al., ICCV 2023), one value per sample, of logits [B, K] and labels [B].

    Both parts are cross-entropies, so a perfect student has the teacher's entropy, not 0. Published: weight 1; `gamma`
    1.5 at temperature 1 for ImageNet, 3.5 at temperature 3 for CIFAR-100. The temperature acts on the others alone.
    """

    name = "nkd"
    confidence = "values"
    inputs = {"student": "student.logits", "teacher": "teacher.logits", "label": "batch.label"}
    knobs = {"temperature": kdx.Knob(1.0, above=0.0), "gamma": kdx.Knob(1.5, at_least=0.0)}
    same_shape = (("student", "teacher"),)

    def __init__(self, config: Normalised.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_classes("nkd", given, "student")

    def forward(self, student: Tensor, teacher: Tensor, label: Tensor, temperature: Tensor, gamma: Tensor) -> Tensor:
        return kdx.over_labelled(normalised(student, teacher, label.clamp(min=0), temperature, gamma=gamma), label)


def sample_confidence(student: Tensor, teacher: Tensor, label: Tensor, temperature: Tensor) -> Tensor:
    """`tau^2` times the KL of the teacher's "my first choice or another" to the student's "true or not", [B]."""
    tau = kdx.per_sample(temperature, student)
    teacher = teacher.detach()
    theirs, ours = margin(teacher / tau, teacher.argmax(1)), margin(student / tau, label)
    return binary_divergence(ours, theirs) * temperature.square()


def masked_correlation(student: Tensor, teacher: Tensor, label: Tensor, temperature: Tensor) -> Tensor:
    """`tau^2` times the KL over the classes that the teacher ranks below the true one, [B]; 0 where there is none."""
    tau = kdx.per_sample(temperature, student)
    teacher = teacher.detach()
    below = teacher < teacher.gather(1, label[:, None])
    is_empty = ~below.any(1)
    kept = below | is_empty[:, None]  # all classes rather than none, for the softmax; the value does not count then
    ours, theirs = (
        F.log_softmax((logits / tau).masked_fill(~kept, -torch.inf), dim=1) for logits in (student, teacher)
    )
    gap = torch.where(kept, theirs, 0.0) - torch.where(kept, ours, 0.0)
    divergence = (theirs.exp() * gap).sum(1) * temperature.square()
    return torch.where(is_empty, 0.0, divergence)


class Refined(kdx.Loss):
    """Refined logits (Sun et al.: Knowledge Distillation with Refined Logits, 2024), one value per sample.

    Logits [B, K], labels [B]. `alpha` times `sample_confidence` at `confidence_temperature` plus `beta` times
    `masked_correlation` at `temperature`. What a wrong teacher says about the classes that it prefers to the true one
    does not count. Where its first choice is the true class and both temperatures are equal, this is `dkd`. 0 for a
    student with the distribution of such a teacher. Published: weight 1 with a warm-up of 20 of 240 epochs.
    """

    name = "rld"
    confidence = "values"
    inputs = {"student": "student.logits", "teacher": "teacher.logits", "label": "batch.label"}
    knobs = {
        "temperature": kdx.Knob(4.0, above=0.0),
        "confidence_temperature": kdx.Knob(1.0, above=0.0),
        "alpha": kdx.Knob(1.0, at_least=0.0),
        "beta": kdx.Knob(8.0, at_least=0.0),
    }
    same_shape = (("student", "teacher"),)

    def __init__(self, config: Refined.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_classes("rld", given, "student")

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        label: Tensor,
        temperature: Tensor,
        confidence_temperature: Tensor,
        alpha: Tensor,
        beta: Tensor,
    ) -> Tensor:
        known = label.clamp(min=0)
        first = sample_confidence(student, teacher, known, confidence_temperature)
        rest = masked_correlation(student, teacher, known, temperature)
        return kdx.over_labelled(alpha * first + beta * rest, label)


def region_logits(maps: Tensor, whole: Tensor, head: Callable[[Tensor], Tensor], grids: tuple[int, ...]) -> Tensor:
    """A classifier's logits for the cells of each grid on a map, [B, N, K]; the first is `whole`.

    maps: [B, C, H, W]; the mean over a cell is what `head` turns from [*, C] to [*, K].
    whole: [B, K], the net's own logits, which stand for the grid of one cell.
    grids: how many cells there are along each axis.
    """
    cells = [F.adaptive_avg_pool2d(maps, grid).flatten(2).transpose(1, 2) for grid in grids if grid > 1]
    if not cells:
        return whole[:, None]
    rows = torch.cat(cells, dim=1)
    B, N, _ = rows.shape
    return torch.cat([whole[:, None], head(rows.flatten(0, 1)).reshape(B, N, -1)], dim=1)


class ScaleDecoupled(kdx.Loss):
    """Scale-decoupled distillation (Wei, Luo, Luo, CVPR 2024), one value per sample, from maps [B, C, H, W].

    Each net's classifier judges the regions of its own last map. A loss on logits is applied to each region and summed
    over regions. A region where the teacher is right and it is wrong about the whole image, or the other way round,
    counts twice. The whole image is the first region, so that with `grids: [1]` it is the wrapped loss. Published:
    weight and warm-up of the wrapped loss.

    wraps: the loss, `kd`, `dkd` or `nkd`, at `temperature`.
    grids: cells along each axis, beginning with 1.
    alpha, beta: of `dkd`, 1 and 8 by default. gamma: of `nkd`, 1.5 by default.

    The logits must be what the classifier makes of the mean of the map, as in most convolutional nets; the batches seen
    before training are checked for it. The student's classifier learns from the regions too; the teacher's is frozen.
    0 for a perfect student, with `kd` and `dkd`.
    """

    name = "sdd"
    confidence = "code"
    inputs = {
        "student": "student.features",
        "teacher": "teacher.features",
        "student_logits": "student.logits",
        "teacher_logits": "teacher.logits",
        "label": "batch.label",
    }
    knobs = {"temperature": kdx.Knob(4.0, above=0.0)}
    borrows = {"student_head": "student.classifier", "teacher_head": "teacher.classifier"}
    trains = ("student_head",)
    same_shape = (("student_logits", "teacher_logits"),)

    @dataclass(frozen=True)
    class Config:
        wraps: str = "dkd"
        grids: list[int] = field(default_factory=lambda: [1, 2, 4])
        alpha: float | None = None
        beta: float | None = None
        gamma: float | None = None

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_classes("sdd", given, "student_logits")
        kdx.check_choice("wraps", config.wraps, WRAPPED)
        for name in ("alpha", "beta", "gamma"):
            value = getattr(config, name)
            if value is not None and name not in WRAPPED[config.wraps]:
                raise kdx.ConfigError(f"{name}: `wraps: {config.wraps}` does not read it")
            if value is not None and not value >= 0:
                raise kdx.ConfigError(f"{name}: found {value}, expected at least 0")
        self.grids = tuple(config.grids)
        if self.grids[:1] != (1,) or any(b <= a for a, b in pairwise(self.grids)):
            raise kdx.ConfigError(f"grids: found {list(self.grids)}, expected rising numbers that begin with 1")
        for who in ("student", "teacher"):
            shape = given.shape(who)
            if len(shape) != 3 or min(shape[1:]) < self.grids[-1]:
                raise kdx.PlanError(
                    f"sdd lays grids of up to {self.grids[-1]} cells along an axis on maps [C, H, W], "
                    f"but {who} is {list(shape)}"
                )

    def calibrate(self, **tensors: Any) -> None:
        for who in ("student", "teacher"):
            made = tensors[f"{who}_head"](tensors[who].float().mean((2, 3)))
            if not torch.allclose(made.float(), tensors[f"{who}_logits"].float(), rtol=0.05, atol=0.05):
                raise kdx.PlanError(
                    f"sdd: the logits of {who} are not what its classifier makes of the mean of its map, because "
                    "something stands between the two, such as a norm or dropout"
                )

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        student_logits: Tensor,
        teacher_logits: Tensor,
        label: Tensor,
        temperature: Tensor,
        student_head: Callable[[Tensor], Tensor],
        teacher_head: Callable[[Tensor], Tensor],
    ) -> Tensor:
        ours = region_logits(student, student_logits, student_head, self.grids)
        theirs = region_logits(teacher, teacher_logits, teacher_head, self.grids).detach()
        B, N, _ = ours.shape
        known = label.clamp(min=0)
        is_right = theirs.argmax(2) == known[:, None]
        counts = torch.where(is_right == is_right[:, :1], 1.0, 2.0)
        tau = temperature if temperature.ndim == 0 else temperature.repeat_interleave(N)
        values = self._wrapped(ours.flatten(0, 1), theirs.flatten(0, 1), known.repeat_interleave(N), tau)
        return kdx.over_labelled((counts * values.reshape(B, N)).sum(1), label)

    def _wrapped(self, student: Tensor, teacher: Tensor, label: Tensor, temperature: Tensor) -> Tensor:
        config = self.config
        if config.wraps == "nkd":
            return normalised(student, teacher, label, temperature, gamma=_or(config.gamma, 1.5))
        if config.wraps == "dkd":
            alpha, beta = _or(config.alpha, 1.0), _or(config.beta, 8.0)
            return decoupled(student, teacher, label, temperature, alpha=alpha, beta=beta)
        tau = kdx.per_sample(temperature, student)
        ours, theirs = F.log_softmax(student / tau, dim=1), F.log_softmax(teacher / tau, dim=1)
        return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1) * temperature.square()


def _or(found: float | None, default: float) -> float:
    return default if found is None else found


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [Decoupled, Normalised, Refined, ScaleDecoupled]
