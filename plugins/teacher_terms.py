"""Losses on several teachers at once, each with the weight that a target gives it sample by sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import kdx


class WeightedDivergences(kdx.Loss):
    """`sum_k w_k KL_k`: soft targets of M teachers, each with its weight, one value per sample.

    `student` and each of `teacher` are logits [B, K], `weights` is [B, M] in the order of the teachers and taken as it
    is: weights that sum to M or to 0 count as such. The gradient reaches them where the target that gives them lets it.
    0 where every teacher that has a weight agrees with the student. Where the weights sum to 1, the gradient for the
    student is that of `kd` on the mixture of the teachers.
    """

    name = "weighted_kd"
    separable = True
    inputs = {"student": "student.logits", "teacher": kdx.Many("*.logits"), "weights": kdx.REQUIRED}
    gaps = "teacher"
    knobs = {"temperature": kdx.Knob(4.0, above=0.0)}

    def __init__(self, config: WeightedDivergences.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_same_classes(self.name, given)
        _check_weights(self.name, given)

    def forward(
        self,
        student: Tensor,
        teacher: list[Tensor],
        weights: Tensor,
        temperature: Tensor,
        present: Tensor | None = None,
    ) -> Tensor:
        values = weights * kdx.soft_divergences(student, teacher, temperature)
        return (values if present is None else torch.where(present, values, 0.0)).sum(1)


class WeightedHints(kdx.Loss):
    """`sum_k v_k MSE(r_k, F_k)`: hints of M teachers, each with its weight, one value per sample.

    `student` are M tensors of the student, each behind an aligner of its own, `teacher` the M tensors [B, ...] that
    they are compared with, by default the last maps [B, C, H, W]; `weights` is [B, M], as in `weighted_kd`. The
    squares are averaged over all elements of a sample. 0 where the student meets every teacher that has a weight.
    """

    name = "weighted_hints"
    separable = True
    inputs = {"student": kdx.Many(), "teacher": kdx.Many("*.depth_100"), "weights": kdx.REQUIRED}

    def __init__(self, config: WeightedHints.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        _check_pairs(self.name, given)
        _check_weights(self.name, given)

    def forward(self, student: list[Tensor], teacher: list[Tensor], weights: Tensor) -> Tensor:
        return (weights * kdx.hint_distances(student, teacher)).sum(1)


def _check_pairs(who: str, given: kdx.Given) -> None:
    ours, theirs = given.shapes["student"], given.shapes["teacher"]
    if ours != theirs:
        raise kdx.PlanError(
            f"{who} compares the student with each teacher, but student is {_listed(ours)} and teacher is "
            f"{_listed(theirs)}; put an aligner for each teacher in between"
        )


def _check_weights(who: str, given: kdx.Given) -> None:
    found, count = given.shape("weights"), len(given.shapes["teacher"])
    if found != (count,):
        raise kdx.PlanError(f"{who}: weights is {list(found)} for one sample, expected [{count}] for {count} teachers")


def _listed(shapes: Sequence[kdx.Shape]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [WeightedDivergences, WeightedHints]
