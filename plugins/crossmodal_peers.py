"""Nets of several modalities that are trained together, each a teacher of the others.

In a config all but the student are teachers with `trainable: true`. Only the student is deployed, with its stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdx

FORMS = ("masked", "zeroed")


def winners(logits: Sequence[Tensor], label: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The cross-entropies of M nets with the labels, [B, M], and which net has the lowest of a sample, bool [B, M].

    `present`, bool [B, M], says which nets may win. All cross-entropies are 0 where the label is -1.
    """
    errors = torch.stack([F.cross_entropy(z, label, reduction="none", ignore_index=-1) for z in logits], 1)
    ranked = errors.detach() if present is None else torch.where(present, errors.detach(), torch.inf)
    return errors, F.one_hot(ranked.argmin(1), len(logits)).bool()


def multiple_choice(
    logits: Sequence[Tensor], label: Tensor, temperature: Tensor, share: Tensor, present: Tensor | None = None
) -> Tensor:
    """Sum over M nets of `CE` for the winner and `(1 - share) CE + share tau^2 KL(winner || net)` for the others, [B].

    `logits` are M tensors [B, K]; `temperature` and `share` are 0-d or [B]. 0 for a sample without a label, and for a
    net that `present`, bool [B, M], says is absent. No gradient reaches the winner through the others.
    """
    errors, won = winners(logits, label, present)
    stacked = torch.stack(list(logits), 1)
    best = stacked.detach()[torch.arange(len(label), device=label.device), won.long().argmax(1)]
    soft = torch.stack([kdx.soft_divergences(z, [best], temperature).squeeze(1) for z in logits], 1)
    mixed = kdx.per_sample(share, errors)
    values = torch.where(won, errors, (1 - mixed) * errors + mixed * soft)
    counted = (label >= 0).unsqueeze(1) if present is None else (label >= 0).unsqueeze(1) & present
    return torch.where(counted, values, 0.0).sum(1)


