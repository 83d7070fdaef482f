"""Targets that make one distribution out of several teachers.

All take logits [B, K], one tensor per teacher, with the same classes. They mix at a temperature `tau`:
`tau * log sum_k w_k softmax(z_k / tau)`, so that the loss `kd` at the same temperature has the gradient of the weighted
mean of the divergences to each teacher. At `tau = 1` they mix plain probabilities. With the option `temperatures`, one
number per teacher in the order of the inputs, each teacher's logits are divided by its number before all else, as
where some teachers are far surer than they are right. A teacher that lacks what it reads of a sample is left out there,
and the others share its weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import kdx


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of `softmax(logits)` along the last axis."""
    log_p = torch.log_softmax(logits, dim=-1)
    return -(log_p.exp() * log_p).sum(-1)


class Mean(kdx.Target):
    """The mean of several teachers, as logits [B, K].

    of: `probabilities` mixes the distributions at `temperature`; `logits` averages the logits themselves, which is a
        geometric mean of the distributions and the same at every temperature.
    weights: one fixed weight per teacher, in the order of the inputs, scaled to sum 1; equal ones by default.
    """

    name = "mean"
    inputs = {"logits": kdx.Many("*.logits")}
    gaps = "logits"
    knobs = {"temperature": kdx.Knob(1.0, above=0.0)}
    outputs = ("logits",)

    @dataclass(frozen=True)
    class Config:
        of: str = "probabilities"
        weights: list[float] | None = None
        temperatures: list[float] | None = None

    config: Config
    log_weights: Tensor

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        if config.of not in ("probabilities", "logits"):
            raise kdx.ConfigError(f"of: found {config.of!r}, expected probabilities or logits")
        count = kdx.check_teachers(given)
        weights = [1.0] * count if config.weights is None else list(config.weights)
        if len(weights) != count:
            raise kdx.PlanError(f"weights: found {len(weights)} of them for {count} teachers, expected one for each")
        if not all(0 <= weight < math.inf for weight in weights) or not sum(weights) > 0:
            raise kdx.ConfigError(f"weights: found {weights}, expected numbers from 0 that are not all 0")
        self.weights = [weight / sum(weights) for weight in weights]
        least = torch.finfo(torch.float32).tiny  # so that a teacher without weight speaks where no other does
        self.register_buffer("log_weights", torch.tensor(self.weights).clamp(min=least).log(), persistent=False)
        _check_temperatures(config.temperatures, count)

    def forward(self, logits: list[Tensor], temperature: Tensor, present: Tensor | None = None) -> dict[str, Tensor]:
        logits = _softened(logits, self.config.temperatures)
        if present is not None:
            return self._of_present(logits, temperature, present)
        used = [(z, weight) for z, weight in zip(logits, self.weights, strict=True) if weight > 0]
        if self.config.of == "logits":
            return {"logits": torch.stack([z * weight for z, weight in used]).sum(0)}
        return {"logits": kdx.log_mixture([z for z, _ in used], [math.log(weight) for _, weight in used], temperature)}

    def _of_present(self, logits: list[Tensor], temperature: Tensor, present: Tensor) -> dict[str, Tensor]:
        fixed = self.log_weights.to(logits[0].dtype).expand(len(present), -1)
        log_weights = kdx.among_present(fixed, present)
        if self.config.of == "logits":
            return {"logits": (torch.stack(logits, 1) * log_weights.exp().unsqueeze(2)).sum(1)}
        return {"logits": kdx.log_mixture(logits, log_weights.unbind(1), temperature)}


def log_confidence_weights(logits: Sequence[Tensor], sharpness: Tensor) -> Tensor:
    """The logarithms of per-sample weights [B, M] of M teachers, from M logits [B, K]; the weights sum to 1.

    The confidence of a teacher is `c = 1 - H(softmax(z)) / log K`: 1 for a sure answer, 0 for an even one. The weights
    are `softmax(sharpness * c)` over the teachers.
    """
    confidence = 1 - entropy(torch.stack(list(logits), 1)) / math.log(logits[0].shape[1])
    return torch.log_softmax(confidence * kdx.per_sample(sharpness, confidence), dim=1)


