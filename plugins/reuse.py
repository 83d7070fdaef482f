"""A method that deploys a part of the teacher: its classifier, behind a student that has learnt its features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdx

Head = Callable[[Tensor], Tensor]


class ReusedClassifier(kdx.Loss):
    """The reused teacher classifier (Chen et al.: SimKD, CVPR 2022), one value per sample, without any label.

    The squared difference of the teacher's last map [B, C_t, H, W] and the projected one of the student, mean over all
    elements; the larger map is average-pooled to the smaller one's size before. The student is deployed with the
    projector and the teacher's classifier behind it, its own classifier is not used. 0 for a student whose projected
    map is the teacher's, which then has the teacher's logits (where the maps are of one size, or of a multiple).
    Published: weight 1 and no other loss.

    factor: how many times narrower than the teacher's map the middle of the projector is.
    relu: whether the projector ends in a ReLU, for a teacher whose map has no negative values.
    pool: whether the map's mean over places enters the teacher's classifier, as in most convolutional nets; without it
        the map itself does, as with `borrows: {head: teacher.head}` for nets whose `head` pools and norms.

    The batches seen before training are checked: the teacher's map must give the teacher's logits in this way.
    """

    name = "simkd"
    confidence = "code"
    inputs = {"student": "student.depth_100", "teacher": "teacher.features", "logits": "teacher.logits"}
    borrows = {"head": "teacher.classifier"}
    answers = ("student", "head")

    @dataclass(frozen=True)
    class Config:
        factor: int = 2
        relu: bool = True
        pool: bool = True

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        student, teacher = given.shape("student"), given.shape("teacher")
        if len(student) != 3 or len(teacher) != 3:
            raise kdx.PlanError(
                f"simkd projects maps [C, H, W], but student is {list(student)} and teacher {list(teacher)}; "
                "it is meant for a teacher with convolutions"
            )
        if not 1 <= config.factor <= teacher[0]:
            raise kdx.ConfigError(f"factor: found {config.factor}, expected 1 to the {teacher[0]} channels of teacher")
        self.size = (teacher[1], teacher[2])
        self.projector = projector(student[0], teacher[0], config.factor, relu=config.relu)

    def forward(self, student: Tensor, teacher: Tensor, logits: Tensor, head: Head) -> Tensor:
        student, teacher = kdx.pool_to_smaller(student, teacher.detach())
        found: Tensor = self.projector(student)
        return (found - teacher).square().mean((1, 2, 3))

    def answer(self, **tensors: Any) -> Tensor:
        student = tensors["student"]
        size = min(student.shape[2], self.size[0]), min(student.shape[3], self.size[1])
        if tuple(student.shape[2:]) != size:
            student = F.adaptive_avg_pool2d(student, size)
        return self._classified(self.projector(student), tensors["head"])

    def calibrate(self, **tensors: Any) -> None:
        found, logits = self._classified(tensors["teacher"], tensors["head"]), tensors["logits"]
        if found.shape != logits.shape or not torch.allclose(found.float(), logits.float(), rtol=0.05, atol=0.05):
            raise kdx.PlanError(
                "simkd: the teacher's logits are not what the borrowed part makes of its map, because something stands "
                "between the two; for nets whose `head` pools, say `pool: false` and `borrows: {head: teacher.head}`"
            )

    def _classified(self, maps: Tensor, head: Head) -> Tensor:
        logits: Tensor = head(maps.mean((2, 3)) if self.config.pool else maps)
        return logits


def projector(source: int, target: int, factor: int, *, relu: bool) -> nn.Sequential:
    """From a map with `source` channels to one with `target`, by way of `target / factor`: 1x1, 3x3 and 1x1."""
    middle = target // factor
    layers: list[nn.Module] = []
    for into, out, kernel in ((source, middle, 1), (middle, middle, 3), (middle, target, 1)):
        layers += [nn.Conv2d(into, out, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*(layers if relu else layers[:-1]))


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [ReusedClassifier]
