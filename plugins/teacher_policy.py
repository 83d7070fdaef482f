"""Weights of teachers from a policy that learns from rewards, for the losses `weighted_kd` and `weighted_hints`.

A policy is a small net of its own: the student's optimizer does not see it. It gathers states and rewards during the
updates and learns from them in `after_update`. Its weights, its memory and its generator are saved, so that a resumed
run goes on exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdx

REWARDS = ("ce", "ce_kd")
HIDDEN = 128
LEAST = 1e-6


class Memory(nn.Module):
    """The latest samples that a policy has met: a tensor [size, width] for each of `widths`, as buffers."""

    filled: Tensor

    def __init__(self, size: int, **widths: int) -> None:
        super().__init__()
        self.size = size
        self.names = tuple(widths)
        for name, width in widths.items():
            self.register_buffer(name, torch.zeros(size, width))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    def add(self, **rows: Tensor) -> None:
        """Take in a row [width] for each of some samples; the oldest make place for them."""
        count = len(rows[self.names[0]])
        kept = min(count, self.size)
        at = (self.filled + torch.arange(count - kept, count, device=self.filled.device)) % self.size
        for name in self.names:
            memory = self.get_buffer(name)
            memory[at] = rows[name].detach()[count - kept :].to(memory.dtype)
        self.filled += count

    def take(self, batch: int) -> list[dict[str, Tensor]]:
        """All that is held, in batches and in the order in which it came; the memory is empty afterwards."""
        met = int(self.filled)  # waits for the device, but seldom
        at = torch.arange(max(0, met - self.size), met, device=self.filled.device) % self.size
        self.filled.zero_()
        return [
            {name: self.get_buffer(name)[part] for name in self.names} for part in torch.split(at, batch) if len(part)
        ]


def learn(policy: nn.Module, states: Tensor, objective: Callable[[Tensor], Tensor], lr: float) -> None:
    """One step of gradient descent for a policy on `objective(policy(states))`, without the student's optimizer."""
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in policy.named_parameters()}
    with torch.enable_grad():
        value = objective(torch.func.functional_call(policy, weights, (states,)))
        gradients = torch.autograd.grad(value, [*weights.values()])
    with torch.no_grad():
        for weight, gradient in zip(policy.parameters(), gradients, strict=True):
            weight.sub_(lr * gradient)


class WeightPolicy(nn.Module):
    """States [B, S] -> the logarithms of M weights for logits and M for features, each sums to 1, [B, 2, M]."""

    def __init__(self, width: int, teachers: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, HIDDEN, bias=False)
        self.heads = nn.ModuleList(nn.Linear(HIDDEN, teachers) for _ in range(2))
        self.requires_grad_(False)

    def forward(self, states: Tensor) -> Tensor:
        hidden = self.hidden(states).relu()
        return torch.stack([torch.log_softmax(head(hidden), dim=1) for head in self.heads], 1)


