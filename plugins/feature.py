"""Losses on inner features: plain regression, hints with a regressor of their own, and attention transfer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

import kdx

DISTANCES = ("l2", "l1", "smooth_l1", "cosine")
REGRESSORS = ("conv", "conv1x1")
FORMS = ("code", "paper")


def distance(student: Tensor, teacher: Tensor, kind: str = "l2") -> Tensor:
    """How far two equal-shaped features [B, C, ...] are from each other, mean over all elements of a sample, [B].

    `l2` is the squared difference, `l1` the absolute one, `smooth_l1` Huber's with its bend at 1, `cosine` one minus
    the cosine along the channels (axis 1), mean over positions.
    """
    teacher = teacher.detach()
    match kind:
        case "l2":
            values = (student - teacher).square()
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
    inputs = {"student": kdx.REQUIRED, "teacher": kdx.REQUIRED}
    same_shape = (("student", "teacher"),)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return distance(student, teacher)


class Hint(kdx.Loss):
    """Hint regression with a regressor of its own (Romero et al.: FitNets, ICLR 2015), one value per sample.

    Maps [B, C, H, W]. 0 where the regressor's output equals the teacher's map.

    distance: `l2`, `l1`, `smooth_l1` or `cosine`.
    regressor: `conv` reaches the teacher's size by its kernel, axis by axis: 3 with stride 2 from twice the size, a
        transposed 4 with stride 2 from half of it, else `1 + H_student - H_teacher`; then batch norm. `conv1x1` is a
        1x1 convolution and batch norm, and the larger of the two maps is average-pooled to the smaller one.
    relu: whether a ReLU ends the regressor; by default for `conv` only. It suits teacher maps after a ReLU.
    """

    name = "fitnet"
    inputs = {"student": kdx.REQUIRED, "teacher": kdx.REQUIRED}

    @dataclass(frozen=True)
    class Config:
        distance: str = "l2"
        regressor: str = "conv"
        relu: bool | None = None

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        _check_word("distance", config.distance, DISTANCES)
        _check_word("regressor", config.regressor, REGRESSORS)
        student, teacher = given.shape("student"), given.shape("teacher")
        if len(student) != 3 or len(teacher) != 3:
            raise kdx.PlanError(
                f"fitnet regresses maps [C, H, W], but student is {list(student)} and teacher {list(teacher)}; "
                "use the loss mse after an aligner"
            )
        is_conv = config.regressor == "conv"
        layer = _size_rule(student, teacher) if is_conv else nn.Conv2d(student[0], teacher[0], 1, bias=False)
        layers: list[nn.Module] = [layer, nn.BatchNorm2d(teacher[0])]
        if is_conv if config.relu is None else config.relu:
            layers.append(nn.ReLU())
        self.regressor = nn.Sequential(*layers)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.config.regressor == "conv1x1":
            student, teacher = pool_to_smaller(student, teacher)
        return distance(self.regressor(student), teacher, self.config.distance)


def attention(feature: Tensor, power: float = 2.0) -> Tensor:
    """Where a map [B, C, H, W] is active: the mean over channels of `|x|^power`, scaled to length 1, [B, H * W]."""
    magnitude = feature.square() if power == 2 else feature.abs().pow(power)
    return F.normalize(magnitude.mean(1).flatten(1), dim=1)


def attention_transfer(student: Tensor, teacher: Tensor, *, form: str = "code", power: float = 2.0) -> Tensor:
    """The distance of two attention maps, [B], of features [B, C, H, W] whose channels may differ.

    `code` is the mean over positions of the squared difference, `paper` the 2-norm. The larger map is average-pooled to
    the smaller one before the power is taken.
    """
    student, teacher = pool_to_smaller(student, teacher.detach())
    difference = attention(student, power) - attention(teacher, power)
    return difference.square().mean(1) if form == "code" else difference.norm(dim=1)


class AttentionTransfer(kdx.Loss):
    """Attention transfer (Zagoruyko and Komodakis, ICLR 2017), one value per sample and no parameters.

    0 where both look at the same places; a positive factor on either side and the order of channels do not count.
    Features are maps [B, C, H, W] or tokens [B, N, D]. Tokens lie as the map that they are compared with, or in
    a square; two features of tokens that are not both square lie in a line. Drop prefix tokens in the tap.

    form: `code` is what the authors' code computes, `paper` their equation (which halves the weight as well).
    p: the power of the activations, from 1.
    """

    name = "at"
    inputs = {"student": kdx.REQUIRED, "teacher": kdx.REQUIRED}

    @dataclass(frozen=True)
    class Config:
        form: str = "code"
        p: float = 2.0

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        _check_word("form", config.form, FORMS)
        if not 1 <= config.p < math.inf:
            raise kdx.ConfigError(f"p: found {config.p}, expected a power from 1")
        self.student_grid, self.teacher_grid = _grids(given.shape("student"), given.shape("teacher"))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return attention_transfer(
            _as_map(student, self.student_grid),
            _as_map(teacher, self.teacher_grid),
            form=self.config.form,
            power=self.config.p,
        )


def pool_to_smaller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps [B, C, H, W], average-pooled to the smaller height and the smaller width of both."""
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    pooled = [x if tuple(x.shape[2:]) == size else F.adaptive_avg_pool2d(x, size) for x in (a, b)]
    return pooled[0], pooled[1]


