"""A plugin for tests of nodes that borrow a part of each teacher, or any number of parts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdx


class Judges(kdx.Loss):
    """The mean cross-entropy of what several classifiers make of one embedding."""

    name = "judges"
    inputs = {"features": "student.embedding", "label": "batch.label"}
    borrows = {"heads": kdx.Many("*.classifier")}

    def forward(self, features: Tensor, label: Tensor, heads: list[nn.Module]) -> Tensor:
        return torch.stack([F.cross_entropy(head(features), label) for head in heads]).mean()


class TrainingJudges(Judges):
    """Trains the classifiers as well."""

    name = "training_judges"
    trains = ("heads",)


class AnsweringJudges(Judges):
    """Wants several parts to be deployed."""

    name = "answering_judges"
    answers = ("features", "heads")

    def answer(self, **tensors: Any) -> Tensor:
        return torch.stack([head(tensors["features"]) for head in tensors["heads"]]).mean(0)


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [Judges, TrainingJudges, AnsweringJudges]
