"""Hints of several teachers at once: each has a regressor of its own on the same map of the student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdx

Head = Callable[[Tensor], Tensor]
REGRESSORS = ("conv1x1", "bottleneck")


def distances(regressed: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """The mean squared difference of each of M pairs of maps [B, C, H, W], over all elements of a sample, [B, M].

    The larger map of a pair is average-pooled to the smaller one.
    """
    pairs = [kdx.pool_to_smaller(ours, theirs.detach()) for ours, theirs in zip(regressed, teachers, strict=True)]
    return torch.stack([kdx.squared_distance(ours, theirs) for ours, theirs in pairs], 1)


class TeacherHints(kdx.Loss):
    """The mean over several teachers of hint regressions, each with its own regressor, one value per sample.

    Hints as in FitNets (Romero et al., ICLR 2015) for each of M teachers: 1x1 convolution and batch norm on the
    student's map [B, C, H, W], the squared difference to the teacher's map averaged over all elements; the larger of
    the two is average-pooled to the smaller one. By default maps half-way down the nets. 0 where each regressor's
    output is its teacher's map. Usual weight: 100, beside `aver`.

    Two public codebases average the values outside of the graph, so that nothing is learnt from them; here the
    gradient reaches the student and every regressor.
    """

    name = "fitnet_mkd"
    confidence = "code"
    inputs = {"student": "student.depth_50", "teacher": kdx.Many("*.depth_50")}

    def __init__(self, config: TeacherHints.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        student, teachers = _maps(self.name, given)
        self.regressors = nn.ModuleList(regressor(student[0], teacher[0]) for teacher in teachers)

    def forward(self, student: Tensor, teacher: list[Tensor]) -> Tensor:
        return distances(regress(self.regressors, student, teacher), teacher).mean(1)


class ConfidenceHints(kdx.Loss):
    """Hints of M >= 2 teachers, weighted by how well each classifies the student (Zhang et al.: CA-MKD, ICASSP 2022).

        (1 / M) sum_k v_k MSE(r_k(F_s), F_k),  v_k = (1 - softmax_k(CE_k)) / (M - 1)

    One value per sample, from the last maps [B, C, H, W]. `r_k` is a regressor for each teacher, followed by a ReLU;
    `CE_k` is the cross-entropy with the label of what teacher k's classifier makes of the regressed map averaged over
    its places. The larger map of a pair is average-pooled to the smaller one. A sample without a label has equal
    weights. 0 where each regressed map is its teacher's. Published: weight 50 from the second epoch on, which is
    `weight: {use: table, values: {1: 0, 2: 50}, per: epoch}`; the term of the logits is `weighted_kd` with the target
    `ca_mkd`.

    The classifiers must take as many numbers as the maps have channels; the rule is meant for nets whose classifier
    reads the averaged last map.

    regressor: `conv1x1`, or a `bottleneck` of 1x1, 3x3 and 1x1 with half of the teacher's channels in the middle; each
        convolution with batch norm.
    detach_weights: whether the weights are constants for the gradient. As in the public code they are not, so the
        student is also drawn to maps that a teacher classifies less well than the others where they fit badly.
    relu: whether a ReLU ends the regressors. By default it does for the teachers whose maps the batches seen before
        training do not show below 0; the public code always has one.
    """

    name = "ca_mkd_hints"
    confidence = "code"
    inputs = {"student": "student.depth_100", "teacher": kdx.Many("*.depth_100"), "label": "batch.label"}
    borrows = {"heads": kdx.Many("*.classifier")}

    @dataclass(frozen=True)
    class Config:
        regressor: str = "conv1x1"
        detach_weights: bool = False
        relu: bool | None = None

    config: Config
    rectify: Tensor

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_choice("regressor", config.regressor, REGRESSORS)
        student, teachers = _maps(self.name, given)
        if len(teachers) < 2:
            raise kdx.PlanError(
                "ca_mkd_hints weighs teachers against each other, but it was given one; expected two or more"
            )
        make = bottleneck if config.regressor == "bottleneck" else regressor
        self.regressors = nn.ModuleList(make(student[0], teacher[0]) for teacher in teachers)
        self.register_buffer("rectify", torch.full((len(teachers),), config.relu is not False))

    def calibrate(self, **tensors: Any) -> None:
        if self.config.relu is None:
            self.rectify &= torch.stack([(maps >= 0).all() for maps in tensors["teacher"]])

    def forward(self, student: Tensor, teacher: list[Tensor], label: Tensor, heads: list[Head]) -> Tensor:
        if len(heads) != len(teacher):
            raise kdx.PlanError(
                f"ca_mkd_hints pairs maps with classifiers in order, but there are {len(teacher)} maps and "
                f"{len(heads)} in `borrows: heads`; name as many of each"
            )
        found = regress(self.regressors, student, teacher)
        found = [torch.where(rectify, x.relu(), x) for rectify, x in zip(self.rectify, found, strict=True)]
        answers = [head(x.mean((2, 3))) for head, x in zip(heads, found, strict=True)]
        errors = [F.cross_entropy(z, label, reduction="none", ignore_index=-1) for z in answers]
        weights = kdx.confidence_weights(torch.stack(errors, 1))
        weights = weights.detach() if self.config.detach_weights else weights
        return (weights * distances(found, teacher)).mean(1)


def regress(regressors: nn.ModuleList, student: Tensor, teachers: Sequence[Tensor]) -> list[Tensor]:
    """The student's map [B, C, H, W] through the regressor of each teacher, in no place larger than the teacher's."""
    pairs = zip(regressors, teachers, strict=True)
    return [layer(kdx.pool_to_smaller(student, theirs)[0]) for layer, theirs in pairs]


def regressor(source: int, target: int) -> nn.Module:
    """From `source` to `target` channels by a 1x1 convolution and batch norm."""
    return nn.Sequential(nn.Conv2d(source, target, 1, bias=False), nn.BatchNorm2d(target))


def bottleneck(source: int, target: int) -> nn.Module:
    """The same by way of half as many channels, with a 3x3 convolution between them."""
    middle = max(target // 2, 1)
    layers: list[nn.Module] = []
    for into, out, kernel in ((source, middle, 1), (middle, middle, 3), (middle, target, 1)):
        layers += [nn.Conv2d(into, out, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _maps(who: str, given: kdx.Given) -> tuple[kdx.Shape, list[kdx.Shape]]:
    student: kdx.Shape = given.shape("student")
    teachers: list[kdx.Shape] = given.shapes["teacher"]
    for side, shape in (("student", student), *(("teacher", shape) for shape in teachers)):
        if len(shape) != 3:
            raise kdx.PlanError(
                f"{who} regresses maps [C, H, W], but one of {side} is {list(shape)}; tap a stage, as in "
                f"{side}.depth_50, which is a map also for transformers"
            )
    return student, teachers


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [TeacherHints, ConfidenceHints]
