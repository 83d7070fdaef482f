"""A small student with three losses in the real engine, on which an updater can be tried."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdx.components import Given, Network
from kdx.optim import Trained, make_optimizer, set_lr
from kdx.runtime import Runtime
from kdx.sections import RuntimeOptions
from kdx.trial import CLASSES, FACTS
from kdx.types import Clock, Losses
from kdx.updater import Updater

LOSSES = {"ce": "cross_entropy", "kd": "kd", "hint": "mse"}
STEPS_PER_EPOCH = 2
SIZES = (6, 8, 4)
"""Numbers of a sample, of the student's inner vector, and of the teacher's."""


class _Tap(nn.Module):
    """Holds a network as the learner holds the student."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network


class Bench:
    """An updater at work: `update` does one update of whatever batch it is given, in micro-batches.

    The losses are labels, the answers of a teacher, and its inner vector, which a linear map of the student's
    regresses. Weights follow from nothing but the seed.
    """

    def __init__(
        self,
        component: type[Updater],
        config: Any,
        *,
        losses: Sequence[str] = tuple(LOSSES),
        optimizer: Mapping[str, Any],
        weight_decay: float = 0.01,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        present = {name: use for name, use in LOSSES.items() if name in losses}
        given = Given({}, FACTS, torch.Generator().manual_seed(3), losses=present)
        self.updater = component(config, given).to(dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            inputs, inner, theirs = SIZES
            self.body, self.head = nn.Linear(inputs, inner), nn.Linear(inner, CLASSES)
            self.aligner = nn.Linear(inner, theirs).to(dtype)
            self.teacher = nn.Linear(inputs, theirs + CLASSES).to(dtype).requires_grad_(False)
        net = nn.Sequential()
        net.add_module("body", self.body)
        net.add_module("head", self.head)
        self.learner = nn.ModuleDict(
            {
                "models": nn.ModuleDict({"model/student": _Tap(Network(net))}),
                "nodes": nn.ModuleDict({"align/hint": self.aligner} if "hint" in losses else {}),
            }
        ).to(dtype)
        groups = [
            Trained([*self.learner.parameters()], 1.0, weight_decay),
            Trained([*self.updater.parameters()], 1.0, 0.0),
        ]
        self.runtime = Runtime(RuntimeOptions(device="cpu", precision="fp32"))
        made = make_optimizer(groups, optimizer, device=self.runtime.device, peak=0.05)
        self.runtime.prepare(self.learner, made, None, [*self.updater.parameters()])
        self.updater.prepare(self.runtime)
        set_lr(made, 0.05)
        self.steps = 0

    def batch(self, size: int = 8) -> tuple[Tensor, Tensor]:
        """Samples [size, 6] and labels [size] of the coming update."""
        generator = torch.Generator().manual_seed(self.steps)
        x = torch.randn(size, SIZES[0], generator=generator, dtype=self.body.weight.dtype)
        return x, torch.randint(CLASSES, (size,), generator=generator)

    def losses(self, x: Tensor, label: Tensor) -> Losses:
        """The terms of samples, with weights that differ."""
        inner = self.body(x).relu()
        logits, taught = self.head(inner), self.teacher(x)
        theirs, answer = taught[:, : SIZES[2]], 3 * taught[:, SIZES[2] :]
        terms = {
            "ce": F.cross_entropy(logits, label),
            "kd": F.kl_div(logits.log_softmax(1), answer.log_softmax(1), reduction="none", log_target=True).sum(1),
            "hint": (self.aligner(inner) - theirs).square().mean(),
        }
        terms = {name: terms[name] for name in self.updater.given.losses}
        weights = {"ce": 1.0, "kd": 2.0, "hint": 5.0}
        parts = {name: weights[name] * term.mean() for name, term in terms.items()}
        total = torch.stack([*parts.values()]).sum()
        return Losses(total, {name: term.detach() for name, term in terms.items()}, {}, parts)

    def update(self, micro_batches: int = 1) -> Mapping[str, Tensor]:
        """Do one update; what the updater shows of it."""
        x, label = self.batch()
        for samples, labels in zip(x.chunk(micro_batches), label.chunk(micro_batches), strict=True):
            self.updater.backward(self.losses(samples, labels), len(samples) / len(x), self.runtime)
        self.updater.step(self.runtime)
        shown = dict(self.updater.shown())
        self.steps += 1
        with torch.no_grad():
            self.updater.after_update(Clock(self.steps, STEPS_PER_EPOCH, 100))
        return shown

    def weights(self) -> dict[str, Tensor]:
        """Everything that is trained, and the state of the updater."""
        both = nn.ModuleDict({"learner": self.learner, "updater": self.updater})
        return {name: value.clone() for name, value in both.state_dict().items()}

    def go_on(self, other: Bench) -> None:
        """Take up the state of another bench, as a resumed run does."""
        self.learner.load_state_dict(other.learner.state_dict())
        self.updater.load_state_dict(other.updater.state_dict())
        self.runtime.optimizer.load_state_dict(copy.deepcopy(other.runtime.optimizer.state_dict()))
        self.updater.given.generator.set_state(other.updater.given.generator.get_state())
        self.steps = other.steps
