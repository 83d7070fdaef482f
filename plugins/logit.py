"""Losses on logits: soft targets under several divergences, logit regression, and logits of many labels.

Class axis 1; further axes of [B, K, ...] are positions, over which a sample's value is the mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import kdx

REDUCTIONS = ("sum", "mean")
MULTI_LABEL_FORMS = ("bce", "binary_kl")


def forward_kl(log_p: Tensor, log_q: Tensor, mix: float = 0.0) -> Tensor:
    """The summands of `KL(p || q)`; `p` is the teacher, `q` the student, both as logarithms [B, K, ...]."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True)


def reverse_kl(log_p: Tensor, log_q: Tensor, mix: float = 0.0) -> Tensor:
    """The summands of `KL(q || p)`."""
    return forward_kl(log_q, log_p)


def jensen_shannon(log_p: Tensor, log_q: Tensor, mix: float = 0.5) -> Tensor:
    """The summands of `mix KL(p || m) + (1 - mix) KL(q || m)` with `m = mix p + (1 - mix) q`.

    At 0 and 1, where that is 0, it is what it tends to in units of `mix` and `1 - mix`: the forward and the reverse KL.
    """
    if mix in (0.0, 1.0):
        return reverse_kl(log_p, log_q) if mix else forward_kl(log_p, log_q)
    middle = _log_mixture(log_p, log_q, mix)
    return mix * forward_kl(log_p, middle) + (1 - mix) * forward_kl(log_q, middle)


def skew_kl(log_p: Tensor, log_q: Tensor, mix: float = 0.1) -> Tensor:
    """The summands of `KL(p || mix p + (1 - mix) q)`."""
    return forward_kl(log_p, _log_mixture(log_p, log_q, mix))


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, mix: float = 0.1) -> Tensor:
    """The summands of `KL(q || (1 - mix) p + mix q)`."""
    return skew_kl(log_q, log_p, mix)


def total_variation(log_p: Tensor, log_q: Tensor, mix: float = 0.0) -> Tensor:
    """The summands of `sum |p - q| / 2`."""
    return (log_p.exp() - log_q.exp()).abs() / 2


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jensen_shannon,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
}


def soft_targets(
    student: Tensor,
    teacher: Tensor,
    temperature: Tensor,
    *,
    divergence: str = "forward_kl",
    mix: float = 0.0,
    reduction: str = "sum",
) -> Tensor:
    """`tau^2 * D(softmax(teacher / tau), softmax(student / tau))`, summed over classes, [B].

    `student`, `teacher` [B, K, ...] are logits, `temperature` is above 0, one for all or one per sample [B]. The
    logarithms of a teacher's probabilities serve as its logits. Gradient of the default, `KL(teacher || student)`, with
    respect to the student's logits, for the mean over the batch: `tau * (p_student - p_teacher) / B`.

    `mix` is what `jsd` and the skewed divergences mix with. The `reduction` `mean` divides by K.
    """
    if divergence == "forward_kl" and reduction == "sum":
        return _mean_over_positions(kdx.soft_divergence(student, teacher, temperature))
    tau = kdx.per_sample(temperature, student)
    log_p, log_q = F.log_softmax(teacher.detach() / tau, dim=1), F.log_softmax(student / tau, dim=1)
    values = DIVERGENCES[divergence](log_p, log_q, mix)
    values = values.mean(1) if reduction == "mean" else values.sum(1)
    return _mean_over_positions(values) * temperature.square()


class SoftTargets(kdx.Loss):
    """Soft targets (Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015), one value per sample.

    0 for a student with the teacher's distribution. The factor tau^2 keeps the size of the gradient nearly independent
    of the temperature. Published for CIFAR-100: temperature 4, weight 0.9 beside 0.1 of the labels.

    divergence: between p, the teacher's distribution, and q, the student's, all times tau^2. `forward_kl` KL(p || q);
        `reverse_kl` KL(q || p); `jsd`, of which on-policy distillation is made (Agarwal et al., ICLR 2024);
        `skew_kl` KL(p || alpha p + (1 - alpha) q) and `skew_reverse_kl` KL(q || (1 - alpha) p + alpha q) (Ko et al.:
        DistiLLM, ICML 2024; their code leaves out a constant of `skew_kl`); `total_variation`.
    beta: the teacher's share in `jsd`, 0.5 by default. 0 is `forward_kl`, 1 is `reverse_kl`.
    alpha: the skew, 0.1 by default.
    reduction: over classes. `mean` is K times smaller than the published `sum`; much public code has it by accident.
    """

    name = "kd"
    separable = True
    confidence = "values"
    inputs = {"student": "student.logits", "teacher": "teacher.logits"}
    knobs = {"temperature": kdx.Knob(4.0, above=0.0)}
    same_shape = (("student", "teacher"),)

    @dataclass(frozen=True)
    class Config:
        divergence: str = "forward_kl"
        beta: float | None = None
        alpha: float | None = None
        reduction: str = "sum"

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_choice("divergence", config.divergence, tuple(DIVERGENCES))
        kdx.check_choice("reduction", config.reduction, REDUCTIONS)
        _check_share("beta", config.beta, config.divergence, ("jsd",), most=1)
        _check_share("alpha", config.alpha, config.divergence, ("skew_kl", "skew_reverse_kl"), most=0.99)
        if config.divergence == "jsd":
            self.mix = 0.5 if config.beta is None else config.beta
        else:
            self.mix = 0.1 if config.alpha is None else config.alpha

    @property
    def is_soft_divergence(self) -> bool:
        return self.config.divergence == "forward_kl" and self.config.reduction == "sum"

    def forward(self, student: Tensor, teacher: Tensor, temperature: Tensor) -> Tensor:
        config = self.config
        return soft_targets(
            student, teacher, temperature, divergence=config.divergence, mix=self.mix, reduction=config.reduction
        )


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
    separable = True
    confidence = "paper"
    inputs = {"student": "student.logits", "teacher": "teacher.logits"}
    same_shape = (("student", "teacher"),)

    @dataclass(frozen=True)
    class Config:
        centre: bool = False

    config: Config

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return logit_regression(student, teacher, centre=self.config.centre)