class ConfidenceMean(kdx.Target):
    """The mixture of several teachers in which, sample by sample, the surer one counts more. A rule of kdx itself.

    Gives `logits` [B, K] and the `weights` [B, M] in the order of the inputs. It reads no labels. `sharpness: 0` is the
    plain mean, a high one follows the surest teacher alone.
    """

    name = "confidence_mean"
    inputs = {"logits": kdx.Many("*.logits")}
    gaps = "logits"
    knobs = {"sharpness": kdx.Knob(4.0, at_least=0.0), "temperature": kdx.Knob(1.0, above=0.0)}
    outputs = ("logits", "weights")

    @dataclass(frozen=True)
    class Config:
        temperatures: list[float] | None = None

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        _check_temperatures(config.temperatures, kdx.check_teachers(given))

    def forward(
        self, logits: list[Tensor], sharpness: Tensor, temperature: Tensor, present: Tensor | None = None
    ) -> dict[str, Tensor]:
        logits = _softened(logits, self.config.temperatures)
        log_weights = kdx.among_present(log_confidence_weights(logits, sharpness), present)
        return {"logits": kdx.log_mixture(logits, log_weights.unbind(1), temperature), "weights": log_weights.exp()}


def entropy_weights(logits: Sequence[Tensor], present: Tensor | None = None) -> Tensor:
    """Per-sample weights [B, M] of M >= 2 teachers, from M logits [B, K]: `(1 - H_k / sum_j H_j) / (M - 1)`.

    They sum to 1, and are equal where all entropies are 0. With `present`, bool [B, M], they are those of the teachers
    that a sample has: one alone has the weight 1, others 0.
    """
    doubt = entropy(torch.stack(list(logits), 1)) + 1e-12
    if present is None:
        return (1 - doubt / doubt.sum(1, keepdim=True)) / (len(logits) - 1)
    counted = present | ~present.any(1, keepdim=True)
    count, share = counted.sum(1, keepdim=True), torch.where(counted, doubt, 0.0)
    found = (1 - share / share.sum(1, keepdim=True)) / (count - 1).clamp(min=1)
    return torch.where(counted, torch.where(count > 1, found, 1.0), 0.0)


class EntropyMean(kdx.Target):
    """The mixture of two or more teachers with weights from their entropies (Kwon et al., ICASSP 2020).

    Gives `logits` [B, K] and the `weights` [B, M]. The loss `kd` on these logits at the same temperature has, up to
    the factor (M - 1) / M, the gradient of the published sum of divergences, whose weights sum to M - 1.
    """

    name = "ebkd"
    confidence = "code"
    inputs = {"logits": kdx.Many("*.logits")}
    gaps = "logits"
    knobs = {"temperature": kdx.Knob(4.0, above=0.0)}
    outputs = ("logits", "weights")

    @dataclass(frozen=True)
    class Config:
        temperatures: list[float] | None = None

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        count = kdx.check_teachers(given)
        if count < 2:
            raise kdx.PlanError("ebkd weighs teachers against each other, but it was given one; expected two or more")
        _check_temperatures(config.temperatures, count)

    def forward(self, logits: list[Tensor], temperature: Tensor, present: Tensor | None = None) -> dict[str, Tensor]:
        logits = _softened(logits, self.config.temperatures)
        weights = entropy_weights(logits, present)
        log_weights = weights.clamp(min=1e-12).log()  # a weight of 0 would give a gradient of 0 * inf
        if present is not None:
            log_weights = kdx.among_present(log_weights, present)
        return {"logits": kdx.log_mixture(logits, log_weights.unbind(1), temperature), "weights": weights}


def _check_temperatures(temperatures: list[float] | None, count: int) -> None:
    if temperatures is None:
        return
    if len(temperatures) != count:
        raise kdx.PlanError(
            f"temperatures: found {len(temperatures)} of them for {count} teachers, expected one for each"
        )
    if not all(0 < temperature < math.inf for temperature in temperatures):
        raise kdx.ConfigError(f"temperatures: found {list(temperatures)}, expected numbers above 0")


def _softened(logits: Sequence[Tensor], temperatures: Sequence[float] | None) -> list[Tensor]:
    """Each teacher's logits over its temperature, at least float32: in half precision mixtures are too coarse."""
    precise = [kdx.precise(z) for z in logits]
    if temperatures is None:
        return precise
    return [z / temperature for z, temperature in zip(precise, temperatures, strict=True)]


@kdx.hookimpl
def kdx_targets() -> list[type[kdx.Target]]:
    return [Mean, ConfidenceMean, EntropyMean]
