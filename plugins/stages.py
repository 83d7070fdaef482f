"""Losses over several stages at once, with trained parts in between: information, review, and matched layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdx

DEPTHS = ("depth_25", "depth_50", "depth_75", "depth_100")
STUDENT_DEPTHS = tuple(f"student.{depth}" for depth in DEPTHS)
TEACHER_DEPTHS = tuple(f"teacher.{depth}" for depth in DEPTHS)
LEVELS = (4, 2, 1)
FIRST_VARIANCE = 5.0
LEAST_VARIANCE = 1e-5
MOST_WIDTH = 512


def variational_information(mean: Tensor, teacher: Tensor, raw_variance: Tensor) -> Tensor:
    """Minus the log density of maps [B, C, H, W] under normal distributions around `mean`, mean over elements, [B].

    The variance of a channel is `softplus(raw_variance) + 1e-5`, [C]. The constant `log(2 pi) / 2` is left out.
    """
    variance = (F.softplus(raw_variance) + LEAST_VARIANCE)[:, None, None]
    density = (mean - teacher.detach()).square() / variance + variance.log()
    return density.flatten(1).mean(1) / 2


class VariationalInformation(kdx.Loss):
    """Variational information distillation (Ahn et al., CVPR 2019), one value per sample.

    Maps [B, C, H, W], by default of four depths; the values of the pairs are added up. Three 1x1 convolutions with ReLU
    between them predict the teacher's map from the student's, with a variance per channel that is trained and starts
    at 5. The larger map is average-pooled to the smaller one. At the start a perfect prediction has the value
    `log(5) / 2` per pair; it falls with the variance and may be negative. Published weight: 1.

    A public benchmark keeps the variances where no optimizer sees them.
    """

    name = "vid"
    confidence = "values"
    inputs = {"student": kdx.Many(*STUDENT_DEPTHS), "teacher": kdx.Many(*TEACHER_DEPTHS)}

    def __init__(self, config: VariationalInformation.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        _check_counts("vid", given)
        shapes = list(zip(*_maps("vid", given), strict=True))
        self.predictors = nn.ModuleList(_predictor(ours[0], theirs[0]) for ours, theirs in shapes)
        start = math.log(math.expm1(FIRST_VARIANCE - LEAST_VARIANCE))
        self.raw_variances = nn.ParameterList(
            nn.Parameter(torch.full((theirs[0],), start, dtype=torch.float32)) for _, theirs in shapes
        )

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        values = []
        for predictor, raw, ours, theirs in zip(self.predictors, self.raw_variances, student, teacher, strict=True):
            ours, theirs = kdx.pool_to_smaller(ours, theirs)
            values.append(variational_information(predictor(ours), theirs, raw))
        return torch.stack(values).sum(0)


def hierarchical_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of maps [B, C, H, W], on their own size and pooled to 4x4, 2x2 and 1x1, weighted mean, [B].

    Each level that is smaller than the map counts half as much as the one before it.
    """
    teacher = teacher.detach()
    value = kdx.squared_distance(student, teacher)
    weight = total = 1.0
    for level in LEVELS:
        if level < min(student.shape[2:]):
            weight /= 2
            total += weight
            pooled = (F.adaptive_avg_pool2d(maps, level) for maps in (student, teacher))
            value = value + weight * kdx.squared_distance(*pooled)
    return value / total


