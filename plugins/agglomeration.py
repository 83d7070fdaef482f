"""Losses that gather teachers of different kinds in one student, through their features and without labels.

The student's maps are resized bilinearly to each teacher's grid before they enter a head. `depth_100` is a map
[B, C, H, W] for transformers too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdx

STUDENT_DEPTHS = kdx.Many(*(f"student.depth_{depth}" for depth in (25, 50, 75, 100)))


def feature_distance(student: Tensor, teacher: Tensor, direction: float) -> Tensor:
    """`direction (1 - cos) + (1 - direction) smooth_l1` of features [..., D], [...]; `smooth_l1` is a mean over D."""
    teacher = teacher.detach()
    turned = 1 - F.cosine_similarity(student, teacher, dim=-1)
    if direction == 1:
        return turned
    return direction * turned + (1 - direction) * F.smooth_l1_loss(student, teacher, reduction="none").mean(-1)


def resize(maps: Tensor, like: Tensor) -> Tensor:
    """Maps [B, C, H, W] on the grid of `like` [B, D, H', W'], bilinearly."""
    size = like.shape[2:]
    return maps if maps.shape[2:] == size else F.interpolate(maps, size, mode="bilinear", align_corners=False)


def tokens(maps: Tensor) -> Tensor:
    """Maps [B, C, H, W] as tokens [B, HW, C]."""
    return maps.flatten(2).transpose(1, 2)


class Standard(nn.Module):
    """Standardises features [B, C, ...] channel by channel, with the statistics that it has been shown."""

    mean: Tensor
    variance: Tensor
    seen: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, features: Tensor) -> Tensor:
        shape = (1, -1, *([1] * (features.ndim - 2)))
        deviation = self.variance.sqrt().clamp(min=1e-6)  # a channel that never varies gives 0
        return (features - self.mean.reshape(shape)) / deviation.reshape(shape)

    def add(self, features: Tensor) -> None:
        """Take in more features; all that were shown count alike."""
        mean, variance, count = _moments(features)
        share = count / (self.seen + count)
        apart = mean - self.mean
        self.variance.copy_(self.variance.lerp(variance, share) + share * (1 - share) * apart.square())
        self.mean += share * apart
        self.seen += count

    def follow(self, features: Tensor, rate: Tensor) -> None:
        """Move the statistics by `rate`, 0-d from 0 to 1, towards those of these features."""
        mean, variance, _ = _moments(features)
        self.mean.lerp_(mean, rate)
        self.variance.lerp_(variance, rate)


class Radio(kdx.Loss):
    """AM-RADIO: one student for several foundation teachers (Ranzinger et al., CVPR 2024), one value per sample.

    For each teacher two heads (linear, layer norm, GELU, linear): one takes the student's embedding [B, D] to the
    teacher's, with the value `1 - cos`; one takes its last map [B, C, H, W], token by token, to the teacher's, with
    `0.9 (1 - cos) + 0.1 smooth L1`, mean over tokens. The values of all teachers are added. 0 for a student whose heads
    give the teachers' features. Published: weight 1 for each, and 0 for the summary of teachers that have none worth
    learning. Its training code is not public: the mix and the heads are those of sibling projects. PHI-S, in which
    later versions standardise the teachers' tokens, is the target `phi_s`.

    summary_weights, spatial_weights: the weight of a teacher, by name; 1 for those not named, and no head at 0.
    hidden: the width of the heads; the width of the student's feature by default.
    """

    name = "am_radio"
    confidence = "paper"
    inputs = {
        "summary": "student.embedding",
        "spatial": "student.depth_100",
        "teacher_summaries": kdx.Many("*.embedding"),
        "teacher_maps": kdx.Many("*.depth_100"),
    }

    @dataclass(frozen=True)
    class Config:
        summary_weights: dict[str, float] = field(default_factory=dict)
        spatial_weights: dict[str, float] = field(default_factory=dict)
        hidden: int | None = None

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        _check_width("hidden", config.hidden)
        pairs = teacher_pairs("am_radio", given)
        _check_vector("am_radio", "summary", given.shape("summary"))
        _check_map("am_radio", "spatial", given.shape("spatial"))
        self.summary_weights = _weights("summary_weights", config.summary_weights, given.owners("teacher_summaries"))
        self.spatial_weights = _weights("spatial_weights", config.spatial_weights, given.owners("teacher_maps"))
        if not any((*self.summary_weights, *self.spatial_weights)):
            raise kdx.ConfigError("summary_weights, spatial_weights: all are 0, so nothing would be learnt")
        sides = zip(pairs, self.summary_weights, self.spatial_weights, strict=True)
        self.summary_heads, self.spatial_heads = nn.ModuleList(), nn.ModuleList()
        for (summary, maps), by_summary, by_map in sides:
            self.summary_heads.append(self._head("summary", summary) if by_summary else nn.Identity())
            self.spatial_heads.append(self._head("spatial", maps) if by_map else nn.Identity())

    def _head(self, source: str, like: kdx.Shape) -> nn.Module:
        width = self.given.shape(source)[0]
        hidden = self.config.hidden or width
        return nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, like[0]))

    def forward(
        self, summary: Tensor, spatial: Tensor, teacher_summaries: list[Tensor], teacher_maps: list[Tensor]
    ) -> Tensor:
        values = [
            weight * feature_distance(head(summary), theirs, 1)
            for weight, head, theirs in zip(self.summary_weights, self.summary_heads, teacher_summaries, strict=True)
            if weight
        ]
        values += [
            weight * feature_distance(head(tokens(resize(spatial, theirs))), tokens(theirs), 0.9).mean(1)
            for weight, head, theirs in zip(self.spatial_weights, self.spatial_heads, teacher_maps, strict=True)
            if weight
        ]
        return torch.stack(values).sum(0)


class Theia(kdx.Loss):
    """Theia: spatial features of several vision models in one (Shang et al., CoRL 2024), one value per sample.

    A translator for each teacher, two 3x3 convolutions with norm and GELU and one 1x1, takes the student's last map
    [B, C, H, W] to the teacher's, which is standardised channel by channel with statistics of the batches seen before
    training. `0.9 (1 - cos) + 0.1 smooth L1` of the flattened maps, mean over teachers; 0 where each translator gives
    its teacher's standardised map.

    The authors standardise with statistics of the whole data set, and divide by an array that is stored as a variance;
    here it is the standard deviation. Their translators are larger and of several kinds.

    hidden: the channels inside of a translator; those of the student's map by default.
    """

    name = "theia"
    confidence = "code"
    inputs = {"student": "student.depth_100", "teacher_maps": kdx.Many("*.depth_100")}

    @dataclass(frozen=True)
    class Config:
        hidden: int | None = None

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        _check_width("hidden", config.hidden)
        student, teachers = given.shape("student"), given.shapes["teacher_maps"]
        _check_map("theia", "student", student)
        for owner, shape in zip(given.owners("teacher_maps"), teachers, strict=True):
            _check_map("theia", owner, shape)
        hidden = config.hidden or student[0]
        self.translators = nn.ModuleList(_translator(student[0], hidden, shape[0]) for shape in teachers)
        self.standards = nn.ModuleList(Standard(shape[0]) for shape in teachers)

    def calibrate(self, **tensors: Any) -> None:
        for standard, theirs in zip(self.standards, tensors["teacher_maps"], strict=True):
            assert isinstance(standard, Standard)
            standard.add(theirs)

    def forward(self, student: Tensor, teacher_maps: list[Tensor]) -> Tensor:
        values = [
            feature_distance(translator(resize(student, theirs)).flatten(1), standard(theirs).flatten(1), 0.9)
            for translator, standard, theirs in zip(self.translators, self.standards, teacher_maps, strict=True)
        ]
        return torch.stack(values).mean(0)


class Ladder(nn.Module):
    """The sum of what an adapter for each depth (linear, GELU, linear) makes of features [B, ..., C_d], [B, ..., D]."""

    def __init__(self, widths: Sequence[int], out: int, expansions: Sequence[int]) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(
            nn.Sequential(nn.Linear(width, times * width), nn.GELU(), nn.Linear(times * width, out))
            for width, times in zip(widths, expansions, strict=True)
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return torch.stack([adapt(one) for adapt, one in zip(self.adapters, features, strict=True)]).sum(0)


def keep_teachers(values: Tensor, draw: Tensor, chance: Tensor) -> Tensor:
    """Which terms of M teachers count, bool [B, M], from the terms [B, M] and even random numbers in 0..1 [B, M].

    The largest term of each sample does, and each other one unless its number is below `chance`, 0-d or [B].
    """
    largest = F.one_hot(values.argmax(1), values.shape[1]).bool()
    return largest | (draw >= kdx.per_sample(chance, values))


def kept_terms(values: Tensor, kept: Tensor, *, per_sample: bool = False) -> Tensor:
    """What each sample adds of terms [B, M], [B]: the mean over the batch is the mean over all that are `kept`.

    With `per_sample` it is the mean over those that are kept of the sample, so that all samples count alike.
    """
    added = (values * kept).sum(1)
    return added / kept.sum(1) if per_sample else added * len(values) / kept.sum()


class Unic(kdx.Loss):
    """UNIC: one classifier backbone for several teachers (Sariyildiz et al., ECCV 2024), one value per sample.

    For each teacher and either kind of feature, summary and patches, a ladder of adapters adds up what all depths of
    the student give. A teacher's features are standardised channel by channel with running statistics. The term of a
    teacher is the mean over both kinds of `0.5 (1 - cos) + 0.5 smooth L1`, mean over patches. Of the terms of a sample
    the largest is kept and each other one dropped with the chance `drop`; the value is the mean over all kept terms of
    the batch. 0 where all ladders give the standardised features.

    `rate`: how far the statistics move to those of a batch in each update. Published:
    `{use: cosine, peak: 1.0, end: 0.001}`. They begin with those of the batches seen before training.
    per_sample: whether the kept terms are averaged sample by sample, so that samples count alike; in the public code a
        sample with more kept terms counts more.
    width: of the adapters, in units of the student's channels; last_width: of that of the last depth.

    A class token at each depth is what the authors read for the summary; here it is the mean of the depth's map, which
    any net has.
    """

    name = "unic"
    confidence = "code"
    inputs = {
        "student": STUDENT_DEPTHS,
        "teacher_summaries": kdx.Many("*.embedding"),
        "teacher_maps": kdx.Many("*.depth_100"),
    }
    knobs = {"drop": kdx.Knob(0.5, at_least=0.0, at_most=1.0), "rate": kdx.Knob(0.01, at_least=0.0, at_most=1.0)}

    @dataclass(frozen=True)
    class Config:
        per_sample: bool = False
        width: int = 1
        last_width: int = 4

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        _check_width("width", config.width)
        _check_width("last_width", config.last_width)
        depths = given.shapes["student"]
        for shape in depths:
            _check_map("unic", "student", shape)
        widths = [shape[0] for shape in depths]
        expansions = [config.width] * (len(depths) - 1) + [config.last_width]
        pairs = teacher_pairs("unic", given)
        self.summary_ladders = nn.ModuleList(Ladder(widths, summary[0], expansions) for summary, _ in pairs)
        self.patch_ladders = nn.ModuleList(Ladder(widths, maps[0], expansions) for _, maps in pairs)
        self.summary_standards = nn.ModuleList(Standard(summary[0]) for summary, _ in pairs)
        self.patch_standards = nn.ModuleList(Standard(maps[0]) for _, maps in pairs)

    def calibrate(self, **tensors: Any) -> None:
        for standard, features in self._standards(tensors["teacher_summaries"], tensors["teacher_maps"]):
            standard.add(features)

    def forward(
        self,
        student: list[Tensor],
        teacher_summaries: list[Tensor],
        teacher_maps: list[Tensor],
        drop: Tensor,
        rate: Tensor,
    ) -> Tensor:
        if self.training:
            for standard, features in self._standards(teacher_summaries, teacher_maps):
                standard.follow(features, rate.mean())
        pooled = [maps.mean((2, 3)) for maps in student]
        terms = []
        for place, (summary, maps) in enumerate(zip(teacher_summaries, teacher_maps, strict=True)):
            grid = [tokens(resize(ours, maps)) for ours in student]
            wanted = self.summary_standards[place](summary), tokens(self.patch_standards[place](maps))
            by_summary = feature_distance(self.summary_ladders[place](pooled), wanted[0], 0.5)
            by_patch = feature_distance(self.patch_ladders[place](grid), wanted[1], 0.5).mean(1)
            terms.append((by_summary + by_patch) / 2)
        values = torch.stack(terms, 1)
        draw = torch.rand(values.shape, generator=self.given.generator, device=values.device)
        kept = keep_teachers(values.detach(), draw, drop)
        return kept_terms(values, kept, per_sample=self.config.per_sample)

    def _standards(self, summaries: list[Tensor], maps: list[Tensor]) -> list[tuple[Standard, Tensor]]:
        """The statistics of each teacher's features, with the features."""
        pairs = zip((*self.summary_standards, *self.patch_standards), (*summaries, *maps), strict=True)
        return [(standard, features) for standard, features in pairs if isinstance(standard, Standard)]


