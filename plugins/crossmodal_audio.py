"""Transfer between nets that hear: a teacher softened alone, stored answers under mixup, and joint attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import kdx

ACTIVATIONS = ("softmax", "sigmoid")


def targets_of(label: Tensor, classes: int) -> Tensor:
    """Labels as probabilities [B, K]: of one class each, all 0 for -1; labels [B, K] are so already."""
    if label.ndim == 2:
        return label.float()
    return F.one_hot(label.clamp(min=0), classes) * (label >= 0).unsqueeze(1).float()


def softened_teacher(student: Tensor, teacher: Tensor, temperature: Tensor, activation: str = "softmax") -> Tensor:
    """Cross-entropy of the student's probabilities with those of a softened teacher, from logits [B, K], [B].

    `softmax` sums over the classes; `sigmoid` takes each class by itself, mean over the classes.
    """
    theirs = teacher.detach() / kdx.per_sample(temperature, teacher)
    if activation == "softmax":
        return -(theirs.softmax(1) * student.log_softmax(1)).sum(1)
    return F.binary_cross_entropy_with_logits(student, theirs.sigmoid(), reduction="none").mean(1)


class CrossModelAudio(kdx.Loss):
    """Cross-model distillation for audio (Gong et al.: CMKD, 2022), one value per sample.

        labels * CE(y, s) + (1 - labels) * CE(softmax(t / tau), s)

    Only the teacher is softened, and there is no factor tau^2. The teacher must hear what the student hears: the same
    clip, mixed and moved in the same way, which is so for models of one view. It works from convolutions to a
    transformer and back. The label term is over the samples with a label. Its least value is the entropy of the
    targets. Published: `labels` 0.5.

    activation: `softmax` for one class per sample; `sigmoid` for several, with labels [B, K] of 0 and 1 or a class.
    """

    name = "cmkd_audio"
    confidence = "paper"
    inputs = {"student": "student.logits", "teacher": "teacher.logits", "label": "batch.label"}
    same_shape = (("student", "teacher"),)
    knobs = {"labels": kdx.Knob(0.5, at_least=0.0, at_most=1.0), "temperature": kdx.Knob(1.0, above=0.0)}

    @dataclass(frozen=True)
    class Config:
        activation: str = "softmax"

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_choice("activation", config.activation, ACTIVATIONS)
        kdx.check_classes(self.name, given, "student")
        if config.activation == "softmax" and given.shape("label") != ():
            raise kdx.PlanError(
                f"cmkd_audio: label is {list(given.shape('label'))} for one sample, expected one class; several are "
                "for `activation: sigmoid`"
            )

    def forward(self, student: Tensor, teacher: Tensor, label: Tensor, labels: Tensor, temperature: Tensor) -> Tensor:
        target = targets_of(label, student.shape[1])
        if self.config.activation == "softmax":
            hard = -(target * student.log_softmax(1)).sum(1)
        else:
            hard = F.binary_cross_entropy_with_logits(student, target.to(student), reduction="none").mean(1)
        hard = kdx.over_labelled(hard, label) if label.ndim == 1 else hard
        soft = softened_teacher(student, teacher, temperature, self.config.activation)
        return labels * hard + (1 - labels) * soft


def mixed_predictions(
    student: Tensor, predictions: Tensor, place: Tensor, share: Tensor, counts: Tensor, partner_counts: Tensor
) -> Tensor:
    """`share BCE(s, p_i) + (1 - share) BCE(s, p_j)`, mean over the classes, [B], from logits and probabilities [B, K].

    `j = place` [B] is the row of what a sample was mixed with. A part whose `counts` [B] is False is 0.
    """
    own = F.binary_cross_entropy_with_logits(student, predictions, reduction="none").mean(1)
    other = F.binary_cross_entropy_with_logits(student, predictions[place], reduction="none").mean(1)
    return torch.where(counts, share * own, 0.0) + torch.where(partner_counts, (1 - share) * other, 0.0)


class StoredPredictions(kdx.Loss):
    """Audio tagging from an ensemble's stored answers (Schmid et al.: EfficientAT, ICASSP 2023), one value per sample.

        labels * BCE(s, y) + (1 - labels) * BCE(s, sigmoid(t / tau))

    `teacher` are the logits [B, K] of any number of teachers, which are averaged, for the clips as they are. Where the
    student hears mixtures, of which a share `share` [B] is the clip itself and the rest that of `partner` [B], both
    terms are mixed in the same way: `share` times the term of the clip, and one minus `share` times that of the
    partner. The records come from the augmentations `mixup` and `mixup_mel` in a view; `index` finds the partner.

        inputs: {student: student@mixed.logits, share: batch.mix_share@mixed, partner: batch.mix_partner@mixed}

    What is not known adds 0: the label of a sample without one, the answers where the mask `known` [B] is False, and a
    partner that is in another part of the batch, as `train.accumulate` makes them. Its least value is the entropy of
    the targets. Published: `labels` 0.1 and temperature 1.
    """

    name = "efficientat_kd"
    confidence = "code"
    inputs = {
        "student": "student.logits",
        "teacher": kdx.Many("*.logits"),
        "label": "batch.label",
        "index": "batch.index",
        "share": kdx.OPTIONAL,
        "partner": kdx.OPTIONAL,
        "known": kdx.OPTIONAL,
    }
    gaps = "teacher"
    knobs = {"labels": kdx.Knob(0.1, at_least=0.0, at_most=1.0), "temperature": kdx.Knob(1.0, above=0.0)}

    def __init__(self, config: StoredPredictions.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_same_classes(self.name, given)
        if ("share" in given.shapes) != ("partner" in given.shapes):
            raise kdx.PlanError("efficientat_kd: a mixture has a `share` and a `partner`; name both or neither")

    def forward(
        self,
        student: Tensor,
        teacher: list[Tensor],
        label: Tensor,
        index: Tensor,
        share: Tensor | None,
        partner: Tensor | None,
        known: Tensor | None,
        labels: Tensor,
        temperature: Tensor,
        present: Tensor | None = None,
    ) -> Tensor:
        logits = torch.stack([z.detach() for z in teacher], 1)
        if present is None:
            mean = logits.mean(1)
        else:
            mean = torch.where(present.unsqueeze(2), logits, 0.0).sum(1) / present.sum(1, keepdim=True).clamp(min=1)
        soft = (mean / kdx.per_sample(temperature, mean)).sigmoid()
        hard = targets_of(label, student.shape[1]).to(student)
        is_labelled = label >= 0 if label.ndim == 1 else torch.ones_like(index, dtype=torch.bool)
        answered = torch.ones_like(is_labelled) if known is None else known
        if share is None or partner is None:
            place, found = torch.arange(len(index), device=index.device), torch.zeros_like(is_labelled)
            own = torch.ones_like(soft[:, 0])
        else:
            match = partner.unsqueeze(1) == index.unsqueeze(0)
            place, found, own = match.long().argmax(1), match.any(1), share
        from_labels = mixed_predictions(student, hard, place, own, is_labelled, found & is_labelled[place])
        from_teacher = mixed_predictions(student, soft, place, own, answered, found & answered[place])
        return labels * from_labels + (1 - labels) * from_teacher


def attention(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """`mean_c F^2` of a map [B, C, H, W] as a row of length 1, [B, h * w], average-pooled to `size`."""
    found = feature.square().mean(1, keepdim=True)
    found = found if tuple(found.shape[2:]) == size else F.adaptive_avg_pool2d(found, size)
    return F.normalize(found.flatten(1), dim=1)


def joint_attention(
    student: Tensor, teachers: Sequence[Tensor], temperature: Tensor, present: Tensor | None = None
) -> Tensor:
    """`KL(softmax(A_t / tau) || softmax(A_s / tau))` over the places of maps [B, C, H, W], [B].

    `A_t` is the product of the attention of M teachers, with sum 1; one that `present`, bool [B, M], says is absent is
    left out of it. Larger maps are average-pooled to the smallest height and width.
    """
    maps = (student, *teachers)
    size = min(x.shape[2] for x in maps), min(x.shape[3] for x in maps)
    product = torch.ones_like(attention(student, size)).detach()
    for number, teacher in enumerate(teachers):
        theirs = attention(teacher.detach(), size)
        product = product * (theirs if present is None else torch.where(present[:, number, None], theirs, 1.0))
    joint = F.normalize(product, p=1, dim=1)
    tau = temperature.reshape(-1, 1)
    log_p, log_q = (joint / tau).log_softmax(1), (attention(student, size) / tau).log_softmax(1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


class JointAttention(kdx.Loss):
    """The attention on which teachers of several modalities agree (Valverde et al.: MM-DistillNet, CVPR 2021), [B].

    The sum over stages of the divergence between the joint attention of all teachers and the student's. `student` are
    its maps [B, C, H, W], `teacher` those of all teachers, stage by stage: at each depth one of each teacher, as in the
    default. The joint attention has sum 1 and the student's length 1, as published, so that equal attention has a small
    value that is not 0. Published: weight 0.005 and temperature 9. The public code hands probabilities to a divergence
    that wants logarithms; this does not.

    Left out: pseudo labels from the boxes that the teachers detect, as kdx trains no detectors.
    """

    name = "mm_distillnet"
    separable = True
    confidence = "code"
    inputs = {
        "student": kdx.Many("student.depth_50", "student.depth_75", "student.depth_100"),
        "teacher": kdx.Many("*.depth_50", "*.depth_75", "*.depth_100"),
    }
    gaps = "teacher"
    knobs = {"temperature": kdx.Knob(9.0, above=0.0)}

    def __init__(self, config: JointAttention.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        ours, theirs = given.shapes["student"], given.shapes["teacher"]
        if wrong := [list(shape) for shape in (*ours, *theirs) if len(shape) != 3]:
            raise kdx.PlanError(f"mm_distillnet: found {wrong[0]} for one sample, expected maps [C, H, W]")
        if len(theirs) % len(ours):
            raise kdx.PlanError(
                f"mm_distillnet: found {len(theirs)} maps of teachers for {len(ours)} of the student, expected one of "
                "each teacher for each"
            )

    def forward(
        self, student: list[Tensor], teacher: list[Tensor], temperature: Tensor, present: Tensor | None = None
    ) -> Tensor:
        count = len(teacher) // len(student)
        values = []
        for stage, ours in enumerate(student):
            some = slice(stage * count, (stage + 1) * count)
            here = None if present is None else present[:, some]
            values.append(joint_attention(ours, teacher[some], temperature, here))
        return torch.stack(values).sum(0)


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [CrossModelAudio, StoredPredictions, JointAttention]
