"""Losses on relations within a batch of class probabilities: between classes, between samples, and along each class.

Logits are [B, K]. They see one micro-batch: with `train.accumulate` there are fewer relations. None needs a label.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import kdx

VARIANTS = ("paper", "code")


def pearson(a: Tensor, b: Tensor, dim: int, eps: float = 1e-8) -> Tensor:
    """Correlation of `a` and `b` along an axis, which goes; 0 where one of them is constant."""
    a, b = a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True)
    norms: Tensor = torch.linalg.vector_norm(a, dim=dim) * torch.linalg.vector_norm(b, dim=dim)
    return (a * b).sum(dim) / (norms + eps)


def correlation_gap(student: Tensor, teacher: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """`tau^2 (1 - r)` between the two nets' probabilities: for each sample [B], and the mean over the classes, 0-d.

    The first correlates over the classes of a sample, the second over the samples of a class, where a `temperature` per
    sample counts in the factor as its mean square.
    """
    tau = kdx.per_sample(temperature, student)
    ours, theirs = (student / tau).softmax(1), (teacher.detach() / tau).softmax(1)
    square = temperature.square()
    return square * (1 - pearson(ours, theirs, 1)), square.mean() * (1 - pearson(ours, theirs, 0)).mean()


class Correlation(kdx.Loss):
    """Relational matching by correlation (Huang et al.: DIST, NeurIPS 2022), one value per sample.

    `inter` times the gap of a sample's classes plus `intra` times the gap of the classes over the batch, which adds the
    same to each sample. 0 for a student whose probabilities are `a p + b` of the teacher's, a > 0; each part is at most
    2 tau^2. A batch of one has no relations along classes, so keep B at 8 or more. Published: both 1 and weight 2, at
    temperature 4 for CIFAR-100 and 1 for ImageNet.
    """

    name = "dist"
    confidence = "values"
    inputs = {"student": "student.logits", "teacher": "teacher.logits"}
    knobs = {
        "temperature": kdx.Knob(4.0, above=0.0),
        "inter": kdx.Knob(1.0, at_least=0.0),
        "intra": kdx.Knob(1.0, at_least=0.0),
    }
    same_shape = (("student", "teacher"),)

    def forward(self, student: Tensor, teacher: Tensor, temperature: Tensor, inter: Tensor, intra: Tensor) -> Tensor:
        per_sample, along_classes = correlation_gap(student, teacher, temperature)
        return inter * per_sample + intra * along_classes


def instance_gap(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`tau^2 KL(teacher || student)` of the softened distributions, [B]."""
    ours, theirs = F.log_softmax(student / temperature, dim=1), F.log_softmax(teacher / temperature, dim=1)
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1) * temperature**2


def sample_gap(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`sum_j (q_i q_j - p_i p_j)^2`, inner products of the softened distributions of two samples, [B]."""
    ours, theirs = (student / temperature).softmax(1), (teacher / temperature).softmax(1)
    return (theirs @ theirs.T - ours @ ours.T).square().sum(1)


def class_gap(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`sum_l ((Q^T Q - P^T P)_kl)^2` over the batch of softened distributions, for each class, [K]."""
    ours, theirs = (student / temperature).softmax(1), (teacher / temperature).softmax(1)
    return (theirs.T @ theirs - ours.T @ ours).square().sum(1)


class MultiLevel(kdx.Loss):
    """Multi-level logit distillation (Jin et al., CVPR 2023), one value per sample, from one or two views of a sample.

    Sums over `temperatures`. The plain view has three parts. Instances: `kd` of the samples about which the teacher is
    not more sure than about half of the batch, 0 for the rest. Batch: inner products between samples. Classes: inner
    products between classes, of those classes that the teacher finds no more than half of the others; this part is the
    same for each sample. A strongly augmented view, where `student_strong` and `teacher_strong` name its logits, as
    `student@strong.logits`, adds `kd` of all its samples. 0 for a perfect student. Published: weight 0.9 beside 0.1 of
    the labels on both views.

    variant: `paper`, or what the authors' `code` computes: the selections only shrink the plain view's parts by the
        share of what is selected, and the strong view's instances are the plain view's at the lowest and the highest
        temperature.
    """

    name = "mlkd"
    confidence = "values"
    inputs = {
        "student": "student.logits",
        "teacher": "teacher.logits",
        "student_strong": kdx.OPTIONAL,
        "teacher_strong": kdx.OPTIONAL,
    }
    same_shape = (("student", "teacher", "student_strong", "teacher_strong"),)

    @dataclass(frozen=True)
    class Config:
        temperatures: list[float] = field(default_factory=lambda: [2.0, 3.0, 4.0, 5.0, 6.0])
        variant: str = "paper"

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_choice("variant", config.variant, VARIANTS)
        self.temperatures = sorted(float(tau) for tau in config.temperatures)
        if not self.temperatures or not all(0 < tau < math.inf for tau in self.temperatures):
            raise kdx.ConfigError(f"temperatures: found {list(config.temperatures)}, expected numbers above 0")
        if ("student_strong" in given.shapes) != ("teacher_strong" in given.shapes):
            raise kdx.PlanError("mlkd: name both of student_strong and teacher_strong, or none of them")

    def forward(
        self, student: Tensor, teacher: Tensor, student_strong: Tensor | None, teacher_strong: Tensor | None
    ) -> Tensor:
        teacher = teacher.detach()
        value = self._plain(student, teacher)
        if student_strong is not None and teacher_strong is not None:
            views = [(student_strong, teacher_strong.detach())] * len(self.temperatures)
            if self.config.variant == "code":
                views[0] = views[-1] = (student, teacher)
            parts = [instance_gap(*view, tau) for view, tau in zip(views, self.temperatures, strict=True)]
            value = value + torch.stack(parts).sum(0)
        return value

    def _plain(self, student: Tensor, teacher: Tensor) -> Tensor:
        instances, samples, classes = (
            torch.stack([gap(student, teacher, tau) for tau in self.temperatures]).sum(0)
            for gap in (instance_gap, sample_gap, class_gap)
        )
        sure = teacher.softmax(1)
        is_unsure, is_rare = _lower_half(sure.amax(1)), _lower_half(sure.sum(0))
        if self.config.variant == "code":
            share, class_share = is_unsure.to(sure.dtype).mean(), is_rare.to(sure.dtype).mean()
            return share * (instances + samples) + class_share * classes.mean()
        return torch.where(is_unsure, instances, 0.0) + samples + torch.where(is_rare, classes, 0.0).mean()


def _lower_half(values: Tensor) -> Tensor:
    """Whether each value is at most the median."""
    return values <= values.median()


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [Correlation, MultiLevel]
