"""Losses on several teachers at once: all of them alike, or as their gradients agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kdx

ROUNDS, PULL = 16, 0.02
"""Steps of the interior-point method, and the part of the distance to the bounds that each aims to leave."""


class EqualDivergences(kdx.Loss):
    """The mean of the soft-target losses of all teachers, one value per sample.

    `student` and each of `teacher` are logits [B, K]. At one temperature, its gradient is that of `kd` on the target
    `mean`. 0 for a student that agrees with every teacher, which takes teachers that agree; else the least value is
    how far they are from their mean.

    scales: one number per teacher, in the order of the inputs: its temperature is `temperature` times that number, on
        both sides. With `temperature: 1` they are the temperatures.
    """

    name = "aver"
    confidence = "code"
    inputs = {"student": "student.logits", "teacher": kdx.Many("*.logits")}
    knobs = {"temperature": kdx.Knob(4.0, above=0.0)}

    @dataclass(frozen=True)
    class Config:
        scales: list[float] | None = None

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        count = kdx.check_same_classes(self.name, given)
        self.scales = [1.0] * count if config.scales is None else list(config.scales)
        if len(self.scales) != count:
            raise kdx.PlanError(f"scales: found {len(self.scales)} of them for {count} teachers, expected one for each")
        if not all(0 < scale < math.inf for scale in self.scales):
            raise kdx.ConfigError(f"scales: found {self.scales}, expected numbers above 0")

    def forward(self, student: Tensor, teacher: list[Tensor], temperature: Tensor) -> Tensor:
        return kdx.soft_divergences(student, teacher, [temperature * scale for scale in self.scales]).mean(1)


def least_norm_weights(gradients: Tensor, limit: float) -> Tensor:
    """The weights [M] that make `|sum_k a_k g_k|` least, with `0 <= a_k <= limit` and sum 1, from gradients [M, D].

    A primal-dual interior-point method with a fixed number of steps, so that nothing waits for the device; in float64
    it meets the exact solution to 1e-9 where that is unique. Of several solutions it gives
    about the most even one.
    """
    count = len(gradients)
    weights = torch.full((count,), 1 / count, dtype=gradients.dtype, device=gradients.device)
    if limit * count <= 1 + 1e-6:
        return weights
    tiny = torch.finfo(gradients.dtype).tiny
    unit = gradients / gradients.abs().amax().clamp(min=tiny)  # the weights do not depend on the scale
    gram = unit @ unit.T
    gram = gram / gram.diagonal().mean().clamp(min=tiny)
    eps = torch.finfo(gradients.dtype).eps
    gram = gram + torch.diag(torch.full_like(weights, eps**0.75))  # of several solutions, the most even one
    ones, room = torch.ones_like(weights), limit - weights
    price, low, high = torch.zeros_like(weights[0]), ones, ones
    for _ in range(ROUNDS):
        gap = (PULL * (weights @ low + room @ high) / (2 * count)).clamp(min=eps**1.5)
        slope = price - gram @ weights + gap / weights - gap / room
        system = gram + torch.diag(low / weights + high / room)
        along, across = torch.linalg.solve_ex(system, torch.stack([slope, ones], 1))[0].unbind(1)
        rise = -along.sum() / across.sum()
        step = along + rise * across
        low_step = gap / weights - low - low / weights * step
        high_step = gap / room - high + high / room * step
        pairs = torch.cat([-step / weights, step / room, -low_step / low, -high_step / high])
        length = 1 / (pairs.amax() / 0.99).clamp(min=1)  # short of every bound
        weights, room, price = weights + length * step, room - length * step, price + length * rise
        low, high = low + length * low_step, high + length * high_step
    return weights / weights.sum()


def agreement_weights(
    student: Tensor, teachers: Sequence[Tensor], temperature: Tensor, limit: float, *, normalise: bool = False
) -> Tensor:
    """The weights [M] by which the gradients of M divergences best agree, from logits [B, K].

    The gradients are `tau (softmax(z_s / tau) - softmax(z_k / tau))`, averaged over the batch.
    """
    with torch.no_grad():
        tau = kdx.per_sample(temperature, student)
        ours = (student / tau).softmax(1)
        found = torch.stack([(tau * (ours - (z / tau).softmax(1))).mean(0) for z in teachers])
        return bounded_weights(found, limit, normalise=normalise)


def bounded_weights(gradients: Tensor, limit: float, *, normalise: bool) -> Tensor:
    """`least_norm_weights` of gradients [M, D] in float64 where there is one, and in their own precision again.

    With `normalise`, of gradients of length 1; the weights are then divided by the lengths and scaled to sum 1.
    """
    found = gradients if gradients.device.type == "mps" else gradients.double()
    if not normalise:
        return least_norm_weights(found, limit).to(gradients.dtype)
    norms: Tensor = torch.linalg.vector_norm(found, dim=1).clamp(min=1e-12)
    weights = least_norm_weights(found / norms.unsqueeze(1), limit) / norms
    return (weights / weights.sum()).to(gradients.dtype)


class AgreeingDivergences(kdx.Loss):
    """Soft targets of several teachers, weighted so that their gradients agree (Du et al.: AE-KD, NeurIPS 2020), [B].

        sum_k a_k KL_k,  a = argmin |sum_k a_k g_k|  with  sum a = 1,  0 <= a_k <= limit

    `g_k` [K] is the gradient of the divergence from teacher k for the student's logits, averaged over the batch; the
    weights are constants for the gradient. 0 for a student that agrees with every teacher that has a weight. Published
    weight: 0.9, at temperature 4.

    The rule looks for a descent that serves all teachers. It is no judgement of their quality: of two directions it
    prefers the shorter one, so a teacher that contradicts the others counts less only where it pulls harder than they
    do, as when the student is near to them.

    limit: the largest weight. One over the number of teachers makes all equal; below that there is no solution.
    normalise: whether the gradients are brought to length 1 first; the weights are then divided by the lengths and
        scaled to sum 1, after which one may exceed `limit`.

    The authors find the weights with a support-vector solver; here they are solved for on the device, to rounding.
    With `accumulate`, each micro-batch has its own weights, and so has each process. The same for features is
    `ae_kd_hints`.
    """

    name = "ae_kd"
    confidence = "values"
    inputs = {"student": "student.logits", "teacher": kdx.Many("*.logits")}
    knobs = {"temperature": kdx.Knob(4.0, above=0.0)}

    @dataclass(frozen=True)
    class Config:
        limit: float = 0.6
        normalise: bool = False

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        _check_limit(config.limit, kdx.check_same_classes(self.name, given))

    def forward(self, student: Tensor, teacher: list[Tensor], temperature: Tensor) -> Tensor:
        config = self.config
        weights = agreement_weights(student, teacher, temperature, config.limit, normalise=config.normalise)
        return (kdx.soft_divergences(student, teacher, temperature) * weights).sum(1)


class AgreeingHints(kdx.Loss):
    """Hints of several teachers, weighted so that their gradients agree (Du et al.: AE-KD, NeurIPS 2020), [B].

        sum_k a_k MSE(r_k(F_s), F_k),  a = argmin |sum_k a_k g_k|  with  sum a = 1,  0 <= a_k <= limit

    As `ae_kd`, for the last maps [B, C, H, W]: `r_k` is a 1x1 convolution and batch norm for each of M teachers, the
    squares are averaged over all elements of a sample, and `g_k` is the gradient of their mean over the batch at the
    student's map. The larger of two maps is average-pooled to the smaller one. The weights are constants for the
    gradient. 0 where each regressed map is its teacher's.

    limit, normalise: as in `ae_kd`. Where no gradient is asked for, as in a validation, the weights are equal.

    The description leaves the form of the hint open; this is that of `fitnet_mkd`. Each update goes backward through
    the M regressors once more.
    """

    name = "ae_kd_hints"
    confidence = "paper"
    inputs = {"student": "student.depth_100", "teacher": kdx.Many("*.depth_100")}

    @dataclass(frozen=True)
    class Config:
        limit: float = 0.6
        normalise: bool = False

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        ours, theirs = given.shape("student"), given.shapes["teacher"]
        if any(len(shape) != 3 for shape in (ours, *theirs)):
            found = ", ".join(str(list(shape)) for shape in (ours, *theirs))
            raise kdx.PlanError(f"{self.name} regresses maps [C, H, W], but was given {found}; tap a stage, as in "
                                "student.depth_50, which is a map also for transformers")  # fmt: skip
        _check_limit(config.limit, len(theirs))
        self.regressors = nn.ModuleList(
            nn.Sequential(nn.Conv2d(ours[0], shape[0], 1, bias=False), nn.BatchNorm2d(shape[0])) for shape in theirs
        )

    def forward(self, student: Tensor, teacher: list[Tensor]) -> Tensor:
        pairs = [kdx.pool_to_smaller(student, maps.detach()) for maps in teacher]
        regressed = [layer(ours) for layer, (ours, _) in zip(self.regressors, pairs, strict=True)]
        met = [kdx.pool_to_smaller(ours, maps.detach()) for ours, maps in zip(regressed, teacher, strict=True)]
        gaps = torch.stack([kdx.squared_distance(ours, theirs) for ours, theirs in met], 1)
        return (gaps * self._weights(gaps, student)).sum(1)

    def _weights(self, gaps: Tensor, student: Tensor) -> Tensor:
        if not (gaps.requires_grad and student.requires_grad):
            return torch.full_like(gaps[0], 1 / gaps.shape[1])
        means = gaps.mean(0).unbind()
        slopes = [torch.autograd.grad(mean, student, retain_graph=True)[0].flatten() for mean in means]
        return bounded_weights(torch.stack(slopes), self.config.limit, normalise=self.config.normalise)


def _check_limit(limit: float, count: int) -> None:
    if not 1 / count - 1e-6 <= limit <= 1:
        raise kdx.ConfigError(
            f"limit: found {limit}, expected a weight from {1 / count:.3g} to 1, for {count} teachers"
        )


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [EqualDivergences, AgreeingDivergences, AgreeingHints]