class Mixture(nn.Module):
    """States [B, S] -> the logarithms of the weights that a policy and two rules give together, [B, 2, M].

    `widths` are the columns of each teacher in a state, `[cos, KL, CE, ...]`. The rules are `confidence_weights` and
    the softmax over the teachers of KL, for features of cos. The factors of the three are the softmax of `odds`.
    """

    starts: Tensor

    def __init__(self, policy: WeightPolicy, widths: Sequence[int]) -> None:
        super().__init__()
        self.policy = policy
        self.odds = nn.Parameter(torch.zeros(2, 3), requires_grad=False)
        ends = torch.tensor(widths).cumsum(0)
        self.register_buffer("starts", torch.cat([ends.new_zeros(1), ends[:-1]]), persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        cosines, gaps, errors = (states[:, self.starts + k] for k in range(3))
        own = torch.stack([gaps.softmax(1), cosines.softmax(1)], 1)
        rules = torch.stack(
            [self.policy(states).exp(), kdx.confidence_weights(errors).unsqueeze(1).expand_as(own), own], 1
        )
        return torch.einsum("ht,bthm->bhm", self.odds.softmax(1), rules).log()


def standardised_rewards(losses: Tensor, is_known: Tensor) -> Tensor:
    """Minus the losses [B], standardised over the samples that are known and clamped to 0..1; 0 for the others."""
    count = is_known.sum().clamp(min=1)
    rewards = torch.where(is_known, -losses, 0.0)
    centred = torch.where(is_known, rewards - rewards.sum() / count, 0.0)
    deviation = (centred.square().sum() / (count - 1).clamp(min=1)).sqrt()
    return (centred / (deviation + LEAST)).clamp(0, 1)


def policy_loss(log_weights: Tensor, rewards: Tensor) -> Tensor:
    """`-R log w`, averaged over samples and teachers and added up over both heads, 0-d.

    It is the cross-entropy of the weights with 1, weighted by the rewards [B]; `log_weights` is [B, 2, M].
    """
    return -(rewards[:, None, None] * log_weights).mean((0, 2)).sum()


class PolicyWeights(kdx.Target):
    """Weights of M >= 2 teachers for logits and for features from a policy (Yang et al.: MTKD-RL, AAAI 2025).

    Gives `weights` and `feature_weights`, both [B, M] with sum 1, to be used by `weighted_kd` and `weighted_hints`:

        L = CE + sum_k w_k KL_k + 5 sum_k v_k MSE_k

    They are the mean of three: the policy's answer; `(1 - softmax(CE_k)) / (M - 1)`; and the softmax over the teachers
    of `KL_k` (for features, of the cosines). The policy reads, without gradient, `[cos, KL_k, CE_k, e_k, z_k]` of all
    teachers: the cosine of the averaged student map behind the aligner with the teacher's embedding [B, D_k], the
    divergence, the teacher's cross-entropy, its embedding and its logits [B, K]. `projected` are the M student maps
    [B, D_k, H, W] behind aligners, `features` the teachers' maps of the same shapes.

    The reward of a sample is minus its loss as above, standardised over the batch and clamped to 0..1. Every `every`
    updates, and at the end of each epoch, the policy takes a step for each `minibatch` of the samples met since, on
    `-R log w` averaged over samples and teachers, the sum of both heads, with plain gradient descent.

    dynamic: whether the factors of the mean are learnt, three for logits and three for features; the objective is then
        that of the mean in place of the policy's own answer.
    warmup: epochs in which all weights are 1, as published for the first. memory: how many of the latest samples are
    kept for the policy; the authors' code keeps all. lr: of the policy.

    A sample without a label has a cross-entropy of 0, and so equal weights for that part; the policy does not learn
    from it. `temperature` and `feature_weight` must be those of the losses. Left out: divergences of channels in place
    of the squares.
    """

    name = "mtkd_rl"
    confidence = "code"
    inputs = {
        "student": "student.logits",
        "label": "batch.label",
        "logits": kdx.Many("*.logits"),
        "embeddings": kdx.Many("*.embedding"),
        "features": kdx.Many("*.depth_100"),
        "projected": kdx.Many(),
    }
    knobs = {"temperature": kdx.Knob(4.0, above=0.0), "feature_weight": kdx.Knob(5.0, at_least=0.0)}
    outputs = ("weights", "feature_weights")
    shown = ("weights", "feature_weights")

    @dataclass(frozen=True)
    class Config:
        every: int = 1000
        lr: float = 0.1
        memory: int = 8192
        minibatch: int = 64
        warmup: int = 1
        dynamic: bool = False

    config: Config
    is_started: Tensor

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        _check_learning(config.lr, every=config.every, memory=config.memory, minibatch=config.minibatch)
        _check_warmup(config.warmup)
        kdx.check_same_classes(self.name, given, "logits")
        count, classes = len(given.shapes["logits"]), given.shape("student")[0]
        if count < 2:
            raise kdx.PlanError(
                "mtkd_rl weighs teachers against each other, but it was given one; expected two or more"
            )
        ours, theirs = given.shapes["projected"], given.shapes["features"]
        if ours != theirs:
            raise kdx.PlanError(
                f"mtkd_rl compares the student with each teacher, but projected is {_listed(ours)} and features is "
                f"{_listed(theirs)}; put an aligner for each teacher in between"
            )
        embeddings: list[kdx.Shape] = given.shapes["embeddings"]
        if [(shape[0],) for shape in given.shapes["features"]] != embeddings:
            maps, vectors = _listed(given.shapes["features"]), _listed(embeddings)
            raise kdx.PlanError(f"mtkd_rl compares averaged maps with embeddings, but the maps are {maps} and the "
                                f"embeddings {vectors}; expected as many channels, [D, H, W] and [D]")  # fmt: skip
        widths = [3 + shape[0] + classes for shape in embeddings]
        self.mixture = Mixture(WeightPolicy(sum(widths), count), widths)
        self.memory = Memory(config.memory, states=sum(widths), rewards=1)
        self.register_buffer("is_started", torch.tensor(config.warmup == 0))

    def forward(
        self,
        student: Tensor,
        label: Tensor,
        logits: list[Tensor],
        embeddings: list[Tensor],
        features: list[Tensor],
        projected: list[Tensor],
        temperature: Tensor,
        feature_weight: Tensor,
    ) -> dict[str, Tensor]:
        is_training = self.training and torch.is_grad_enabled()
        with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
            student = kdx.precise(student)
            logits, embeddings, features, projected = (
                [kdx.precise(x) for x in group] for group in (logits, embeddings, features, projected)
            )
            gaps = kdx.soft_divergences(student, logits, temperature)
            hints = kdx.hint_distances(projected, features)
            errors = torch.stack([_cross_entropy(z, label) for z in logits], 1)
            pairs = zip(projected, embeddings, strict=True)
            cosines = torch.stack([F.cosine_similarity(r.flatten(2).mean(2), e, dim=1) for r, e in pairs], 1)
            columns = [x.unsqueeze(2).unbind(1) for x in (cosines, gaps, errors)]
            states = torch.cat([torch.cat(own, 1) for own in zip(*columns, embeddings, logits, strict=True)], 1)
            found = self.mixture(states.to(self.mixture.odds.dtype)).exp()
            weights, hint_weights = torch.where(self.is_started, found, torch.ones_like(found)).unbind(1)
            if is_training:
                value = _cross_entropy(student, label) + (weights * gaps).sum(1)
                value = value + feature_weight * (hint_weights * hints).sum(1)
                self.memory.add(states=states, rewards=standardised_rewards(value, label >= 0).unsqueeze(1))
        return {"weights": weights, "feature_weights": hint_weights}

    def after_update(self, clock: kdx.Clock) -> None:
        if clock.step % self.config.every == 0 or clock.step % clock.steps_per_epoch == 0:
            for met in self.memory.take(self.config.minibatch):
                objective = partial(policy_loss, rewards=met["rewards"].squeeze(1))
                learn(
                    self.mixture if self.config.dynamic else self.mixture.policy,
                    met["states"],
                    objective,
                    self.config.lr,
                )
        self.is_started.fill_(clock.step >= self.config.warmup * clock.steps_per_epoch)


class Selectors(nn.Module):
    """States [B, M, S] -> the log-odds [B, M] that each of M teachers is selected; even at first."""

    def __init__(self, teachers: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(teachers, width), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(teachers), requires_grad=False)

    def forward(self, states: Tensor) -> Tensor:
        return (states * self.weight).sum(2) + self.bias


class Selection(kdx.Target):
    """Teachers selected sample by sample at random, by policies that learn which (Yuan et al.: RL-KD, AAAI 2021).

    Gives `weights` [B, M] for `weighted_kd`: one over the number of selected teachers for each of them, 0 for the
    others, and 0 for all where none was selected, so that only the label speaks.

    Each of M teachers has its own policy: it is selected with the probability `sigmoid(w s + b)`, where its state s is
    `[e, softmax(z_k), CE_k]`: the student's encoding of the sample [B, D], the teacher's probabilities and its
    cross-entropy, without gradient. At the end of each epoch the policies learn by REINFORCE from the samples met in
    it, in the order in which they came, a step for each `minibatch` with plain gradient descent.

    reward: `ce`, minus the student's cross-entropy, or `ce_kd`, minus that and the divergence from the mean of the
        selected teachers. Left out: the published third one, accuracy on the development set.
    lr: of the policies. memory: how many of the latest samples they learn from. warmup: epochs in which all teachers
        are selected and nothing is learnt, for the published initialisation.

    The rewards are centred by their mean over the minibatch, which changes no expectation. Policies do not learn from
    samples without a label. `temperature` is that of the loss; only `ce_kd` reads it.
    """

    name = "rl_kd"
    confidence = "paper"
    inputs = {
        "student": "student.logits",
        "encoding": "student.embedding",
        "label": "batch.label",
        "logits": kdx.Many("*.logits"),
    }
    knobs = {"temperature": kdx.Knob(4.0, above=0.0)}
    outputs = ("weights",)

    @dataclass(frozen=True)
    class Config:
        reward: str = "ce"
        lr: float = 0.1
        memory: int = 8192
        minibatch: int = 64
        warmup: int = 1

    config: Config
    is_started: Tensor

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_choice("reward", config.reward, REWARDS)
        _check_learning(config.lr, memory=config.memory, minibatch=config.minibatch)
        _check_warmup(config.warmup)
        kdx.check_same_classes(self.name, given, "logits")
        self.count = len(given.shapes["logits"])
        width = math.prod(given.shape("encoding")) + given.shape("student")[0] + 1
        self.policy = Selectors(self.count, width)
        self.memory = Memory(config.memory, states=self.count * width, actions=self.count, rewards=1, is_known=1)
        self.register_buffer("is_started", torch.tensor(config.warmup == 0))

    def forward(
        self, student: Tensor, encoding: Tensor, label: Tensor, logits: list[Tensor], temperature: Tensor
    ) -> dict[str, Tensor]:
        is_training = self.training and torch.is_grad_enabled()
        with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
            student, encoding = kdx.precise(student), kdx.precise(encoding).flatten(1)
            logits = [kdx.precise(z) for z in logits]
            own = [torch.cat([encoding, z.softmax(1), _cross_entropy(z, label).unsqueeze(1)], 1) for z in logits]
            states = torch.stack(own, 1)
            chances = self.policy(states.to(self.policy.weight.dtype)).sigmoid()
            draw = torch.rand(chances.shape, generator=self.given.generator, device=chances.device)
            actions = torch.where(self.is_started, draw < chances, True).to(student.dtype)
            weights = actions / actions.sum(1, keepdim=True).clamp(min=1)
            if is_training:
                loss = _cross_entropy(student, label)
                if self.config.reward == "ce_kd":
                    loss = loss + mixture_divergence(student, logits, weights, temperature)
                known = (label >= 0) & self.is_started
                columns = {"actions": actions, "rewards": -loss.unsqueeze(1), "is_known": known.unsqueeze(1)}
                self.memory.add(states=states.flatten(1), **columns)
        return {"weights": weights}

    def after_update(self, clock: kdx.Clock) -> None:
        if clock.step % clock.steps_per_epoch == 0:
            for met in self.memory.take(self.config.minibatch):
                columns = {name: met[name].squeeze(1) for name in ("rewards", "is_known")}
                objective = partial(reinforce, actions=met["actions"], **columns)
                states = met["states"].reshape(len(met["states"]), self.count, -1)
                learn(self.policy, states, objective, self.config.lr)
        self.is_started.fill_(clock.step >= self.config.warmup * clock.steps_per_epoch)


def mixture_divergence(student: Tensor, teachers: Sequence[Tensor], weights: Tensor, temperature: Tensor) -> Tensor:
    """`tau^2 KL(sum_k w_k p_k || q)` at the temperature, [B], from logits [B, K]; 0 where all weights [B, M] are 0."""
    tau = kdx.per_sample(temperature, student)
    p = (torch.stack([(z / tau).softmax(1) for z in teachers], 1) * weights.unsqueeze(2)).sum(1)
    gap = (torch.xlogy(p, p) - p * torch.log_softmax(student / tau, dim=1)).sum(1)
    return gap * temperature.square()


def reinforce(odds: Tensor, actions: Tensor, rewards: Tensor, is_known: Tensor) -> Tensor:
    """Minus the mean of `(R - mean R) sum_k log pi(a_k)` over the samples that are known, 0-d.

    `odds` [B, M] are log-odds, `actions` [B, M] are 0 or 1, `rewards` [B], `is_known` [B] is 0 or 1.
    """
    count = is_known.sum().clamp(min=1)
    advantage = (rewards - (rewards * is_known).sum() / count) * is_known
    log_chance = -F.binary_cross_entropy_with_logits(odds, actions, reduction="none").sum(1)
    return -(advantage * log_chance).sum() / count


def _cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """[B]; 0 for a sample without a label."""
    return F.cross_entropy(logits, label, reduction="none", ignore_index=-1)


def _check_learning(lr: float, **counts: int) -> None:
    if not 0 < lr < math.inf:
        raise kdx.ConfigError(f"lr: found {lr}, expected a number above 0")
    for name, value in counts.items():
        if value < 1:
            raise kdx.ConfigError(f"{name}: found {value}, expected at least 1")


def _check_warmup(warmup: int) -> None:
    if warmup < 0:
        raise kdx.ConfigError(f"warmup: found {warmup}, expected 0 epochs or more")


def _listed(shapes: Sequence[kdx.Shape]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)


@kdx.hookimpl
def kdx_targets() -> list[type[kdx.Target]]:
    return [PolicyWeights, Selection]
