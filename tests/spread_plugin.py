"""A plugin for tests with several processes: losses that use `kdx.gather`, remember, die, or leave weights out, and a
metric of torchmetrics as anybody would write one.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import CatMetric, MetricCollection, MinMaxMetric, SumMetric

import kdx


class Gathered(kdx.Loss):
    """Squared difference of two similarity matrices, one row for each sample, which it gathers the columns for."""

    name = "gathered"
    inputs = {"student": "student.mid", "teacher": "wide.mid"}
    separable = True

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = (F.normalize(side.flatten(1), dim=1) for side in (student, teacher))
        return (student @ kdx.gather(student).T - teacher @ kdx.gather(teacher).T).square().mean(1)


class Remembers(kdx.Loss):
    """Says that it is separable, but keeps the mean of what it has seen."""

    name = "remembers"
    inputs = {"student": "student.logits"}
    separable = True
    seen: Tensor

    def __init__(self, config: Remembers.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, student: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.seen.add_(student.detach().mean())
        return student.square().mean(1)


class Deadly(kdx.Loss):
    """Kills the second process after an update, once: `mark` is the file that remembers it."""

    name = "deadly"
    inputs = {"student": "student.logits"}

    @dataclass(frozen=True)
    class Config:
        mark: str = ""
        at: int = 4

    config: Config

    def after_update(self, clock: kdx.Clock) -> None:
        mark = Path(self.config.mark)
        if clock.step == self.config.at and os.environ.get("RANK") == "1" and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def forward(self, student: Tensor) -> Tensor:
        return student.square().mean(1) * 0.1


@dataclass(slots=True)
class Holder:
    """What a metric may keep others in."""

    metric: SumMetric


class Counted(kdx.Metric):
    """How many samples there were, counted in several ways."""

    name = "counted"

    def __init__(self, config: object, facts: kdx.DataFacts, device: torch.device) -> None:
        super().__init__(config, facts, device)
        self.total = SumMetric().to(device)
        self.others = {"rows": [CatMetric().to(device)], "extremes": MinMaxMetric(SumMetric()).to(device)}
        self.collection = MetricCollection({"sum": SumMetric(dist_sync_on_step=True)}).to(device)
        self.holders = deque([Holder(SumMetric().to(device))])

    def update(self, logits: Tensor, label: Tensor) -> None:  # type: ignore[override]
        self.total.update(len(label))
        self.others["rows"][0].update(label)
        self.others["extremes"].update(len(label))
        self.collection(len(label))
        self.holders[0].metric.update(len(label))

    def compute(self) -> dict[str, float]:
        return {
            "counted": float(self.total.compute()),
            "rows": float(len(self.others["rows"][0].compute())),
            "extreme": float(self.others["extremes"].compute()["raw"]),
            "collected": float(self.collection.compute()["sum"]),
            "held": float(self.holders[0].metric.compute()),
        }


@kdx.hookimpl
def kdx_metrics() -> list[type[kdx.Metric]]:
    return [Counted]


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [Gathered, Remembers, Deadly]
