"""Targets that soften: temperatures to be used as the knob of a loss, and logits standardised sample by sample."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdx

CONFUSIONS = ("confidence", "focal")
DOUBTS = ("entropy", "confidence")


def doubt_of(logits: Tensor, by: str = "entropy") -> Tensor:
    """How unsure an answer is, [B], from logits [B, K] with K >= 2: 0 for one class alone, 1 for all alike.

    By `entropy` it is `H / log K`, by `confidence` it is `(1 - max p) K / (K - 1)`.
    """
    logits = kdx.precise(logits)
    log_p = torch.log_softmax(logits, dim=1)
    classes = logits.shape[1]
    if by == "confidence":
        return ((1 - log_p.amax(1).exp()) * classes / (classes - 1)).clamp(0, 1)
    return (-(log_p.exp() * log_p).sum(1) / math.log(classes)).clamp(0, 1)


def doubt_temperature(doubt: Tensor, low: Tensor, high: Tensor, *, reverse: bool = False) -> Tensor:
    """`low + (high - low) * (1 - doubt)`, [B]: a sure answer gives `high`, an even one `low`; `reverse` swaps them."""
    return low + (high - low) * (doubt if reverse else 1 - doubt)


class EntropyTemperature(kdx.Target):
    """A temperature per sample from how sure the given logits are, [B], between `low` and `high`.

    A rule of kdx itself: what a sure teacher knows beyond its answer shows only when it is softened, while an unsure
    one has said it already. It reads no labels. With `reverse`, unsure answers are softened more.

    by: what is doubt: `entropy`, over that of an even answer, or `confidence`, by the highest probability alone.
    """

    name = "entropy_temperature"
    inputs = {"logits": "teacher.logits"}
    knobs = {"low": kdx.Knob(1.0, above=0.0), "high": kdx.Knob(4.0, above=0.0)}

    @dataclass(frozen=True)
    class Config:
        by: str = "entropy"
        reverse: bool = False

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_choice("by", config.by, DOUBTS)
        shape = given.shape("logits")
        if len(shape) != 1 or shape[0] < 2:
            raise kdx.PlanError(f"logits: found {list(shape)} for one sample, expected [K] with K >= 2 classes")

    def forward(self, logits: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return doubt_temperature(doubt_of(logits, self.config.by), low, high, reverse=self.config.reverse)


def standardise(logits: Tensor) -> Tensor:
    """`(z - mean) / (std + 1e-7)` over the classes of logits [B, K, ...], with the std that divides by K - 1."""
    logits = kdx.precise(logits)
    centred = logits - logits.mean(1, keepdim=True)
    deviation: Tensor = torch.linalg.vector_norm(centred, dim=1, keepdim=True) / math.sqrt(logits.shape[1] - 1)
    return centred / (deviation + 1e-7)


class Standardised(kdx.Target):
    """Logits standardised over the classes of each sample (Sun et al.: Logit standardisation, CVPR 2024), same shape.

    It goes in front of any loss on logits, with one such target for either side:

        targets:
          zs: {use: logit_std, inputs: {logits: student.logits}}
          zt: {use: logit_std, inputs: {logits: teacher.logits}}
        losses:
          kd: {use: kd, inputs: {student: zs, teacher: zt}, temperature: 2, weight: 9}

    A student whose logits are `a z + b` of the teacher's, a > 0, is then a perfect one. The gradient goes through mean
    and deviation. Losses on labels keep the raw logits. Published: temperature 2 and weight 9 for `kd`, beside 0.1 of
    the labels; `alpha` and `beta` of `dkd` times 9. Its value is in float32 at least.
    """

    name = "logit_std"
    confidence = "values"
    inputs = {"logits": kdx.REQUIRED}

    def __init__(self, config: Standardised.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        shape = given.shape("logits")
        if not shape or shape[0] < 2:
            raise kdx.PlanError(f"logits: found {list(shape)} for one sample, expected [K, ...] with K >= 2 classes")

    def forward(self, logits: Tensor) -> Tensor:
        return standardise(logits)


def dynamic_temperature(confusion: Tensor, base: Tensor, spread: Tensor, lowest: Tensor) -> Tensor:
    """`base + spread * (mean w - w_b)`, at least `lowest`, [B]; `w` is the confusion [B] divided by its sum."""
    share = confusion / confusion.sum().clamp(min=torch.finfo(confusion.dtype).tiny)
    return torch.maximum(base + spread * (share.mean() - share), lowest)


def confusion(student: Tensor, teacher: Tensor, kind: str = "confidence", gamma: float = 1.0) -> Tensor:
    """How hard a sample is for the student, [B], from logits [B, K].

    `confidence` is one over the student's highest probability, `focal` the power `gamma` of one minus the cosine of
    both nets' logits.
    """
    if kind == "confidence":
        return 1 / student.softmax(1).amax(1)
    return (1 - F.cosine_similarity(student, teacher, dim=1)).clamp(min=0) ** gamma


class DynamicTemperature(kdx.Target):
    """A temperature per sample, lower for hard ones (Wen, Lai, Qian: Preparing Lessons, Neurocomputing 2021), [B].

    `base + spread * (mean w - w_b)` with `w` the confusion of a sample over the sum of the batch, so that the mean over
    the batch is `base` and the deviations are of the size of `spread / B`. Not below `lowest`, which is ours: the rule
    alone can fall below 0 in small batches. No gradient goes through it.

    confusion: `confidence`, one over the student's highest probability, or `focal`, the power `gamma` of one minus the
        cosine of both nets' logits. gamma: of `focal`, 1 by default.
    """

    name = "dtd"
    confidence = "paper"
    inputs = {"student": "student.logits", "teacher": "teacher.logits"}
    knobs = {
        "base": kdx.Knob(10.0, above=0.0),
        "spread": kdx.Knob(40.0, at_least=0.0),
        "lowest": kdx.Knob(1.0, above=0.0),
    }
    same_shape = (("student", "teacher"),)

    @dataclass(frozen=True)
    class Config:
        confusion: str = "confidence"
        gamma: float | None = None

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_choice("confusion", config.confusion, CONFUSIONS)
        if config.gamma is not None and config.confusion != "focal":
            raise kdx.ConfigError(f"gamma: `confusion: {config.confusion}` does not read it, only focal")
        if config.gamma is not None and not config.gamma > 0:
            raise kdx.ConfigError(f"gamma: found {config.gamma}, expected a number above 0")

    def forward(self, student: Tensor, teacher: Tensor, base: Tensor, spread: Tensor, lowest: Tensor) -> Tensor:
        student, teacher = (kdx.precise(x.detach()) for x in (student, teacher))
        found = confusion(student, teacher, self.config.confusion, self.config.gamma or 1.0)
        return dynamic_temperature(found, base, spread, lowest)


class LearnedTemperature(kdx.Target):
    """A temperature that learns against the student (Li et al.: Curriculum temperature, AAAI 2023), 0-d.

    `low + reach * sigmoid(theta)`; theta is one trained number, 1 at first, so that training starts at 15.62. What
    comes back to theta is multiplied by `gradient`: 0 leaves the temperature alone, -1 makes the task as much harder as
    the student makes it easier. A positive value would make the task trivial and is refused.

    Use it as the temperature of a loss. Published curriculum: from 0 to -1 over 10 of 240 epochs,
    `gradient: {use: cosine, peak: 0, end: -1, finish: 10, per: epoch}`, with weight 0.9 of `kd` beside 0.1 of the
    labels. theta is trained as the student is, weight decay included; `lr_scale` and `weight_decay` change that.
    """

    name = "ctkd"
    confidence = "code"
    knobs = {"gradient": kdx.Knob(-1.0, at_most=0.0)}

    @dataclass(frozen=True)
    class Config:
        low: float = 1.0
        reach: float = 20.0

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        for name, value in {"low": config.low, "reach": config.reach}.items():
            if not 0 < value < math.inf:
                raise kdx.ConfigError(f"{name}: found {value}, expected a number above 0")
        self.theta = nn.Parameter(torch.tensor(1.0))

    def forward(self, gradient: Tensor) -> Tensor:
        return self.config.low + self.config.reach * with_gradient(self.theta, gradient).sigmoid()


def with_gradient(value: Tensor, factor: Tensor) -> Tensor:
    """The value itself, whose gradient is multiplied by the mean of `factor`."""
    fixed = value.detach()
    return fixed + factor.mean() * (value - fixed)


class LearnedTemperatures(kdx.Target):
    """A temperature per sample that learns against the student (Li et al.: Curriculum temperature, AAAI 2023), [B].

    `low + reach * sigmoid(theta_b)`, where two layers make `theta_b` of the logits [B, K] of teacher and student. As in
    `ctkd` what comes back to the layers is multiplied by `gradient`, and all temperatures start at 15.62. Logits get no
    gradient from here. The authors describe this form but published no code of it; the width is ours.

    width: of the hidden layer; 2 K by default.
    """

    name = "ctkd_instance"
    confidence = "paper"
    inputs = {"student": "student.logits", "teacher": "teacher.logits"}
    knobs = {"gradient": kdx.Knob(-1.0, at_most=0.0)}

    @dataclass(frozen=True)
    class Config:
        low: float = 1.0
        reach: float = 20.0
        width: int | None = None

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        for name, value in {"low": config.low, "reach": config.reach, "width": config.width or 1}.items():
            if not 0 < value < math.inf:
                raise kdx.ConfigError(f"{name}: found {value}, expected a number above 0")
        found = [given.shape(name) for name in ("student", "teacher")]
        if any(len(shape) != 1 for shape in found):
            raise kdx.PlanError(f"ctkd_instance reads logits [K], but found {found[0]} and {found[1]} for one sample")
        inner = found[0][0] + found[1][0]
        last = nn.Linear(config.width or inner, 1)
        nn.init.zeros_(last.weight)
        nn.init.ones_(last.bias)
        self.layers = nn.Sequential(nn.Linear(inner, config.width or inner), nn.ReLU(), last)

    def forward(self, student: Tensor, teacher: Tensor, gradient: Tensor) -> Tensor:
        both = torch.cat([teacher, student], dim=1).detach().to(next(self.layers.parameters()).dtype)
        theta: Tensor = with_gradient(self.layers(both)[:, 0], gradient)
        return self.config.low + self.config.reach * theta.sigmoid()


@kdx.hookimpl
def kdx_targets() -> list[type[kdx.Target]]:
    return [EntropyTemperature, Standardised, DynamicTemperature, LearnedTemperature, LearnedTemperatures]
