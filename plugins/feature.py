"""Losses that regress inner features: plainly, through hints, and on the boundaries and margins of activations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdx

DISTANCES = ("l2", "l1", "smooth_l1", "cosine")
REGRESSORS = ("auto", "conv", "conv1x1")
CONNECTORS = ("always", "unequal")
DEPTHS = ("depth_25", "depth_50", "depth_75", "depth_100")
STUDENT_DEPTHS = kdx.Many(*(f"student.{depth}" for depth in DEPTHS))
TEACHER_DEPTHS = kdx.Many(*(f"teacher.{depth}" for depth in DEPTHS))


def distance(student: Tensor, teacher: Tensor, kind: str = "l2") -> Tensor:
    """How far two equal-shaped features [B, C, ...] are from each other, mean over all elements of a sample, [B].

    `l2` is the squared difference, `l1` the absolute one, `smooth_l1` Huber's with its bend at 1, `cosine` one minus
    the cosine along the channels (axis 1), mean over positions.
    """
    teacher = teacher.detach()
    match kind:
        case "l2":
            return kdx.squared_distance(student, teacher)
        case "l1":
            values = (student - teacher).abs()
        case "smooth_l1":
            values = F.smooth_l1_loss(student, teacher, reduction="none")
        case _:
            values = 1 - F.cosine_similarity(student, teacher, dim=1)[:, None]
    return values.flatten(1).mean(1)


class MeanSquaredError(kdx.Loss):
    """Squared difference of two features of equal shape, mean over all elements, one value per sample.

    0 for equal features. An aligner in between makes shapes equal.
    """

    name = "mse"
    separable = True
    inputs = {"student": kdx.REQUIRED, "teacher": kdx.REQUIRED}
    same_shape = (("student", "teacher"),)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return distance(student, teacher)


class Hint(kdx.Loss):
    """Hint regression with a regressor of its own (Romero et al.: FitNets, ICLR 2015), one value per sample.

    Maps [B, C, H, W], by default half-way down both nets. 0 where the regressor's output equals the teacher's map.
    Published weight: 100 in the CIFAR benchmark.

    distance: `l2`, `l1`, `smooth_l1` or `cosine`.
    regressor: `conv` reaches the teacher's size by its kernel, axis by axis: 3 with stride 2 from twice the size, a
        transposed 4 with stride 2 from half of it, else `1 + H_student - H_teacher`; then batch norm. `conv1x1` is a
        1x1 convolution and batch norm, and the larger of the two maps is average-pooled to the smaller one. `auto` is
        `conv` where sizes are equal or one is twice the other, and `conv1x1` elsewhere.
    relu: whether a ReLU ends the regressor. By default one ends `conv`, unless the batches seen before training show
        that the teacher's map goes below 0. The public benchmark always has one.
    """

    name = "fitnet"
    confidence = "code"
    inputs = {"student": "student.depth_50", "teacher": "teacher.depth_50"}

    @dataclass(frozen=True)
    class Config:
        distance: str = "l2"
        regressor: str = "auto"
        relu: bool | None = None

    config: Config
    rectify: Tensor

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_choice("distance", config.distance, DISTANCES)
        kdx.check_choice("regressor", config.regressor, REGRESSORS)
        student, teacher = given.shape("student"), given.shape("teacher")
        for who, shape in {"student": student, "teacher": teacher}.items():
            if len(shape) != 3:
                raise kdx.PlanError(
                    f"fitnet regresses maps [C, H, W], but {who} is {list(shape)}; use the loss mse after an aligner"
                )
        self.is_conv = config.regressor == "conv" or (config.regressor == "auto" and _is_near(student, teacher))
        layer = size_rule(student, teacher) if self.is_conv else nn.Conv2d(student[0], teacher[0], 1, bias=False)
        self.regressor = nn.Sequential(layer, nn.BatchNorm2d(teacher[0]))
        self.register_buffer("rectify", torch.tensor(self.is_conv if config.relu is None else config.relu))

    def calibrate(self, **tensors: Any) -> None:
        if self.config.relu is None:
            self.rectify &= (tensors["teacher"] >= 0).all()

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        if not self.is_conv:
            student, teacher = kdx.pool_to_smaller(student, teacher)
        regressed = self.regressor(student)
        return distance(torch.where(self.rectify, regressed.relu(), regressed), teacher, self.config.distance)

    def describe(self) -> str:
        return "a convolution that reaches the size" if self.is_conv else "the larger map is pooled, then conv 1x1"


def activation_boundary(student: Tensor, teacher: Tensor, margin: Tensor | float = 1.0) -> Tensor:
    """How far a student's pre-activations [B, C, H, W] are on the wrong side, sum of squares over a sample, [B].

    Where the teacher is above 0 they should be at least `margin`, elsewhere at most `-margin`.
    """
    wrong = torch.where(teacher.detach() > 0, margin - student, student + margin)
    return wrong.relu().square().flatten(1).sum(1)


class ActivationBoundaries(kdx.Loss):
    """Activation boundaries (Heo et al., AAAI 2019), one value per sample.

    Stage maps [B, C, H, W], by default of four depths; each stage counts twice as much as the one before it, the last
    one 1. It needs the signs of pre-activations. A teacher's map after its ReLU shows the same signs; a student's goes
    through a connector, whose result may be negative. 0 where each connected value is on the teacher's side of 0 by
    `margin`. Published weight: 0.003, in a stage of its own before the student sees labels.

    connector: `always`, or where shapes are `unequal` only, which is the published rule for pre-activation taps. It is
        a convolution and batch norm, as the regressor `auto` of `fitnet`.
    """

    name = "ab"
    confidence = "values"
    inputs = {"student": STUDENT_DEPTHS, "teacher": TEACHER_DEPTHS}
    knobs = {"margin": kdx.Knob(1.0, above=0.0)}

    @dataclass(frozen=True)
    class Config:
        connector: str = "always"

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_choice("connector", config.connector, CONNECTORS)
        self.connectors = nn.ModuleList()
        for student, teacher in map_pairs("ab", given):
            if config.connector == "unequal" and student == teacher:
                self.connectors.append(nn.Identity())
                continue
            near = _is_near(student, teacher)
            layer = size_rule(student, teacher) if near else nn.Conv2d(student[0], teacher[0], 1, bias=False)
            self.connectors.append(nn.Sequential(layer, nn.BatchNorm2d(teacher[0])))

    def forward(self, student: list[Tensor], teacher: list[Tensor], margin: Tensor) -> Tensor:
        values = []
        for connector, ours, theirs in zip(self.connectors, student, teacher, strict=True):
            ours, theirs = kdx.pool_to_smaller(connector(ours), theirs)
            values.append(activation_boundary(ours, theirs, kdx.per_sample(margin, ours)))
        return _doubling_sum(values)


def negative_mean(gamma: Tensor, beta: Tensor) -> Tensor:
    """What a channel is on average where it is negative, [C], if batch norm makes it normal around `beta` [C] with the
    standard deviation `|gamma|` [C]; three deviations below 0 for a channel that is negative less than once in 1000.
    """
    deviation = gamma.abs().clamp(min=torch.finfo(gamma.dtype).tiny)
    chance = torch.special.ndtr(-beta / deviation)
    density = torch.exp(-(beta / deviation).square() / 2) / math.sqrt(2 * math.pi)
    mean = beta - deviation * density / chance.clamp(min=1e-3)
    return torch.where(chance > 1e-3, mean, -3 * deviation)


def partial_distance(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """Squared distance of maps [B, C, H, W] where the student should move, sum over a sample, [B].

    The teacher's map is raised to `margin` [C] at least. A student that is below a target that is not positive stays.
    """
    target = torch.maximum(teacher.detach(), margin[:, None, None])
    differs = (student > target) | (target > 0)
    return ((student - target).square() * differs).flatten(1).sum(1)


class Overhaul(kdx.Loss):
    """Overhaul of feature distillation (Heo et al., ICCV 2019), one value per sample.

    Stage maps [B, C, H, W], by default of four depths; each stage counts twice as much as the one before it, the last
    one 1. The method reads pre-activations on both sides: name such taps where a net has them. Maps after a ReLU work
    as well, then with nothing left of the teacher's negative part. A connector, 1x1 convolution and batch norm, gives
    the teacher's channels; the larger map is average-pooled to the smaller one. Published weight: 0.001.

    The margin of a channel is the mean of its negative values. It is measured on the batches seen before training and
    kept; the authors compute it from the batch norm before the activation (`negative_mean`), which agrees where
    pre-activations are normal. Teachers are in eval mode, where the authors' CIFAR code has batch statistics.
    """

    name = "ofd"
    confidence = "values"
    inputs = {"student": STUDENT_DEPTHS, "teacher": TEACHER_DEPTHS}

    def __init__(self, config: Overhaul.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        self.connectors, self.margins = nn.ModuleList(), nn.ModuleList()
        for student, teacher in map_pairs("ofd", given):
            layer = nn.Conv2d(student[0], teacher[0], 1, bias=False)
            nn.init.normal_(layer.weight, 0, math.sqrt(2 / teacher[0]))
            self.connectors.append(nn.Sequential(layer, nn.BatchNorm2d(teacher[0])))
            self.margins.append(Margin(teacher[0]))

    def calibrate(self, **tensors: Any) -> None:
        for margin, theirs in zip(self.margins, tensors["teacher"], strict=True):
            margin(theirs)

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        values = []
        for connector, margin, ours, theirs in zip(self.connectors, self.margins, student, teacher, strict=True):
            ours, theirs = kdx.pool_to_smaller(ours, theirs)
            values.append(partial_distance(connector(ours), theirs, margin.get_buffer("level")))
        return _doubling_sum(values)


class Margin(nn.Module):
    """The mean of each channel's negative values over all maps [B, C, H, W] seen so far, as the buffer `level` [C]."""

    level: Tensor
    seen: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("level", torch.zeros(channels))
        # per channel: values, negative values, and the sums of the negative ones, of all and of all squares
        self.register_buffer("seen", torch.zeros(5, channels))

    def forward(self, maps: Tensor) -> None:
        maps = maps.detach().float().transpose(0, 1).flatten(1)
        below = maps < 0
        sums = [torch.ones_like(maps), below.float(), maps * below, maps, maps.square()]
        self.seen += torch.stack([values.sum(1) for values in sums])
        count, negative, negative_sum, total, squares = self.seen
        deviation = (squares / count - (total / count).square()).clamp(min=0).sqrt()
        often = negative / count > 1e-3
        self.level.copy_(torch.where(often, negative_sum / negative.clamp(min=1), -3 * deviation))


