"""Losses in which the student's feature is partly hidden, and the teacher's is generated from the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kdx

MASKS = ("channels", "positions")


class MaskedGeneration(kdx.Loss):
    """Masked generative distillation (Yang et al.: MGD, ECCV 2022), one value per sample.

    Maps [B, C, H, W], by default the last ones. A random part of the student's map is set to 0 and two 3x3 convolutions
    generate the teacher's map from the rest; the value is the squared difference over the whole map, summed over its
    elements. 0 where the generated map is the teacher's. Where channels differ, a 1x1 convolution comes first; the
    larger map is average-pooled to the smaller one. Published weight: 7e-5 (ImageNet) for channels, with `drop: 0.15`;
    2e-5 for positions, with `drop: 0.65` for detection and 0.75 for segmentation.

    mask: whole `channels` or whole `positions` are hidden.
    drop: the chance to be hidden.
    """

    name = "mgd"
    confidence = "code"
    inputs = {"student": "student.depth_100", "teacher": "teacher.depth_100"}

    @dataclass(frozen=True)
    class Config:
        mask: str = "channels"
        drop: float = 0.15

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_choice("mask", config.mask, MASKS)
        if not 0 <= config.drop < 1:
            raise kdx.ConfigError(f"drop: found {config.drop}, expected a chance from 0 and below 1")
        student, teacher = given.shape("student"), given.shape("teacher")
        _check_maps("mgd", {"student": student, "teacher": teacher})
        same = student[0] == teacher[0]
        self.connector = nn.Identity() if same else nn.Conv2d(student[0], teacher[0], 1)
        self.generator = generator(teacher[0])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = kdx.pool_to_smaller(student, teacher.detach())
        student = self.connector(student)
        size = (*student.shape[:2], 1, 1) if self.config.mask == "channels" else (len(student), 1, *student.shape[2:])
        chance = torch.rand(size, generator=self.given.generator, device=student.device)
        return _square_sum(self.generator(student * (chance >= self.config.drop)) - teacher)


class VitDistillation(kdx.Loss):
    """Feature distillation for vision transformers (Yang et al.: ViTKD, CVPR workshops 2024), one value per sample.

    Token features as maps [B, C, H, W], as stage taps give them, without prefix tokens. The value is `mimic` times the
    squared difference of the shallow features, each behind a linear layer, plus `generation` divided by `drop` times
    that of the last feature at random hidden places. There a learnt token stands in for the student's, and two 3x3
    convolutions generate the teacher's. All are sums over elements; 0 where every result is the teacher's. Places are
    matched one to one, so both nets need as many of them. The linear layers are there where widths differ. The default
    `mimic` and `generation` are the published ones, for use along with `nkd`.

    student_shallow, teacher_shallow: the first blocks; by default those at 8 and 16 hundredths of the depth, which are
        the first two of 12.
    drop: the share of the places that is hidden, rounded up to a whole place.
    """

    name = "vitkd"
    confidence = "code"
    inputs = {
        "student": "student.depth_100",
        "teacher": "teacher.depth_100",
        "student_shallow": kdx.Many("student.depth_8", "student.depth_16"),
        "teacher_shallow": kdx.Many("teacher.depth_8", "teacher.depth_16"),
    }
    knobs = {"mimic": kdx.Knob(3e-5, at_least=0.0), "generation": kdx.Knob(3e-6, at_least=0.0)}

    @dataclass(frozen=True)
    class Config:
        drop: float = 0.5

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        if not 0 < config.drop < 1:
            raise kdx.ConfigError(f"drop: found {config.drop}, expected a share between 0 and 1")
        student, teacher = given.shape("student"), given.shape("teacher")
        shallow: tuple[list[kdx.Shape], list[kdx.Shape]]
        shallow = given.shapes["student_shallow"], given.shapes["teacher_shallow"]
        if len(shallow[0]) != len(shallow[1]):
            raise kdx.PlanError(
                f"vitkd pairs the shallow features of both nets in order, but there are {len(shallow[0])} of the "
                f"student and {len(shallow[1])} of the teacher; name as many of each"
            )
        pairs = [*zip(*shallow, strict=True), (student, teacher)]
        for ours, theirs in pairs:
            _check_maps("vitkd", {"student": ours, "teacher": theirs})
            if ours[1:] != theirs[1:]:
                raise kdx.PlanError(
                    f"vitkd matches places one to one, but student {list(ours)} has {ours[1]}x{ours[2]} and teacher "
                    f"{list(theirs)} has {theirs[1]}x{theirs[2]}; use nets with the same grid, or mgd"
                )
        self.connectors = nn.ModuleList(
            nn.Identity() if ours[0] == theirs[0] else nn.Conv2d(ours[0], theirs[0], 1) for ours, theirs in pairs
        )
        self.token = nn.Parameter(torch.zeros(teacher[0], 1, 1))
        self.generator = generator(teacher[0])
        self.shown = int(teacher[1] * teacher[2] * (1 - config.drop))

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        student_shallow: list[Tensor],
        teacher_shallow: list[Tensor],
        mimic: Tensor,
        generation: Tensor,
    ) -> Tensor:
        *shallow, last = self.connectors
        mimicked = [
            _square_sum(connector(ours) - theirs.detach())
            for connector, ours, theirs in zip(shallow, student_shallow, teacher_shallow, strict=True)
        ]
        hidden = self._hidden(student)
        generated = self.generator(torch.where(hidden, self.token, last(student)))
        wrong = _square_sum((generated - teacher.detach()) * hidden)
        return mimic * torch.stack(mimicked).sum(0) + generation / self.config.drop * wrong

    def _hidden(self, like: Tensor) -> Tensor:
        """Which places are hidden, [B, 1, H, W]: as many of each sample."""
        places = like.shape[2] * like.shape[3]
        order = torch.rand((len(like), places), generator=self.given.generator, device=like.device).argsort(1)
        hidden = torch.ones_like(order, dtype=torch.bool).scatter(1, order[:, : self.shown], False)
        return hidden.reshape(len(like), 1, *like.shape[2:])


def generator(channels: int) -> nn.Sequential:
    """Two 3x3 convolutions with a ReLU between them."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
    )


def _square_sum(difference: Tensor) -> Tensor:
    """[B]."""
    return difference.square().flatten(1).sum(1)


def _check_maps(who: str, shapes: dict[str, kdx.Shape]) -> None:
    for side, shape in shapes.items():
        if len(shape) != 3:
            raise kdx.PlanError(
                f"{who} needs maps [C, H, W], but {side} is {list(shape)}; tap a stage, as in {side}.depth_50, which "
                "is a map also for transformers"
            )


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [MaskedGeneration, VitDistillation]
