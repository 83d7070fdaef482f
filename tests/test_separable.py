"""What says `separable` gives for halves of a batch what it gives for the whole; checks for authors see to that."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import kdx
from kdx.components import Node
from kdx.spread import says_separable
from kdx.testing import check_loss


class Lonely(kdx.Loss):
    """Mean square of the gap, one value per sample; `among` is what it takes from the other samples."""

    name = "lonely"
    inputs = {"student": "student.logits", "teacher": "teacher.logits"}
    separable = True

    @dataclass(frozen=True)
    class Config:
        among: bool = False
        keeps: bool = False

    config: Config
    seen: Tensor

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.config.keeps:
            self.seen = self.seen + student.detach().mean()
        gap = (student - teacher.detach()).square().mean(1)
        return gap * (1 + student.square().mean()) if self.config.among else gap


class Heir(Lonely):
    """Derives from a class that says `separable`."""

    name = "heir"


def test_a_loss_of_each_sample_alone_passes() -> None:
    check_loss(Lonely)


def test_a_loss_that_looks_at_other_samples_may_not_say_separable() -> None:
    with pytest.raises(AssertionError, match="says `separable`, but out of a batch is not what its halves give"):
        check_loss(Lonely, among=True)


def test_a_loss_that_remembers_may_not_say_separable() -> None:
    with pytest.raises(AssertionError, match="says `separable`, but its forward changes seen"):
        check_loss(Lonely, keeps=True)


def test_a_class_says_separable_for_itself_only() -> None:
    said: list[type[Node]] = [one for one in (Lonely, Heir) if says_separable(one)]
    assert said == [Lonely]