def teacher_pairs(who: str, given: kdx.Given) -> list[tuple[kdx.Shape, kdx.Shape]]:
    """The shapes of each teacher's summary [D] and map [C, H, W]."""
    summaries, maps = given.shapes["teacher_summaries"], given.shapes["teacher_maps"]
    owners = given.owners("teacher_summaries"), given.owners("teacher_maps")
    if owners[0] != owners[1]:
        raise kdx.PlanError(
            f"{who} reads a summary and a map of each teacher, but found summaries of {', '.join(owners[0])} and maps "
            f"of {', '.join(owners[1])}; name the same teachers in the same order"
        )
    for owner, summary, shape in zip(owners[0], summaries, maps, strict=True):
        _check_vector(who, owner, summary)
        _check_map(who, owner, shape)
    return list(zip(summaries, maps, strict=True))


def _moments(features: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and variance [C] of features [B, C, ...], and of how many vectors."""
    flat = features.detach().float().transpose(0, 1).flatten(1)
    variance, mean = torch.var_mean(flat, dim=1, correction=0)
    return mean, variance, flat.shape[1]


def _translator(source: int, hidden: int, out: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(source, hidden, 3, padding=1), nn.GroupNorm(1, hidden), nn.GELU(),
        nn.Conv2d(hidden, hidden, 3, padding=1), nn.GroupNorm(1, hidden), nn.GELU(),
        nn.Conv2d(hidden, out, 1),
    )  # fmt: skip


def _weights(name: str, found: Mapping[str, float], owners: Sequence[str]) -> list[float]:
    for owner, weight in found.items():
        if owner not in owners:
            raise kdx.ConfigError(f"{name}.{owner}: there is no such teacher, only {', '.join(owners)}")
        if not 0 <= weight < math.inf:
            raise kdx.ConfigError(f"{name}.{owner}: found {weight}, expected a number from 0")
    return [found.get(owner, 1.0) for owner in owners]


def _check_width(name: str, found: int | None) -> None:
    if found is not None and found < 1:
        raise kdx.ConfigError(f"{name}: found {found}, expected a whole number from 1")


def _check_map(who: str, side: str, shape: kdx.Shape) -> None:
    if len(shape) != 3:
        raise kdx.PlanError(
            f"{who} reads maps [C, H, W], but that of {side} is {list(shape)}; depth_100 is a map for transformers too"
        )


def _check_vector(who: str, side: str, shape: kdx.Shape) -> None:
    if len(shape) != 1:
        raise kdx.PlanError(f"{who} reads summaries [D], but that of {side} is {list(shape)}; `embedding` is one")


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [Radio, Theia, Unic]