class AnnealedRegression(kdx.Loss):
    """The first stage of annealing distillation (Jafari et al., EACL 2021), one value per sample.

    Squared difference of the student's logits [B, K] and `1 - (T - 1) / highest` times the teacher's, mean over
    classes. A schedule takes the temperature T from `highest` to 1, where the factor is 1; 0 for a student with the
    shrunken logits. The second stage has labels only, which schedules on the weights express. The published `highest`
    for text is 7 to 10, with most epochs in the first stage.
    """

    name = "annealing_kd"
    confidence = "paper"
    inputs = {"student": "student.logits", "teacher": "teacher.logits"}
    knobs = {"temperature": kdx.Knob(1.0, at_least=1.0)}
    same_shape = (("student", "teacher"),)

    @dataclass(frozen=True)
    class Config:
        highest: float = 10.0

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        if not 1 <= config.highest < math.inf:
            raise kdx.ConfigError(f"highest: found {config.highest}, expected a temperature of at least 1")

    def forward(self, student: Tensor, teacher: Tensor, temperature: Tensor) -> Tensor:
        factor = 1 - (kdx.per_sample(temperature, teacher) - 1) / self.config.highest
        return logit_regression(student, factor * teacher)


def soft_binary_cross_entropy(student: Tensor, teacher: Tensor, temperature: Tensor) -> Tensor:
    """Binary cross-entropy with `sigmoid(teacher / tau)`, mean over classes, [B], of logits [B, K, ...]."""
    wanted = torch.sigmoid(teacher.detach() / kdx.per_sample(temperature, teacher))
    return _mean_over_positions(F.binary_cross_entropy_with_logits(student, wanted, reduction="none").mean(1))


def binary_divergence(student: Tensor, teacher: Tensor, temperature: Tensor) -> Tensor:
    """`tau^2 * sum_k KL(sigmoid(teacher_k / tau) || sigmoid(student_k / tau))`, [B], of logits [B, K, ...]."""
    tau = kdx.per_sample(temperature, student)
    student, teacher = student / tau, teacher.detach() / tau
    present = torch.sigmoid(teacher) * (F.logsigmoid(teacher) - F.logsigmoid(student))
    absent = torch.sigmoid(-teacher) * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return _mean_over_positions((present + absent).sum(1)) * temperature.square()


class MultiLabel(kdx.Loss):
    """Distillation where each class is present or absent by itself, one value per sample.

    form: `bce`, common in audio tagging, is the binary cross-entropy with the teacher's probabilities, mean over the K
        classes: its least value is their entropy, reached by a perfect student at temperature 1. Only the teacher is
        softened. Usual weight: 0.9 beside 0.1 of the labels. `binary_kl` (Yang et al.: Multi-label knowledge
        distillation, ICCV 2023) is summed over classes, with both sides softened
        and the factor tau^2; 0 for a perfect student. Published weight: 10, at temperature 1.
    """

    name = "multi_label_kd"
    confidence = "paper"
    inputs = {"student": "student.logits", "teacher": "teacher.logits"}
    knobs = {"temperature": kdx.Knob(1.0, above=0.0)}
    same_shape = (("student", "teacher"),)

    @dataclass(frozen=True)
    class Config:
        form: str = "bce"

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_choice("form", config.form, MULTI_LABEL_FORMS)

    def forward(self, student: Tensor, teacher: Tensor, temperature: Tensor) -> Tensor:
        value = soft_binary_cross_entropy if self.config.form == "bce" else binary_divergence
        return value(student, teacher, temperature)


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """`log(share p + (1 - share) q)`."""
    if share == 0:
        return log_q
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def _mean_over_positions(values: Tensor) -> Tensor:
    """[B, ...] -> [B]."""
    return values.flatten(1).mean(1) if values.ndim > 1 else values


def _check_share(name: str, found: float | None, divergence: str, readers: tuple[str, ...], *, most: float) -> None:
    if found is None:
        return
    if divergence not in readers:
        raise kdx.ConfigError(f"{name}: `divergence: {divergence}` does not read it, only {' and '.join(readers)}")
    if not 0 <= found <= most:
        raise kdx.ConfigError(f"{name}: found {found}, expected a share from 0 to {most:g}")


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [SoftTargets, LogitRegression, AnnealedRegression, MultiLabel]
