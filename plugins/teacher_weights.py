"""Targets that weigh teachers by labels: sample by sample, by their accuracy, or with weights that are trained.

All take logits [B, K], one tensor per teacher, with the same classes. They give the `weights` [B, M] of the M teachers
in the order of the inputs, which sum to 1, and the `logits` [B, K] of the mixture:
`tau * log sum_k w_k softmax(z_k / tau)`, on which the loss `kd` at the same temperature has the gradient of the
weighted mean of the divergences. No gradient of the student's loss reaches the weights: it would favour the teachers
that are easy to imitate. Where a sample lacks what a teacher reads, the others share its weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdx

FORMS = ("proportional", "softmax")


def mix(logits: Sequence[Tensor], weights: Tensor, temperature: Tensor) -> Tensor:
    """`tau * log sum_k w_k softmax(z_k / tau)`, [B, K], from M logits [B, K] and weights [B, M] or [M]."""
    tau = kdx.per_sample(temperature, logits[0])
    log_p = torch.stack([torch.log_softmax(z / tau, dim=1) for z in logits], 1)
    log_weights = torch.where(weights > 0, weights.clamp(min=1e-12).log(), -math.inf)
    return tau * torch.logsumexp(log_p + log_weights.unsqueeze(-1), dim=1)


def errors(logits: Sequence[Tensor], label: Tensor) -> Tensor:
    """The cross-entropies of M teachers with the labels, [B, M]; 0 where the label is -1."""
    return torch.stack([F.cross_entropy(z, label, reduction="none", ignore_index=-1) for z in logits], 1)


class ConfidenceWeights(kdx.Target):
    """Weights of M >= 2 teachers by how well each knows the sample's label (Zhang et al.: CA-MKD, ICASSP 2022).

        w_k = (1 - softmax_k(CE_k)) / (M - 1)

    with the cross-entropy of each teacher at temperature 1. No weight exceeds 1 / (M - 1). A sample without a label
    has equal weights. The published term of the logits, `sum_k w_k KL_k / M`, is `weighted_kd` with these `weights`
    and one over the number of teachers as its weight; `kd` on the `logits` has M times its gradient. The term of the
    features is the loss `ca_mkd_hints`.
    """

    name = "ca_mkd"
    confidence = "values"
    inputs = {"logits": kdx.Many("*.logits"), "label": "batch.label"}
    gaps = "logits"
    knobs = {"temperature": kdx.Knob(4.0, above=0.0)}
    outputs = ("logits", "weights")

    def __init__(self, config: ConfidenceWeights.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        if kdx.check_teachers(given) < 2:
            raise kdx.PlanError("ca_mkd weighs teachers against each other, but it was given one; expected two or more")

    def forward(
        self, logits: list[Tensor], label: Tensor, temperature: Tensor, present: Tensor | None = None
    ) -> dict[str, Tensor]:
        logits = _precise(logits)
        weights = kdx.confidence_weights(errors(logits, label), present)
        return {"logits": mix(logits, weights, temperature), "weights": weights}


def accuracy_weights(right: Tensor, seen: Tensor, classes: int, sharpness: Tensor, form: str) -> Tensor:
    """Weights [M] or [B, M] that sum to 1, from how many of the labels that each has `seen` it got `right`, [M].

    The accuracies are `a = (right + 1) / (seen + K)`: guessing is assumed until labels are seen. `proportional` is
    `a^sharpness` over its sum, `softmax` is `softmax(sharpness * a)`; `sharpness` is 0-d or [B].
    """
    accuracy = (right + 1) / (seen + classes)
    scores = accuracy if form == "softmax" else accuracy.log()
    return torch.softmax(sharpness.unsqueeze(-1) * scores, dim=-1)


class AccuracyWeighted(kdx.Target):
    """The mixture of teachers weighted by how often each is right, measured before training. A rule of kdx itself.

    Gives `logits` [B, K] and `weights` [B, M], the same for all samples. Accuracies are counted over the labelled
    samples of the first `train.calibration` batches and then kept; with none among them the weights stay equal. Where
    the teachers were trained on these samples, the accuracies tell who remembers them, too.

    form: `proportional` to the accuracy to the power `sharpness`, 1 by default; or the `softmax` of the accuracy times
        `sharpness`.
    """

    name = "accuracy_weighted"
    inputs = {"logits": kdx.Many("*.logits"), "label": "batch.label"}
    gaps = "logits"
    knobs = {"sharpness": kdx.Knob(1.0, at_least=0.0), "temperature": kdx.Knob(1.0, above=0.0)}
    outputs = ("logits", "weights")

    @dataclass(frozen=True)
    class Config:
        form: str = "proportional"

    config: Config
    right: Tensor
    seen: Tensor

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_choice("form", config.form, FORMS)
        count = kdx.check_teachers(given)
        self.register_buffer("right", torch.zeros(count))
        self.register_buffer("seen", torch.zeros(count))

    def calibrate(self, **tensors: Any) -> None:
        label: Tensor = tensors["label"]
        answers = torch.stack([z.argmax(1) for z in tensors["logits"]])
        present = tensors.get("present")
        counted = (label >= 0).expand(len(answers), -1) if present is None else (label >= 0) & present.T
        self.right += ((answers == label) & counted).sum(1)
        self.seen += counted.sum(1)

    def forward(
        self,
        logits: list[Tensor],
        label: Tensor,
        sharpness: Tensor,
        temperature: Tensor,
        present: Tensor | None = None,
    ) -> dict[str, Tensor]:
        logits = _precise(logits)
        weights = accuracy_weights(self.right, self.seen, logits[0].shape[1], sharpness, self.config.form)
        weights = _among(weights.to(logits[0].dtype).expand(len(label), -1), present)
        return {"logits": mix(logits, weights, temperature), "weights": weights}


class LearnedMean(kdx.Target):
    """The mixture of teachers with trained weights, equal at first, the same for all samples. A rule of kdx itself.

    The weights `least + (1 - M least) softmax(scores)` learn from the labels alone, through the `mixture` [B, K], the
    logarithm of the mixed probabilities at temperature 1:

        targets:
          committee: {use: learned_mean}
        losses:
          committee: {use: cross_entropy, inputs: {student: committee.mixture}}
          kd: {use: kd, inputs: {teacher: committee.logits}}

    `logits` and `weights` carry no gradient. Through them the student's own loss would move the weights to the teacher
    that it imitates most easily, however wrong; a run that does not read the `mixture` in a loss is refused. The scores
    are trained as the student is; `lr_scale` makes them faster, and weight decay draws them to equal weights.

    least: what every teacher keeps. Labels that the teachers were trained on flatter the one that remembers them best.
    """

    name = "learned_mean"
    inputs = {"logits": kdx.Many("*.logits")}
    gaps = "logits"
    knobs = {"temperature": kdx.Knob(1.0, above=0.0)}
    outputs = ("logits", "weights", "mixture")

    @dataclass(frozen=True)
    class Config:
        least: float = 0.0

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        count = kdx.check_teachers(given)
        if not 0 <= config.least < 1 / count:
            raise kdx.ConfigError(
                f"least: found {config.least}, expected a share from 0 and below {1 / count:.3g}, for {count} teachers"
            )
        self.scores = nn.Parameter(torch.zeros(count))

    def forward(self, logits: list[Tensor], temperature: Tensor, present: Tensor | None = None) -> dict[str, Tensor]:
        logits = _precise(logits)
        least = self.config.least
        weights = least + (1 - len(logits) * least) * self.scores.softmax(0)
        if present is not None:
            weights = _among(weights.expand(len(present), -1), present)
        fixed = weights.detach().to(logits[0].dtype)
        return {
            "logits": mix(logits, fixed, temperature),
            "weights": fixed.expand(len(logits[0]), -1),
            "mixture": mix(logits, weights, torch.ones_like(temperature)),
        }


def _among(weights: Tensor, present: Tensor | None) -> Tensor:
    """The weights [B, M] of those of the teachers that a sample has, which sum to 1."""
    return weights if present is None else kdx.among_present(weights.clamp(min=1e-12).log(), present).exp()


def _precise(logits: Sequence[Tensor]) -> list[Tensor]:
    """Without gradient, and at least float32."""
    return [kdx.precise(z.detach()) for z in logits]


def _check_learning(plan: kdx.Plan) -> None:
    """Refuse a learned mean whose weights nothing would train."""
    read = {key for call in plan.loss_calls for key in call.reads}
    for call in plan.learner_calls:
        if isinstance(call.module, LearnedMean) and f"{call.name}.mixture" not in read:
            raise kdx.PlanError(
                f"{call.where}: its weights learn through `mixture`, which no loss reads; add the loss "
                f"`{{use: cross_entropy, inputs: {{student: {call.name}.mixture}}}}`, or use the target mean"
            )


@kdx.hookimpl
def kdx_plan_ready(plan: kdx.Plan) -> None:
    _check_learning(plan)


@kdx.hookimpl
def kdx_targets() -> list[type[kdx.Target]]:
    return [ConfidenceWeights, AccuracyWeighted, LearnedMean]
