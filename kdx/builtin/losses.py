"""The loss that plain supervised training needs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kdx.components import Given, Loss
from kdx.errors import ConfigError, PlanError
from kdx.fused import cross_entropy_sum, few_cross_entropy, goes_whole


def cross_entropy(student: Tensor, label: Tensor, label_smoothing: float = 0.0, *, labelled: bool = False) -> Tensor:
    """Mean cross-entropy over the samples that have a label; 0, with a graph, where none has one.

    `student` [B, K] are logits, `label` [B] holds classes from 0 and -1 for none. `label_smoothing` spreads that part
    of the target evenly over all K classes. Where all samples are known to be `labelled`, none is looked for.
    """
    if labelled and goes_whole(student):
        return few_cross_entropy(student, label, label_smoothing, reduction="mean")
    total = cross_entropy_sum(student, label, label_smoothing)
    return total / (label.numel() if labelled else (label != -1).sum().clamp(min=1))


class CrossEntropy(Loss):
    """Cross-entropy with the true labels, at temperature 1, 0-d. Tends to 0 for a student that is sure and right.

    Samples with the label -1 are left out, so labelled and unlabelled data can share a batch.
    """

    name = "cross_entropy"
    inputs = {"student": "student.logits", "label": "batch.label"}

    @dataclass(frozen=True)
    class Config:
        label_smoothing: float = 0.0

    config: Config

    def __init__(self, config: Config, given: Given) -> None:
        super().__init__(config, given)
        if not 0 <= config.label_smoothing < 1:
            raise ConfigError(f"label_smoothing: found {config.label_smoothing}, expected a share from 0 and below 1")
        label, student = given.shapes.get("label", ()), given.shapes.get("student", (0,))
        if len(label) >= len(student):
            raise PlanError(
                f"cross_entropy needs a class for each sample but got {given.refs.get('label', 'label')} "
                f"{list(label)}; a loss such as `kd` compares distributions"
            )
        self.labelled = given.facts.labelled and given.refs.get("label") == "batch.label"

    def forward(self, student: Tensor, label: Tensor) -> Tensor:
        return cross_entropy(student, label, self.config.label_smoothing, labelled=self.labelled)


LOSSES: list[type[Loss]] = [CrossEntropy]