class MultipleChoice(kdx.Loss):
    """Distillation multiple-choice learning (Garcia et al.: DMCL, WACV 2021), one value per sample.

    M nets of as many modalities learn at once, `logits: [student.logits, "*.logits"]`. For each sample the net with
    the lowest cross-entropy, the winner, learns from the label, and the others from the label and from the winner:

        CE of the winner  +  sum over the others of (1 - share) CE + share tau^2 KL(winner || other)

    A net that lacks its modality neither wins nor learns from the sample. The mean is over the samples with a label;
    those without one have no winner. It replaces the cross-entropies of the nets. Published: temperature 2.
    """

    name = "dmcl"
    confidence = "paper"
    inputs = {"logits": kdx.Many(), "label": "batch.label"}
    gaps = "logits"
    knobs = {"temperature": kdx.Knob(2.0, above=0.0), "share": kdx.Knob(0.5, at_least=0.0, at_most=1.0)}

    def __init__(self, config: MultipleChoice.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        if kdx.check_teachers(given) < 2:
            raise kdx.PlanError("dmcl lets nets win against each other, but it was given one; expected two or more")

    def forward(
        self,
        logits: list[Tensor],
        label: Tensor,
        temperature: Tensor,
        share: Tensor,
        present: Tensor | None = None,
    ) -> Tensor:
        return kdx.over_labelled(multiple_choice(logits, label, temperature, share, present), label)


def kendall(a: Tensor, b: Tensor) -> Tensor:
    """Kendall's rank correlation tau-b of each row of two tensors [B, K], [B]; 0 for a row whose numbers are all equal.

    Sum of the products of the signs of all differences, over the root of the numbers of pairs that are no ties.
    """
    first, second = ((x.unsqueeze(2) - x.unsqueeze(1)).sign() for x in (a.detach(), b.detach()))
    untied = first.square().sum((1, 2)) * second.square().sum((1, 2))
    return (first * second).sum((1, 2)) / untied.sqrt().clamp(min=1)


def other_classes(student: Tensor, teacher: Tensor, label: Tensor, form: str = "masked") -> Tensor:
    """`KL(teacher || student)` of two logits [B, K] without the true class, at temperature 1, [B].

    `masked` takes the true class out of both distributions. `zeroed` puts its logits to 0, with which it stays in them,
    as public code has it. A sample with the label -1 keeps all classes. The teacher gets no gradient.
    """
    true = F.one_hot(label.clamp(min=0), student.shape[1]).bool() & (label >= 0).unsqueeze(1)
    filling = 0.0 if form == "zeroed" else -torch.inf
    log_q, log_p = (torch.where(true, filling, z).log_softmax(1) for z in (student, teacher.detach()))
    gap = torch.where(true & (form == "masked"), 0.0, log_p) - torch.where(true & (form == "masked"), 0.0, log_q)
    return (log_p.exp() * gap).sum(1)


def divergence(target: Tensor, logits: Tensor) -> Tensor:
    """`KL(softmax(target) || softmax(logits))` of two logits [B, K], [B]. The target gets no gradient."""
    log_p, log_q = target.detach().log_softmax(1), logits.log_softmax(1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


class CustomisedTransfer(kdx.Loss):
    """Customised cross-modal distillation (Huo et al.: C2KD, CVPR 2024), one value per sample.

    Student and teacher, of two modalities, are both trained, and each has a proxy behind its last map [B, C, H, W],
    which the loss owns: the map is averaged over its places, then a 1x1 convolution, batch norm, leaky ReLU and a
    linear layer make logits. Each net and its proxy learn from each other; between the modalities only the proxies do,
    from samples on whose classes their rankings agree, and without the true class:

        KL(t, P_t) + KL(P_t, t) + KL(s, P_s) + KL(P_s, s) + [tau_b(P_s, P_t) > agreement] (NT(P_s, P_t) + NT(P_t, P_s))

    where the first of a pair is the target and gets no gradient. Samples that are dropped count as 0. The
    cross-entropies of both nets are losses of their own. `peer` and `peer_map` are of the teacher, a model with
    `trainable: true`; on a frozen one nothing but the proxies would learn. 0 where all four agree.

    classes: `masked` takes the true class out, as published; `zeroed` puts its logits to 0, as the public code does.
        A sample without a label keeps all its classes.
    agreement: what Kendall's tau-b of the proxies' logits must exceed. Published: 0.

    The authors' schedule: SGD with rate 0.01, falling to 0.0001 with power 0.9, a teacher trained before, weights of 1.
    """

    name = "c2kd"
    confidence = "values"
    inputs = {
        "student": "student.logits",
        "student_map": "student.depth_100",
        "peer": kdx.REQUIRED,
        "peer_map": kdx.REQUIRED,
        "label": "batch.label",
    }
    knobs = {"agreement": kdx.Knob(0.0, at_least=-1.0, at_most=1.0)}

    @dataclass(frozen=True)
    class Config:
        classes: str = "masked"

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_choice("classes", config.classes, FORMS)
        ours, theirs = given.shape("student"), given.shape("peer")
        if len(ours) != 1 or ours != theirs or ours[0] < 2:
            raise kdx.PlanError(
                f"c2kd: the logits are {list(ours)} and {list(theirs)} for one sample, expected [K] for both, K >= 2"
            )
        for name in ("student_map", "peer_map"):
            if len(given.shape(name)) != 3:
                raise kdx.PlanError(f"c2kd: {name} is {list(given.shape(name))} for one sample, expected [C, H, W]")
        self.proxy = _proxy(given.shape("student_map")[0], ours[0])
        self.peer_proxy = _proxy(given.shape("peer_map")[0], ours[0])

    def forward(
        self,
        student: Tensor,
        student_map: Tensor,
        peer: Tensor,
        peer_map: Tensor,
        label: Tensor,
        agreement: Tensor,
    ) -> Tensor:
        ours, theirs = self.proxy(student_map), self.peer_proxy(peer_map)
        within = [divergence(a, b) for a, b in ((peer, theirs), (theirs, peer), (student, ours), (ours, student))]
        form = self.config.classes
        between = other_classes(ours, theirs, label, form) + other_classes(theirs, ours, label, form)
        return torch.stack(within).sum(0) + torch.where(kendall(ours, theirs) > agreement, between, 0.0)


def _proxy(channels: int, classes: int) -> nn.Module:
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(channels, channels, 1),
        nn.BatchNorm2d(channels),
        nn.LeakyReLU(0.1),
        nn.Flatten(),
        nn.Linear(channels, classes),
    )


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [MultipleChoice, CustomisedTransfer]
