"""Losses that compare what maps hold without matching channel for channel: attention, selectivity, flow.

Maps [B, C, H, W] of both nets are compared in pairs, and the values of the pairs are added up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdx

FORMS = ("code", "paper")
DEPTHS = ("depth_25", "depth_50", "depth_75", "depth_100")
STUDENT_DEPTHS = kdx.Many(*(f"student.{depth}" for depth in DEPTHS))
TEACHER_DEPTHS = kdx.Many(*(f"teacher.{depth}" for depth in DEPTHS))

Grid = tuple[int, int]
"""Height and width of the positions of a feature."""


def attention(feature: Tensor, power: float = 2.0) -> Tensor:
    """Where a map [B, C, H, W] is active: the mean over channels of `|x|^power`, scaled to length 1, [B, H * W]."""
    magnitude = feature.square() if power == 2 else feature.abs().pow(power)
    return F.normalize(magnitude.mean(1).flatten(1), dim=1)


def attention_transfer(student: Tensor, teacher: Tensor, *, form: str = "code", power: float = 2.0) -> Tensor:
    """The distance of two attention maps, [B], of features [B, C, H, W] whose channels may differ.

    `code` is the mean over positions of the squared difference, `paper` the 2-norm. The larger map is average-pooled to
    the smaller one before the power is taken.
    """
    student, teacher = kdx.pool_to_smaller(student, teacher.detach())
    difference = attention(student, power) - attention(teacher, power)
    return difference.square().mean(1) if form == "code" else difference.norm(dim=1)


class Places(nn.Module):
    """Gives pairs of features as pairs of maps. `used` are the pairs that have more than one place to compare."""

    def __init__(self, who: str, given: kdx.Given) -> None:
        super().__init__()
        student, teacher = given.shapes["student"], given.shapes["teacher"]
        _check_counts(who, student, teacher)
        self.grids = [_grids(who, *pair) for pair in zip(student, teacher, strict=True)]
        self.used = [place for place, pair in enumerate(self.grids) if not any(math.prod(grid) == 1 for grid in pair)]
        if not self.used:
            raise kdx.PlanError(
                f"{who} compares places, but student {_listed(student)} or teacher {_listed(teacher)} has only one; "
                "tap it before it is pooled"
            )

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        return [
            (_as_map(student[place], self.grids[place][0]), _as_map(teacher[place], self.grids[place][1]))
            for place in self.used
        ]

    def describe(self) -> str:
        """Which pairs count."""
        left_out = [str(place + 1) for place in range(len(self.grids)) if place not in self.used]
        return f"compares {len(self.used)} of {len(self.grids)} pairs" + (
            f"; pair {', '.join(left_out)} has one place and adds 0" if left_out else ""
        )


class AttentionTransfer(kdx.Loss):
    """Attention transfer (Zagoruyko and Komodakis, ICLR 2017), one value per sample and no parameters.

    By default on maps of four depths; the values of the pairs are added up. 0 where both nets look at the same places;
    a positive factor on either side and the order of channels do not count. A pair with only one place adds nothing.
    Features are maps [B, C, H, W] or tokens [B, N, D]. Tokens lie as the map that they are compared with, or in a
    square; two features of tokens that are not both square lie in a line. Drop prefix tokens in the tap.

    form: `code` is what the authors' code computes, `paper` their equation (which halves the weight as well). Published
        weight of `code`: 1000, for maps of 8x8 to 32x32. The mean over places makes its values larger on smaller maps.
    p: the power of the activations, from 1.
    """

    name = "at"
    separable = True
    confidence = "values"
    inputs = {"student": STUDENT_DEPTHS, "teacher": TEACHER_DEPTHS}

    @dataclass(frozen=True)
    class Config:
        form: str = "code"
        p: float = 2.0

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_choice("form", config.form, FORMS)
        if not 1 <= config.p < math.inf:
            raise kdx.ConfigError(f"p: found {config.p}, expected a power from 1")
        self.places = Places("at", given)

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        form, power = self.config.form, self.config.p
        values = [attention_transfer(*pair, form=form, power=power) for pair in self.places(student, teacher)]
        return torch.stack(values).sum(0)

    def describe(self) -> str:
        return self.places.describe()


def selectivity_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared maximum mean discrepancy between the channels of two maps [B, C, H, W], [B]; channels may differ.

    A channel is its map as a vector of length 1; the kernel of two channels is their squared inner product. The larger
    map is average-pooled to the smaller one.
    """
    student, teacher = kdx.pool_to_smaller(student, teacher.detach())
    ours, theirs = F.normalize(student.flatten(2), dim=2), F.normalize(teacher.flatten(2), dim=2)
    return _kernel_mean(ours, ours) + _kernel_mean(theirs, theirs) - 2 * _kernel_mean(ours, theirs)


