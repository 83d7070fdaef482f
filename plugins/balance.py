"""Updaters that weigh losses while training, or settle where their gradients disagree.

A loss counts here as its term times the weight of the config, which so stays the starting point. With one loss there is
nothing to settle, and each of these acts as `plain`. The `total` of reports is the sum before any balance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import kdx

FLOOR = 0.01
"""No weight of `gradnorm` falls below it before all are brought to their sum, or its loss could never come back."""
Gradients = list[Tensor | None]


def uncertain_sum(parts: Tensor, s: Tensor) -> Tensor:
    """`sum_i exp(-s_i) L_i + s_i`, 0-d, from the losses [N] and the logarithms of their variances [N]."""
    return ((-s).exp() * parts + s).sum()


class UncertaintyWeighting(kdx.Updater):
    """A trained variance for each loss (Kendall, Gal, Cipolla: Multi-task learning using uncertainty, CVPR 2018).

    The student follows `sum_i exp(-s_i) L_i + s_i`; the `s_i`, 0 at first, are trained with it, by the optimizer and
    the learning rate of the run. This is the formula for regressions, times two; the classifications of the paper have
    `s_i / 2`. Losses must be positive: the weight of one that stays at 0 or below grows without end.
    """

    name = "uncertainty_weighting"

    def __init__(self, config: UncertaintyWeighting.Config, given: kdx.Given | None = None) -> None:
        super().__init__(config, given)
        count = len(self.given.losses)
        self.s = nn.Parameter(torch.zeros(count), requires_grad=count > 1)
        self._used = torch.ones(count)

    def backward(self, losses: kdx.Losses, share: float, engine: kdx.Engine) -> None:
        self._used = (-self.s.detach()).exp()
        engine.backward(uncertain_sum(torch.stack([*losses.parts.values()]), self.s) * share)

    def step(self, engine: kdx.Engine) -> None:
        engine.update()

    def shown(self) -> Mapping[str, Tensor]:
        return as_weights(self.given, self._used)


def average_weights(last: Tensor, before: Tensor, temperature: float) -> Tensor:
    """`N softmax_i((L_i(e-1) / L_i(e-2)) / T)`, [N], from the means of two epochs [N].

    A ratio that is no number, as that of a loss that was 0 twice, counts as 1.
    """
    ratio = last / before
    return len(last) * (torch.where(ratio.isfinite(), ratio, 1.0) / temperature).softmax(0)


class DynamicWeightAverage(kdx.Updater):
    """Weights by how fast each loss fell of late (DWA; Liu, Johns, Davison: End-to-end multi-task learning, CVPR 2019).

    `w_i = N softmax_i(r_i / temperature)`, with `r_i` the ratio of the means of the last two epochs of the unweighted
    term, so that a schedule of its weight is not taken for progress. All are 1 in the first two epochs.
    """

    name = "dwa"

    @dataclass(frozen=True)
    class Config:
        temperature: float = 2.0

    config: Config
    factors: Tensor
    seen: Tensor
    last: Tensor

    def __init__(self, config: Config, given: kdx.Given | None = None) -> None:
        super().__init__(config, given)
        if not 0 < config.temperature < math.inf:
            found = f"found {config.temperature}, expected a number above 0"
            raise kdx.ConfigError(f"train.updater.temperature: {found}")
        count = len(self.given.losses)
        self.register_buffer("factors", torch.ones(count))
        self.register_buffer("seen", torch.zeros(count))
        self.register_buffer("last", torch.zeros(count))
        self._used = self.factors

    def backward(self, losses: kdx.Losses, share: float, engine: kdx.Engine) -> None:
        self.seen += means(losses) * share
        self._used = self.factors
        engine.backward((self.factors * torch.stack([*losses.parts.values()])).sum() * share)

    def step(self, engine: kdx.Engine) -> None:
        engine.update()

    def after_update(self, clock: kdx.Clock) -> None:
        epoch, rest = divmod(clock.step, clock.steps_per_epoch)
        if rest == 0:
            mean = self.seen / clock.steps_per_epoch
            if epoch > 1:
                self.factors = average_weights(mean, self.last, self.config.temperature)
            self.last, self.seen = mean, torch.zeros_like(mean)

    def shown(self) -> Mapping[str, Tensor]:
        return as_weights(self.given, self._used)


def paced_weights(weights: Tensor, norms: Tensor, progress: Tensor, *, alpha: float, rate: float) -> Tensor:
    """The weights [N] after one step down `sum_i |w_i n_i - G r_i^alpha| / G`, brought to the sum N.

    `norms` are those of the unweighted gradients, `progress` is `L_i / L_i(0)`, and `r_i` that over its mean; `G` is
    the mean of `w_i n_i`, and constant, as is the second summand. Where anything is not finite, nothing changes.
    """
    size = weights * norms
    mean = size.mean()
    wanted = mean * (progress / progress.mean()) ** alpha
    moved = (weights - rate * norms / mean * (size - wanted).sign()).clamp(min=FLOOR)
    moved = moved * len(moved) / moved.sum()
    return torch.where(moved.isfinite().all(), moved, weights)


class GradNorm(kdx.Updater):
    """Weights that keep gradients in pace (Chen et al.: GradNorm, ICML 2018).

    After each update a step of size `rate` brings the norm of each weighted gradient nearer to their mean times
    `r_i ** alpha`, with `r_i` the part of its first value at which the unweighted term still stands, over the mean of
    these: slow losses get more. The weights keep the sum N.

    shared: the part of the student whose weights the norms are of, as `layer4`, which must lie behind every loss; the
        last shared layer in the paper. By default all weights of the student that every loss reaches, which costs a
        backward pass for each loss.

    Departures: the step is of the sum over the mean norm, so that its size does not depend on that of gradients, where
    the paper leaves the rule of the step open; weights stay positive.
    """

    name = "gradnorm"
    eager = True

    @dataclass(frozen=True)
    class Config:
        alpha: float = 1.5
        rate: float = 0.025
        shared: str | None = None

    config: Config
    factors: Tensor
    first: Tensor

    def __init__(self, config: Config, given: kdx.Given | None = None) -> None:
        super().__init__(config, given)
        if not 0 <= config.alpha < math.inf:
            raise kdx.ConfigError(f"train.updater.alpha: found {config.alpha}, expected a number of at least 0")
        if not 0 < config.rate < 1:
            raise kdx.ConfigError(f"train.updater.rate: found {config.rate}, expected a number between 0 and 1")
        count = len(self.given.losses)
        self.register_buffer("factors", torch.ones(count))
        self.register_buffer("first", torch.zeros(count))
        self._used = self.factors
        self._weights: list[nn.Parameter] = []
        self._sums: list[Gradients] = []
        self._terms = torch.zeros(count)

    def prepare(self, engine: kdx.Engine) -> None:
        owner = "student" if self.config.shared is None else f"student.{self.config.shared}"
        self._weights = [*engine.weights(owner).values()]
        if not self._weights:
            raise kdx.ConfigError(f"train.updater.shared: found {self.config.shared!r}, which trains no weights")
        self._terms = torch.zeros_like(self.factors)

    def backward(self, losses: kdx.Losses, share: float, engine: kdx.Engine) -> None:
        parts = [*losses.parts.values()]
        if len(parts) > 1:
            found = [engine.gradients(part * share, self._weights) for part in parts]
            self._sums = [added(*pair) for pair in zip(self._sums, found, strict=True)] if self._sums else found
            self._terms = self._terms + means(losses) * share
        engine.backward((self.factors * torch.stack(parts)).sum() * share)

    def step(self, engine: kdx.Engine) -> None:
        self._used = self.factors
        if self._sums:
            is_known = self.first.isfinite() & (self.first != 0)
            self.first = torch.where(is_known, self.first, self._terms)
            self.factors = paced_weights(
                self.factors, self._norms(), self._terms / self.first, alpha=self.config.alpha, rate=self.config.rate
            )
            self._sums, self._terms = [], torch.zeros_like(self._terms)
        engine.update()

    def _norms(self) -> Tensor:
        """The norm of each loss's gradient over the weights that all losses reach, [N]."""
        columns = [column for column in zip(*self._sums, strict=True) if all(found is not None for found in column)]
        if not columns:
            where, losses = self.config.shared or "the student", ", ".join(self.given.losses)
            raise kdx.PlanError(f"train.updater.shared: no weight of {where} is reached by all of {losses}")
        return torch.stack([torch.nn.utils.get_total_norm(row) for row in zip(*columns, strict=True)])

    def shown(self) -> Mapping[str, Tensor]:
        return as_weights(self.given, self._used)


