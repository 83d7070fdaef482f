"""Targets whose answers no cache can hold, each for a reason of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import kdx


class Learns(kdx.Target):
    """Adds a bias that is trained."""

    name = "learns"
    inputs = {"logits": "teacher.logits"}

    def __init__(self, config: Learns.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        self.bias = nn.Parameter(torch.zeros(given.shape("logits")))

    def forward(self, logits: Tensor) -> Tensor:
        return logits + self.bias


class Draws(kdx.Target):
    """Adds random numbers."""

    name = "draws"
    inputs = {"logits": "teacher.logits"}

    def forward(self, logits: Tensor) -> Tensor:
        return logits + torch.rand(logits.shape, generator=self.given.generator)


class Begins(kdx.Target):
    """Turns logits by a matrix that is drawn when it is made."""

    name = "begins"
    inputs = {"logits": "teacher.logits"}

    def __init__(self, config: Begins.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        (width,) = given.shape("logits")
        self.register_buffer("turn", torch.randn(width, width))

    def forward(self, logits: Tensor) -> Tensor:
        turn: Tensor = self.turn  # type: ignore[assignment]
        return logits @ turn


class Banks(kdx.Target):
    """Subtracts the mean of what it has seen."""

    name = "banks"
    inputs = {"logits": "teacher.logits"}

    def __init__(self, config: Banks.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        self.register_buffer("mean", torch.zeros(given.shape("logits")))

    def forward(self, logits: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * logits.mean(0)
        return logits - self.mean


class Counts(kdx.Target):
    """Fades with each call, and says so nowhere."""

    name = "counts"
    inputs = {"logits": "teacher.logits"}

    def __init__(self, config: Counts.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        self.calls = 0

    def forward(self, logits: Tensor) -> Tensor:
        self.calls += 1
        return logits / self.calls


class Compares(kdx.Target):
    """Logits over their largest value in the batch."""

    name = "compares"
    inputs = {"logits": "teacher.logits"}

    def forward(self, logits: Tensor) -> Tensor:
        return logits / logits.abs().amax()


class Number(kdx.Target):
    """One temperature for the batch."""

    name = "number"
    inputs = {"logits": "teacher.logits"}

    def forward(self, logits: Tensor) -> Tensor:
        return 1 + logits.softmax(1).amax(1).mean()


class Borrows(kdx.Target):
    """Has a part of a teacher at hand."""

    name = "borrows"
    inputs = {"logits": "teacher.logits"}
    borrows = {"head": "teacher.classifier"}

    def forward(self, logits: Tensor, head: nn.Module) -> Tensor:
        return logits


@kdx.hookimpl
def kdx_targets() -> list[type[kdx.Target]]:
    return [Learns, Draws, Begins, Banks, Counts, Compares, Number, Borrows]