class SelectivityTransfer(kdx.Loss):
    """Neuron selectivity transfer (Huang and Wang, 2017) with a squared kernel, one value per sample, no parameters.

    By default on maps of four depths; the values of the pairs are added up. Features as in `at`. 0 where the channels
    of both nets are spread alike; their order and positive factors of single channels do not count. A pair with only
    one place adds nothing. Published weight: 50.
    """

    name = "nst"
    confidence = "values"
    inputs = {"student": STUDENT_DEPTHS, "teacher": TEACHER_DEPTHS}

    def __init__(self, config: SelectivityTransfer.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        self.places = Places("nst", given)

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        return torch.stack([selectivity_transfer(*pair) for pair in self.places(student, teacher)]).sum(0)

    def describe(self) -> str:
        return self.places.describe()


def channel_divergence(student: Tensor, teacher: Tensor, temperature: Tensor) -> Tensor:
    """`tau^2 * KL(softmax(teacher / tau) || softmax(student / tau))` over the positions, mean over channels, [B].

    `student`, `teacher` [B, C, H, W]; `temperature` is above 0, one for all or one per sample [B].
    """
    tau = kdx.per_sample(temperature, student)
    ours, theirs = ((x / tau).flatten(2).log_softmax(2) for x in (student, teacher.detach()))
    divergence = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(2)
    return divergence.mean(1) * temperature.square()


class ChannelDistillation(kdx.Loss):
    """Channel-wise distillation (Shu et al., ICCV 2021), one value per sample.

    Maps [B, C, H, W], by default the last ones. Each channel is a distribution over places. Where channels differ, a
    1x1 convolution gives the teacher's number; the larger map is average-pooled to the smaller one. 0 for a perfect
    student; a constant added to a channel does not count. Published weight: 50 on features, 3 on logits per pixel.
    """

    name = "cwd"
    confidence = "values"
    inputs = {"student": "student.depth_100", "teacher": "teacher.depth_100"}
    knobs = {"temperature": kdx.Knob(4.0, above=0.0)}

    def __init__(self, config: ChannelDistillation.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        student, teacher = given.shape("student"), given.shape("teacher")
        for side, shape in {"student": student, "teacher": teacher}.items():
            if len(shape) != 3 or shape[1] * shape[2] == 1:
                raise kdx.PlanError(
                    f"cwd compares the places of maps [C, H, W], but {side} is {list(shape)}; tap an earlier stage, "
                    f"as in {side}.depth_50"
                )
        same = student[0] == teacher[0]
        self.connector = nn.Identity() if same else nn.Conv2d(student[0], teacher[0], 1)

    def forward(self, student: Tensor, teacher: Tensor, temperature: Tensor) -> Tensor:
        student, teacher = kdx.pool_to_smaller(student, teacher)
        return channel_divergence(self.connector(student), teacher, temperature)


def flow(first: Tensor, second: Tensor) -> Tensor:
    """How the channels of two maps [B, C, H, W], [B, D, h, w] of one net go together: mean product, [B, C, D]."""
    first, second = kdx.pool_to_smaller(first, second)
    return first.flatten(2) @ second.flatten(2).transpose(1, 2) / (first.shape[2] * first.shape[3])


def flow_distance(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Squared difference of the flows between neighbouring maps, mean over channel pairs, sum over neighbours, [B]."""
    values = [
        (flow(*ours) - flow(*theirs).detach()).square().mean((1, 2))
        for ours, theirs in zip(pairwise(student), pairwise(teacher), strict=True)
    ]
    return torch.stack(values).sum(0)


class SolutionFlow(kdx.Loss):
    """Flow of solution procedure (Yim et al., CVPR 2017), one value per sample.

    Two or more maps [B, C, H, W] of either net, by default of four depths, in order. Of two neighbours in a net the
    larger one is average-pooled. 0 for equal flows; one order of places for all maps of a net does not count. The
    authors train with this loss alone before the labels.

    project: the method needs as many channels in the student as in the teacher. With `project`, 1x1 convolutions, which
        are trained, give the student's maps the teacher's channels where they differ.
    """

    name = "fsp"
    confidence = "code"
    inputs = {"student": STUDENT_DEPTHS, "teacher": TEACHER_DEPTHS}

    @dataclass(frozen=True)
    class Config:
        project: bool = False

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        student, teacher = given.shapes["student"], given.shapes["teacher"]
        _check_counts("fsp", student, teacher)
        if len(student) < 2:
            raise kdx.PlanError(f"fsp goes from map to map, but only {_listed(student)} is given; name two or more")
        for side, shapes in {"student": student, "teacher": teacher}.items():
            if any(len(shape) != 3 for shape in shapes):
                raise kdx.PlanError(f"fsp needs maps [C, H, W], but {side} has {_listed(shapes)}; tap stages")
        if not config.project and [shape[0] for shape in student] != [shape[0] for shape in teacher]:
            raise kdx.PlanError(
                f"fsp compares channel pairs, but the channels of student {_listed(student)} and teacher "
                f"{_listed(teacher)} differ; `project: true` brings the student's to the teacher's"
            )
        self.projections = nn.ModuleList(
            nn.Identity() if ours[0] == theirs[0] else nn.Conv2d(ours[0], theirs[0], 1, bias=False)
            for ours, theirs in zip(student, teacher, strict=True)
        )

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        projected = [projection(one) for projection, one in zip(self.projections, student, strict=True)]
        return flow_distance(projected, teacher)


def _kernel_mean(a: Tensor, b: Tensor) -> Tensor:
    """The mean of all squared inner products of the rows of [B, C, N] and [B, D, N], [B]."""
    return (a @ b.transpose(1, 2)).square().mean((1, 2))


def _check_counts(who: str, student: list[kdx.Shape], teacher: list[kdx.Shape]) -> None:
    if len(student) != len(teacher):
        raise kdx.PlanError(
            f"{who} pairs the features of both nets in order, but there are {len(student)} of the student and "
            f"{len(teacher)} of the teacher; name as many of each"
        )


def _grids(who: str, student: kdx.Shape, teacher: kdx.Shape) -> tuple[Grid, Grid]:
    """How the positions of both features lie."""
    for side, shape in {"student": student, "teacher": teacher}.items():
        if len(shape) not in (2, 3):
            raise kdx.PlanError(f"{who} needs places: a map [C, H, W] or tokens [N, D], but {side} is {list(shape)}")
    if len(student) == 3 and len(teacher) == 3:
        return (student[1], student[2]), (teacher[1], teacher[2])
    if len(student) == 2 and len(teacher) == 2:
        squares = _square(student[0]), _square(teacher[0])
        if squares[0] is not None and squares[1] is not None:
            return squares[0], squares[1]
        return (1, student[0]), (1, teacher[0])
    if len(student) == 3:
        grid = (student[1], student[2])
        return grid, _grid_of_tokens(who, teacher[0], grid)
    grid = (teacher[1], teacher[2])
    return _grid_of_tokens(who, student[0], grid), grid


def _grid_of_tokens(who: str, tokens: int, other: Grid) -> Grid:
    """How tokens lie that are compared with a map of the size `other`."""
    if tokens == other[0] * other[1]:
        return other
    grid = (1, tokens) if other[0] == 1 else _square(tokens)
    if grid is None:
        raise kdx.PlanError(
            f"{who} compares places, but {tokens} tokens do not lie as a map of {other[0]}x{other[1]}; drop prefix "
            "tokens in the tap, or put an aligner between them"
        )
    return grid


def _square(count: int) -> Grid | None:
    side = math.isqrt(count)
    return (side, side) if side * side == count else None


def _as_map(feature: Tensor, grid: Grid) -> Tensor:
    return feature if feature.ndim == 4 else feature.transpose(1, 2).reshape(feature.shape[0], -1, *grid)


def _listed(shapes: list[kdx.Shape]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [AttentionTransfer, SelectivityTransfer, ChannelDistillation, SolutionFlow]