def without_conflicts(gradients: Tensor, reached: Tensor, orders: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The sum of the gradients [N, P] without what they have against each other, [P], and the part of pairs, 0-d.

    Gradient `i` loses its projection on `j` wherever their product is below 0, for each `j` of `orders[i]` in turn,
    which are indices on the CPU, so that nothing waits for the device. `reached` [N, P] tells which weights a loss
    reaches: only those that both reach count between two of them.
    """
    merged, conflicts = torch.zeros_like(gradients[0]), gradients.new_zeros(())
    for gradient, mask, order in zip(gradients, reached, orders, strict=True):
        for other in order:
            against = gradients[other] * mask
            product = gradient @ against
            conflicts = conflicts + (product < 0)
            size = (against @ against).clamp(min=torch.finfo(against.dtype).tiny)
            gradient = gradient - product.clamp(max=0) / size * against
        merged = merged + gradient
    return merged, conflicts / max(1, sum(map(len, orders)))


class PCGrad(kdx.Updater):
    """Gradients without conflicts (Yu et al.: Gradient surgery for multi-task learning, NeurIPS 2020).

    Where the gradients of two losses have a product below 0, each loses its projection on the other, in an order drawn
    for each update; the sum of what is left is followed. The weights of two losses that only one of them reaches, such
    as those of an aligner, do not count between them. Micro-batches are added up first. Reports show the part of the
    pairs that were in conflict. Holds one gradient of all weights for each loss.
    """

    name = "pcgrad"
    eager = True

    def __init__(self, config: PCGrad.Config, given: kdx.Given | None = None) -> None:
        super().__init__(config, given)
        self._sums: list[Gradients] = []
        self._conflicts: dict[str, Tensor] = {}

    def backward(self, losses: kdx.Losses, share: float, engine: kdx.Engine) -> None:
        parts = [*losses.parts.values()]
        if len(parts) == 1:
            engine.backward(losses.total * share)
            return
        found = [engine.gradients(part * share, retain=part is not parts[-1]) for part in parts]
        self._sums = [added(*pair) for pair in zip(self._sums, found, strict=True)] if self._sums else found

    def step(self, engine: kdx.Engine) -> None:
        if self._sums:
            weights = [*engine.parameters()]
            rows = [_flat(found, weights) for found in self._sums]
            merged, conflicts = without_conflicts(
                torch.stack([values for values, _ in rows]), torch.stack([mask for _, mask in rows]), self._orders()
            )
            pieces = torch.split(merged, [weight.numel() for weight in weights])
            reached = [any(found[place] is not None for found in self._sums) for place in range(len(weights))]
            engine.add(
                [
                    piece.reshape(weight.shape) if is_reached else None
                    for piece, weight, is_reached in zip(pieces, weights, reached, strict=True)
                ]
            )
            self._sums, self._conflicts = [], {"train.updater.conflicts": conflicts}
        engine.update()

    def _orders(self) -> list[Tensor]:
        """For each loss the others in a random order, on the CPU."""
        count = len(self._sums)
        orders = [torch.randperm(count - 1, generator=self.given.generator) for _ in range(count)]
        return [order + (order >= own) for own, order in enumerate(orders)]

    def shown(self) -> Mapping[str, Tensor]:
        return self._conflicts


class DistillationOrientedMomentum(kdx.Updater):
    """Two momenta, the longer one for distillation (DOT; Zhao, Song, Liang, ICCV 2023).

    With `g_c` and `g_d` the gradients of the task and of distillation, `v_c <- (m - delta) v_c + g_c + decay * p` and
    `v_d <- (m + delta) v_d + g_d`, and the step goes along `v_c + v_d`. It needs `train.optimizer` to be sgd, whose
    momentum is `m`, whose weight decay is `decay`, and whose buffer holds the sum of both; their difference is kept
    here. Weights that only one of the two reaches keep the momentum `m`. With `delta: 0` this is sgd on the sum.

    task: the losses of the task; by default those that are `cross_entropy`. All others are of distillation.
    delta: published are 0.075 for CIFAR-100 and 0.09 for ImageNet.

    `train.clip` bounds what sgd is given: both gradients, and `delta` times the difference of the momenta.
    """

    name = "dot"
    eager = True

    @dataclass(frozen=True)
    class Config:
        delta: float = 0.075
        task: list[str] = field(default_factory=list)

    config: Config

    def __init__(self, config: Config, given: kdx.Given | None = None) -> None:
        super().__init__(config, given)
        losses = self.given.losses
        for name in config.task:
            if name not in losses:
                raise kdx.ConfigError(f"train.updater.task: found {name!r}, expected some of {', '.join(losses)}")
        self._task = config.task or [name for name, use in losses.items() if use == "cross_entropy"]
        if not self._task:
            found = f"none of {', '.join(losses) or 'no losses'} is cross_entropy"
            raise kdx.ConfigError(f"train.updater.task: {found}; say which losses are of the task")
        self._sums: tuple[Gradients, Gradients] | None = None

    def prepare(self, engine: kdx.Engine) -> None:
        optimizer, delta = engine.optimizer, self.config.delta
        if type(optimizer) is not torch.optim.SGD:
            found = type(optimizer).__name__
            raise kdx.ConfigError(f"train.optimizer: found {found}; dot needs `use: sgd` with a momentum")
        for group in optimizer.param_groups:
            if group["nesterov"] or group["dampening"]:
                raise kdx.ConfigError("train.optimizer: dot needs sgd without nesterov and dampening")
            if not 0 <= delta <= group["momentum"] or not group["momentum"] + delta < 1:
                raise kdx.ConfigError(
                    f"train.updater.delta: found {delta} with train.optimizer.momentum {group['momentum']}; expected "
                    f"0 or more, at most the momentum, and both together below 1"
                )
        self._decay = {weight: group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
        self._momentum = {weight: group["momentum"] for group in optimizer.param_groups for weight in group["params"]}
        for place, weight in enumerate(engine.parameters()):
            self.register_buffer(f"difference_{place}", torch.zeros_like(weight, requires_grad=False))

    def backward(self, losses: kdx.Losses, share: float, engine: kdx.Engine) -> None:
        task = [part for name, part in losses.parts.items() if name in self._task]
        rest = [part for name, part in losses.parts.items() if name not in self._task]
        if not rest:
            engine.backward(losses.total * share)
            return
        found = (
            engine.gradients(torch.stack(task).sum() * share),
            engine.gradients(torch.stack(rest).sum() * share, retain=False),
        )
        self._sums = found if self._sums is None else (added(self._sums[0], found[0]), added(self._sums[1], found[1]))

    @torch.no_grad()
    def step(self, engine: kdx.Engine) -> None:
        if self._sums is not None:
            engine.add(self._steered(engine, *self._sums))
            self._sums = None
        engine.update()

    def _steered(self, engine: kdx.Engine, task: Gradients, rest: Gradients) -> Gradients:
        """What sgd must be given for its buffer to be the sum of both momenta; the difference is brought up to date."""
        found = [gradient for gradient in (*task, *rest) if gradient is not None]
        is_finite = torch.nn.utils.get_total_norm(found).isfinite()  # else a scaler skips the update
        delta, steered = self.config.delta, []
        for place, (weight, c, d) in enumerate(zip(engine.parameters(), task, rest, strict=True)):
            if c is None or d is None:
                steered.append(d if c is None else c)
                continue
            difference = self.get_buffer(f"difference_{place}")
            both = engine.optimizer.state.get(weight, {}).get("momentum_buffer")
            steered.append(c + d + delta * difference)
            moved = self._momentum[weight] * difference + d - c - self._decay[weight] * weight
            moved = moved if both is None else moved + delta * both
            difference.copy_(torch.where(is_finite, moved, difference))
        return steered


def means(losses: kdx.Losses) -> Tensor:
    """The unweighted terms as means over the batch, [N], in the order of the parts."""
    return torch.stack([losses.terms[name].detach().mean() for name in losses.parts])


def as_weights(given: kdx.Given, factors: Tensor) -> dict[str, Tensor]:
    """A factor for each loss [N] by the path of its weight; nothing where there is one loss."""
    paths = [f"losses.{name}.weight" for name in given.losses]
    return dict(zip(paths, factors.unbind(), strict=True)) if len(paths) > 1 else {}


def added(one: Gradients, other: Gradients) -> Gradients:
    """Two lists of gradients added weight by weight; None is a weight that is not reached."""
    return [b if a is None else a if b is None else a + b for a, b in zip(one, other, strict=True)]


def _flat(gradients: Gradients, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Gradients as one vector [P], 0 where there is none, and which of its numbers are of weights that are reached."""
    values, masks = [], []
    for gradient, weight in zip(gradients, weights, strict=True):
        values.append(torch.zeros_like(weight).flatten() if gradient is None else gradient.flatten())
        masks.append(torch.full((weight.numel(),), gradient is not None, device=weight.device))
    return torch.cat(values).detach(), torch.cat(masks)


@kdx.hookimpl
def kdx_updaters() -> list[type[kdx.Updater]]:
    return [UncertaintyWeighting, DynamicWeightAverage, GradNorm, PCGrad, DistillationOrientedMomentum]