def _size_rule(student: kdx.Shape, teacher: kdx.Shape) -> nn.Module:
    """The convolution that takes a student's map to the teacher's size."""
    sizes = list(zip(student[1:], teacher[1:], strict=True))
    if all(2 * s == t for s, t in sizes):
        return nn.ConvTranspose2d(student[0], teacher[0], kernel_size=4, stride=2, padding=1, bias=False)
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


def _grids(student: kdx.Shape, teacher: kdx.Shape) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of the positions of both features."""
    for who, shape in {"student": student, "teacher": teacher}.items():
        if len(shape) not in (2, 3):
            raise kdx.PlanError(f"at needs places: a map [C, H, W] or tokens [N, D], but {who} is {list(shape)}")
        if math.prod(shape[1:] if len(shape) == 3 else shape[:1]) == 1:
            raise kdx.PlanError(f"at compares places, but {who} {list(shape)} has only one; tap it before it is pooled")
    if len(student) == 3 and len(teacher) == 3:
        return (student[1], student[2]), (teacher[1], teacher[2])
    if len(student) == 2 and len(teacher) == 2:
        squares = _square(student[0]), _square(teacher[0])
        if squares[0] is not None and squares[1] is not None:
            return squares[0], squares[1]
        return (1, student[0]), (1, teacher[0])
    if len(student) == 3:
        grid = (student[1], student[2])
        return grid, _grid_of_tokens(teacher[0], grid)
    grid = (teacher[1], teacher[2])
    return _grid_of_tokens(student[0], grid), grid


def _grid_of_tokens(tokens: int, other: tuple[int, int]) -> tuple[int, int]:
    """How tokens lie that are compared with a map of the size `other`."""
    if tokens == other[0] * other[1]:
        return other
    grid = (1, tokens) if other[0] == 1 else _square(tokens)
    if grid is None:
        raise kdx.PlanError(
            f"at compares places, but {tokens} tokens do not lie as a map of {other[0]}x{other[1]}; drop prefix tokens "
            "in the tap, or put an aligner between them"
        )
    return grid


def _square(count: int) -> tuple[int, int] | None:
    side = math.isqrt(count)
    return (side, side) if side * side == count else None


def _as_map(feature: Tensor, grid: tuple[int, int]) -> Tensor:
    return feature if feature.ndim == 4 else feature.transpose(1, 2).reshape(feature.shape[0], -1, *grid)


def _check_word(name: str, found: str, choices: tuple[str, ...]) -> None:
    if found not in choices:
        raise kdx.ConfigError(f"{name}: found {found!r}, expected one of {', '.join(choices)}")


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [MeanSquaredError, Hint, AttentionTransfer]
