"""Losses on logits: soft targets and logit regression.

Class axis 1; further axes of [B, K, ...] are positions, over which a sample's value is the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

import kdx


def soft_targets(student: Tensor, teacher: Tensor, temperature: Tensor) -> Tensor:
    """`tau^2 * KL(softmax(teacher / tau) || softmax(student / tau))`, summed over classes, [B].

    `student`, `teacher` [B, K, ...] are logits, `temperature` is above 0, one for all or one per sample [B]. The
    logarithms of a teacher's probabilities serve as its logits. Gradient with respect to the student's logits, for the
    mean over the batch: `tau * (p_student - p_teacher) / B`.
    """
    tau = kdx.per_sample(temperature, student)
    divergence = F.kl_div(
        F.log_softmax(student / tau, dim=1),
        F.log_softmax(teacher.detach() / tau, dim=1),
        reduction="none",
        log_target=True,
    )
    return _mean_over_positions(divergence.sum(1)) * temperature.square()


class SoftTargets(kdx.Loss):
    """Soft targets (Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015), one value per sample.

    0 for a student with the teacher's distribution. The factor tau^2 keeps the size of the gradient nearly independent
    of the temperature. The common variant that divides by the number of classes too is K times smaller.
    """

    name = "kd"
    inputs = {"student": "student.logits", "teacher": "teacher.logits"}
    knobs = {"temperature": kdx.Knob(4.0, above=0.0)}
    same_shape = (("student", "teacher"),)

    def forward(self, student: Tensor, teacher: Tensor, temperature: Tensor) -> Tensor:
        return soft_targets(student, teacher, temperature)


def logit_regression(student: Tensor, teacher: Tensor, *, centre: bool = False) -> Tensor:
    """Squared difference of logits [B, K, ...], mean over classes, [B]; `centre` takes each row's mean off first."""
    difference = student - teacher.detach()
    if centre:
        difference = difference - difference.mean(1, keepdim=True)
    return _mean_over_positions(difference.square().mean(1))


class LogitRegression(kdx.Loss):
    """Regression of the teacher's logits (Ba and Caruana: Do Deep Nets Really Need to be Deep?, NeurIPS 2014).

    One value per sample, mean over the K classes, 0 for a student with the teacher's logits. With `centre`, a constant
    added to a row does not count, and `kd` tends to half of this value as its temperature grows.
    """

    name = "mse_logits"
    inputs = {"student": "student.logits", "teacher": "teacher.logits"}
    same_shape = (("student", "teacher"),)

    @dataclass(frozen=True)
    class Config:
        centre: bool = False

    config: Config

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return logit_regression(student, teacher, centre=self.config.centre)


def _mean_over_positions(values: Tensor) -> Tensor:
    """[B, ...] -> [B]."""
    return values.flatten(1).mean(1) if values.ndim > 1 else values


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [SoftTargets, LogitRegression]