def map_pairs(who: str, given: kdx.Given) -> list[tuple[kdx.Shape, kdx.Shape]]:
    """The shapes of the student's maps, each with that of the teacher's map at the same place of the list."""
    student, teacher = given.shapes["student"], given.shapes["teacher"]
    if len(student) != len(teacher):
        raise kdx.PlanError(
            f"{who} pairs the maps of both nets in order, but there are {len(student)} of the student and "
            f"{len(teacher)} of the teacher; name as many of each"
        )
    for side, shapes in {"student": student, "teacher": teacher}.items():
        for shape in shapes:
            if len(shape) != 3:
                raise kdx.PlanError(
                    f"{who} compares maps [C, H, W], but one of {side} is {list(shape)}; tap a stage, as in "
                    f"{side}.depth_50, which is a map also for transformers"
                )
    return list(zip(student, teacher, strict=True))


def size_rule(student: kdx.Shape, teacher: kdx.Shape) -> nn.Module:
    """The convolution that takes a student's map to the teacher's size."""
    if _is_half(student, teacher):
        return nn.ConvTranspose2d(student[0], teacher[0], kernel_size=4, stride=2, padding=1, bias=False)
    sizes = _sizes(student, teacher)
    if any(s < t for s, t in sizes):
        raise kdx.PlanError(
            f"fitnet with `regressor: conv` cannot take {list(student)} to {list(teacher)}: a student's map must be at "
            "least as large as the teacher's, or half of it in both directions; `regressor: conv1x1` can"
        )
    halves = [s == 2 * t for s, t in sizes]
    kernel = tuple(3 if half else 1 + s - t for half, (s, t) in zip(halves, sizes, strict=True))
    stride = tuple(2 if half else 1 for half in halves)
    padding = tuple(1 if half else 0 for half in halves)
    return nn.Conv2d(
        student[0], teacher[0], (kernel[0], kernel[1]), (stride[0], stride[1]), (padding[0], padding[1]), bias=False
    )


def _sizes(student: kdx.Shape, teacher: kdx.Shape) -> list[tuple[int, int]]:
    """Both heights, and both widths."""
    return list(zip(student[1:], teacher[1:], strict=True))


def _is_near(student: kdx.Shape, teacher: kdx.Shape) -> bool:
    """Whether a small convolution takes the one size to the other."""
    return _is_half(student, teacher) or all(s in (t, 2 * t) for s, t in _sizes(student, teacher))


def _is_half(student: kdx.Shape, teacher: kdx.Shape) -> bool:
    return all(2 * s == t for s, t in _sizes(student, teacher))


def _doubling_sum(values: list[Tensor]) -> Tensor:
    """The last value plus half of the one before it, and so on."""
    return torch.stack([value / 2 ** (len(values) - 1 - place) for place, value in enumerate(values)]).sum(0)


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [MeanSquaredError, Hint, ActivationBoundaries, Overhaul]