class Fusion(nn.Module):
    """Mixes a student's map with what came from the deeper ones (`deeper`, absent in the deepest stage).

    Gives the map for the teacher's shape, and what is handed to the next shallower stage, both in the teacher's size.
    """

    def __init__(self, student: kdx.Shape, teacher: kdx.Shape, width: int, *, deepest: bool) -> None:
        super().__init__()
        self.size = teacher[1:]
        first = nn.Conv2d(student[0], width, 1, bias=False)
        last = nn.Conv2d(width, teacher[0], 3, padding=1, bias=False)
        for layer in (first, last):
            nn.init.kaiming_uniform_(layer.weight, a=1)
        self.enter = nn.Sequential(first, nn.BatchNorm2d(width))
        self.leave = nn.Sequential(last, nn.BatchNorm2d(teacher[0]))
        self.shares = None if deepest else nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid())

    def forward(self, student: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.enter(student)
        if self.shares is not None and deeper is not None:
            deeper = _resize(deeper, x.shape[2:])
            shares = self.shares(torch.cat([x, deeper], 1))
            x = x * shares[:, :1] + deeper * shares[:, 1:]
        x = _resize(x, self.size)
        return self.leave(x), x


class KnowledgeReview(kdx.Loss):
    """Knowledge review (Chen et al., CVPR 2021), one value per sample.

    Maps [B, C, H, W] or vectors [B, D], which count as 1x1 maps, from shallow to deep; by default of four depths and
    what enters the classifier. From the deepest stage upwards, each of the student's maps is mixed with what the deeper
    ones left, and its result is compared with the teacher's map of that stage on up to four sizes. The values of the
    stages are added up; 0 where all results equal the teacher's maps. The published weight is 0.6 to 8 for CIFAR and 1
    for ImageNet, and rises from 0 over the first 20 epochs (CIFAR): give `weight` a schedule.

    The authors tap teachers before the last activation of a stage; name such taps where a net has them.
    """

    name = "review_kd"
    confidence = "values"
    inputs = {
        "student": kdx.Many(*STUDENT_DEPTHS, "student.embedding"),
        "teacher": kdx.Many(*TEACHER_DEPTHS, "teacher.embedding"),
    }

    def __init__(self, config: KnowledgeReview.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        _check_counts("review_kd", given)
        student, teacher = _maps("review_kd", given, vectors=True)
        width = min(MOST_WIDTH, student[-1][0])
        last = len(student) - 1
        self.fusions = nn.ModuleList(
            Fusion(ours, theirs, width, deepest=place == last)
            for place, (ours, theirs) in enumerate(zip(student, teacher, strict=True))
        )

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        values: list[Tensor] = []
        deeper: Tensor | None = None
        for fusion, ours, theirs in reversed(list(zip(self.fusions, student, teacher, strict=True))):
            result, deeper = fusion(_as_map(ours), deeper)
            values.append(hierarchical_distance(result, _as_map(theirs)))
        return torch.stack(values).sum(0)


class SemanticCalibration(kdx.Loss):
    """Cross-layer semantic calibration (Chen et al., AAAI 2021), one value per sample.

    Maps [B, C, H, W], by default of four depths; the nets may have different numbers of them. Every student's map is
    regressed onto every teacher's map. How much a pair counts is found per sample: the similarities of the sample to
    the others of its batch, in either map, go through a small net each, and the softmax over the teacher's maps of the
    inner products is the weight. The value is the mean over the student's maps of the weighted squared differences, 0
    where every projected map equals the teacher's. The larger map is average-pooled to the smaller one. Published
    weight: 400, along with `kd` of weight 1.

    group: a sample is compared with the samples of its group of so many neighbours in the batch. The small nets have
        this width, which is the batch size in the authors' code and fixed there; a short group is filled up with 0.
    """

    name = "semckd"
    confidence = "code"
    inputs = {"student": kdx.Many(*STUDENT_DEPTHS), "teacher": kdx.Many(*TEACHER_DEPTHS)}

    @dataclass(frozen=True)
    class Config:
        group: int = 64

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        if config.group < 4:
            raise kdx.ConfigError(f"group: found {config.group}, expected a number of samples from 4")
        student, teacher = _maps("semckd", given)
        self.queries = nn.ModuleList(_embedder(config.group) for _ in student)
        self.keys = nn.ModuleList(_embedder(config.group) for _ in teacher)
        self.projections = nn.ModuleList(
            nn.ModuleList(_projection(ours[0], theirs[0]) for theirs in teacher) for ours in student
        )

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        teacher = [one.detach() for one in teacher]
        queries = torch.stack([self._embed(net, one) for net, one in zip(self.queries, student, strict=True)], 1)
        keys = torch.stack([self._embed(net, one) for net, one in zip(self.keys, teacher, strict=True)], 1)
        weights = (queries @ keys.transpose(1, 2)).softmax(2)
        gaps = torch.stack([torch.stack(self._gaps(place, one, teacher), 1) for place, one in enumerate(student)], 1)
        return (weights * gaps).sum(2).mean(1)

    def _embed(self, net: nn.Module, feature: Tensor) -> Tensor:
        similarities = group_similarities(feature, self.config.group)
        return F.normalize(net(similarities), dim=1)

    def _gaps(self, place: int, student: Tensor, teacher: list[Tensor]) -> list[Tensor]:
        """The squared differences of one of the student's maps from each of the teacher's, [B] each."""
        projections = self.projections[place]
        assert isinstance(projections, nn.ModuleList)
        gaps = []
        for projection, theirs in zip(projections, teacher, strict=True):
            ours, theirs = kdx.pool_to_smaller(student, theirs)
            gaps.append(kdx.squared_distance(projection(ours), theirs))
        return gaps


def group_similarities(feature: Tensor, group: int) -> Tensor:
    """The inner products of each sample with those of its group of `group` neighbours in the batch, [B, group].

    `feature` is [B, ...]; columns that no sample stands for are 0.
    """
    rows = feature.flatten(1)
    groups = -(-len(rows) // group)
    rows = F.pad(rows, (0, 0, 0, groups * group - len(rows))).reshape(groups, group, -1)
    similarities: Tensor = rows @ rows.transpose(1, 2)
    return similarities.flatten(0, 1)[: len(feature)]


def _predictor(student: int, teacher: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(student, teacher, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(teacher, teacher, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(teacher, teacher, 1, bias=False),
    )


def _embedder(group: int) -> nn.Module:
    return nn.Sequential(nn.Linear(group, group // 2), nn.ReLU(), nn.Linear(group // 2, group // 4))


def _projection(student: int, teacher: int) -> nn.Module:
    width = 2 * teacher
    return nn.Sequential(
        nn.Conv2d(student, width, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, teacher, 1, bias=False),
    )


def _resize(feature: Tensor, size: Sequence[int]) -> Tensor:
    return feature if tuple(feature.shape[2:]) == tuple(size) else F.interpolate(feature, tuple(size), mode="nearest")


def _as_map(feature: Tensor) -> Tensor:
    return feature if feature.ndim == 4 else feature[:, :, None, None]


def _maps(who: str, given: kdx.Given, *, vectors: bool = False) -> tuple[list[kdx.Shape], list[kdx.Shape]]:
    """The shapes of the student's and of the teacher's features as maps."""
    found: list[list[kdx.Shape]] = []
    for side in ("student", "teacher"):
        shapes = [(*shape, 1, 1) if vectors and len(shape) == 1 else tuple(shape) for shape in given.shapes[side]]
        for shape in shapes:
            if len(shape) != 3:
                raise kdx.PlanError(
                    f"{who} compares maps [C, H, W], but one of {side} is {list(shape)}; tap a stage, as in "
                    f"{side}.depth_50, which is a map also for transformers"
                )
        found.append(shapes)
    return found[0], found[1]


def _check_counts(who: str, given: kdx.Given) -> None:
    counts = len(given.shapes["student"]), len(given.shapes["teacher"])
    if counts[0] != counts[1]:
        raise kdx.PlanError(
            f"{who} pairs the features of both nets in order, but there are {counts[0]} of the student and "
            f"{counts[1]} of the teacher; name as many of each"
        )


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [VariationalInformation, KnowledgeReview, SemanticCalibration]
