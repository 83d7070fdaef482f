"""A plugin for tests of deployment: losses that change what is deployed, rightly and wrongly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import kdx


class Blend(kdx.Loss):
    """Learns a mixture of several tensors of the student, through the student's own classifier."""

    name = "blend"
    inputs = {"features": kdx.Many("student.mid"), "label": "batch.label"}
    borrows = {"head": "student.head"}
    answers = ("features", "head")

    def __init__(self, config: Blend.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        self.shares = nn.Parameter(torch.full((len(given.shapes["features"]),), 0.5))

    def forward(self, features: list[Tensor], label: Tensor, head: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(self.answer(features=features, head=head), label, ignore_index=-1)

    def answer(self, **tensors: Any) -> Tensor:
        mixed = sum(share * x.mean((2, 3)) for share, x in zip(self.shares, tensors["features"], strict=True))
        logits: Tensor = tensors["head"](mixed)
        return logits


class TrainedBlend(Blend):
    """The mixture, which trains the classifier as well."""

    name = "trained_blend"
    trains = ("head",)


class Silent(kdx.Loss):
    """Says that it answers, and does not."""

    name = "silent"
    inputs = {"student": "student.logits"}
    answers = ("student",)

    def forward(self, student: Tensor) -> Tensor:
        return student.square().mean(1)


class Unknown(Silent):
    """Names something that it does not read."""

    name = "unknown_part"
    answers = ("student", "tail")


class Features(Silent):
    """Answers with its features."""

    name = "features_only"
    inputs = {"student": "student.mid"}

    def forward(self, student: Tensor) -> Tensor:
        return student.square().mean((1, 2, 3))

    def answer(self, **tensors: Any) -> Tensor:
        found: Tensor = tensors["student"].mean((2, 3))
        return found


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [Blend, TrainedBlend, Silent, Unknown, Features]
