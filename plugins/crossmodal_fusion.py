"""What one modality can know of another: its maps imagined, both composed into one, and the part that they share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdx

LEAST = math.log(1e-10)
Head = Callable[[Tensor], Tensor]


def sigmoid_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """`sum (sigmoid(s) - sigmoid(t))^2` over all numbers of a sample, [B], of tensors [B, ...] of one shape."""
    return (student.sigmoid() - teacher.detach().sigmoid()).square().flatten(1).sum(1)


class Hallucination(kdx.Loss):
    """Maps of an absent modality, imagined by a branch of the student (Hoffman, Gupta, Darrell, CVPR 2016), [B].

    `student` is a map of the branch that imagines, `teacher` that of a frozen net of the other modality, of the same
    shape: an aligner stands between them where they differ. The value is the sum of the squared differences of their
    sigmoids over a sample. 0 where the imagined map is the other's. The authors choose the weight so that the term is
    about ten times the largest other one, and clip gradients (`train.clip`).

    The student is then a net of two branches with one input, as `late_fusion` makes it: both are deployed, and none
    needs the other modality. The authors start the imagining branch from the weights of the other net, and have losses
    for the scores of each branch; here the joint scores have one.
    """

    name = "hallucination"
    separable = True
    confidence = "values"
    inputs = {"student": kdx.REQUIRED, "teacher": kdx.REQUIRED}
    same_shape = (("student", "teacher"),)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return sigmoid_distance(student, teacher)


def class_contrast(a: Tensor, b: Tensor, label: Tensor, temperature: Tensor, counted: Tensor | None = None) -> Tensor:
    """Contrast of vectors [B, D] of two modalities in which the same class is the same, [B].

    With `p` the softmax of a row of cosines over `temperature`, a row has the mean of `-log p` over its class and the
    mean of `-log(1 - p)` over the others; the latter is 0 in a batch of one class. Only rows and columns with a label
    (not -1) that are `counted`, bool [B], take part; other rows are 0.
    """
    known = label >= 0 if counted is None else (label >= 0) & counted
    scores = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / kdx.per_sample(temperature, a)
    pairs = known.unsqueeze(1) & known.unsqueeze(0)
    mine = torch.eye(len(a), dtype=torch.bool, device=a.device)  # a row that takes no part needs some column
    log_p = torch.where(pairs | mine, scores, -torch.inf).log_softmax(1)
    alike = pairs & (label.unsqueeze(1) == label.unsqueeze(0))
    unlike = pairs & ~alike
    others = _not_below(torch.log1p(-log_p.exp().clamp(max=1 - 1e-6)))
    log_p = _not_below(log_p)
    found = torch.where(alike, -log_p, 0.0).sum(1) / alike.sum(1).clamp(min=1)
    return found + torch.where(unlike, -others, 0.0).sum(1) / unlike.sum(1).clamp(min=1)


def _not_below(log_p: Tensor) -> Tensor:
    """`log(p + 1e-10)`, as the public code has it."""
    return torch.logaddexp(log_p, torch.full_like(log_p, LEAST))


def symmetric_divergence(a: Tensor, b: Tensor) -> Tensor:
    """`KL(p_a || p_b) + KL(p_b || p_a)` of logits [B, K] at temperature 1, [B]. Both get a gradient."""
    log_a, log_b = a.log_softmax(1), b.log_softmax(1)
    return ((log_a.exp() - log_b.exp()) * (log_a - log_b)).sum(1)


class Composition(nn.Module):
    """What two embeddings say together: `a + linear([a / |a|, v / |v|])`, [B, D], and its logits."""

    def __init__(self, student: int, teacher: int, classes: int) -> None:
        super().__init__()
        self.bridge = nn.Linear(student, teacher) if student != teacher else nn.Identity()
        self.mix = nn.Linear(2 * teacher, teacher)
        self.classifier = nn.Linear(teacher, classes)

    def forward(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([F.normalize(teacher, dim=1), F.normalize(student, dim=1)], 1)
        composed = teacher + self.mix(both)
        return composed, self.classifier(composed)


class CompositionalContrast(kdx.Loss):
    """Compositional contrastive learning (Chen et al.: CCL, CVPR 2021), one value per sample.

    For each teacher, with its embedding `a` and that of the student `v` [B, D], a composition of both, `m`, is made by
    a layer and a classifier that the loss owns. Of N, the contrast by classes in both directions, and J, the symmetric
    divergence of logits:

        student:      N(v, m) + N(v, a) + J(s, m)
        composition:  CE(m) + N(v, m) + N(m, a) + J(s, m)

    The second line gives the student no gradient; the composition learns from both. The terms are the mean over the
    teachers. The student's own cross-entropy is a loss of its own. Samples without a label take part in J alone.

    A layer brings the student to the width of a teacher where these differ. The authors train with two optimizers,
    whose steps are these gradients in one. Published: temperature 0.5 for a teacher that hears, 0.1 for one that sees.
    """

    name = "ccl"
    confidence = "values"
    inputs = {
        "student": "student.embedding",
        "student_logits": "student.logits",
        "teacher": kdx.Many("*.embedding"),
        "label": "batch.label",
    }
    gaps = "teacher"
    knobs = {"temperature": kdx.Knob(0.5, above=0.0)}

    def __init__(self, config: CompositionalContrast.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_classes(self.name, given, "student_logits")
        shapes: list[kdx.Shape] = [given.shape("student"), *given.shapes["teacher"]]
        if wrong := [list(shape) for shape in shapes if len(shape) != 1]:
            raise kdx.PlanError(f"ccl: found {wrong[0]} for one sample, expected embeddings [D]")
        classes = given.shape("student_logits")[0]
        self.compositions = nn.ModuleList(Composition(shapes[0][0], shape[0], classes) for shape in shapes[1:])

    def forward(
        self,
        student: Tensor,
        student_logits: Tensor,
        teacher: list[Tensor],
        label: Tensor,
        temperature: Tensor,
        present: Tensor | None = None,
    ) -> Tensor:
        here = (
            torch.ones(len(label), len(teacher), dtype=torch.bool, device=label.device) if present is None else present
        )
        values = [
            self._one(composition, student, student_logits, theirs.detach(), label, temperature, own)  # type: ignore[arg-type]
            for composition, theirs, own in zip(self.compositions, teacher, here.unbind(1), strict=True)
        ]
        return torch.stack(values).mean(0)

    @staticmethod
    def _one(
        composition: Composition,
        student: Tensor,
        logits: Tensor,
        teacher: Tensor,
        label: Tensor,
        temperature: Tensor,
        present: Tensor,
    ) -> Tensor:
        known = torch.where(present, label, -1)
        ours = composition.bridge(student)
        composed, composed_logits = composition(teacher, ours)
        alone, alone_logits = composition(teacher, ours.detach())

        def both(a: Tensor, b: Tensor) -> Tensor:
            return class_contrast(a, b, known, temperature) + class_contrast(b, a, known, temperature)

        of_student = both(ours, composed) + both(ours, teacher)
        of_composition = both(ours.detach(), alone) + both(alone, teacher)
        errors = F.cross_entropy(alone_logits, known, reduction="none", ignore_index=-1)
        agreement = symmetric_divergence(logits, composed_logits) + symmetric_divergence(logits.detach(), alone_logits)
        labelled = kdx.over_labelled(of_student + of_composition + errors, known)
        return labelled + kdx.over_labelled(agreement, torch.where(present, 0, -1))


def shuffled_change(features: Tensor, other: Tensor, head: Head, generator: torch.Generator, rounds: int = 1) -> Tensor:
    """How far the answers of `head` are from those of another modality when a channel is shuffled, [D].

    `features` [B, D] are what the head reads, `other` [B, K] logits. Mean absolute difference of probabilities, over
    `rounds` orders of the batch.
    """
    target = other.softmax(1)
    changes = torch.zeros(features.shape[1], dtype=target.dtype, device=features.device)
    for _ in range(rounds):
        order = torch.randperm(len(features), generator=generator, device=generator.device).to(features.device)
        moved = features[order]
        for channel in range(features.shape[1]):
            mixed = features.clone()
            mixed[:, channel] = moved[:, channel]
            changes[channel] += (head(mixed).softmax(1) - target).abs().mean()
    return changes / rounds


class ModalityFocus(kdx.Loss):
    """Transfer of what both modalities know (Xue et al.: the modality focusing hypothesis, ICLR 2023), [B].

    Before training each number of the teacher's embedding [B, D] is shuffled over the batch, and the teacher's
    classifier, which is borrowed, answers again. Where the answers go far from those of `other`, the logits of a
    trained net of the student's modality, the number says something that both modalities know. The `share` of numbers
    for which they go least far is set to 0, and the value is the divergence between what the classifier then says and
    the student, at temperature 1, without labels. 0 for a student that says the same.

    share: of the numbers that are set to 0. Published: 0.5 to 0.75.
    rounds: how many orders of each batch are tried, 10 to 100 in all: there are `train.calibration` batches.

    A public script takes the places of numbers for their ranks; this ranks.
    """

    name = "mfh"
    confidence = "code"
    inputs = {"student": "student.logits", "teacher": "teacher.embedding", "other": kdx.REQUIRED}
    borrows = {"head": "teacher.classifier"}

    @dataclass(frozen=True)
    class Config:
        share: float = 0.5
        rounds: int = 2

    config: Config
    change: Tensor
    kept: Tensor

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        if not 0 <= config.share < 1:
            raise kdx.ConfigError(f"share: found {config.share}, expected a share from 0 and below 1")
        if config.rounds < 1:
            raise kdx.ConfigError(f"rounds: found {config.rounds}, expected 1 or more")
        kdx.check_classes(self.name, given, "student")
        ours, theirs, other = (given.shape(name) for name in ("student", "teacher", "other"))
        if len(theirs) != 1 or other != ours:
            raise kdx.PlanError(
                f"mfh: found a teacher of {list(theirs)} and other logits of {list(other)} for one sample, expected an "
                f"embedding [D] and {list(ours)}"
            )
        self.register_buffer("change", torch.zeros(theirs[0]))
        self.register_buffer("kept", torch.ones(theirs[0]))

    def calibrate(self, **tensors: Any) -> None:
        found = shuffled_change(
            tensors["teacher"], tensors["other"], tensors["head"], self.given.generator, self.config.rounds
        )
        self.change += found.to(self.change)
        count = len(self.change) - round(self.config.share * len(self.change))
        rank = self.change.argsort(descending=True, stable=True).argsort()
        self.kept.copy_(rank < count)

    def forward(self, student: Tensor, teacher: Tensor, other: Tensor, head: Head) -> Tensor:
        shared = head(teacher.detach() * self.kept.to(teacher)).detach()
        log_p, log_q = shared.log_softmax(1), student.log_softmax(1)
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [Hallucination, CompositionalContrast, ModalityFocus]
