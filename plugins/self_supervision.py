"""Distillation of a self-supervised task: to tell which image of a batch an altered one was made from.

Each loss reads the plain images and some altered views of them, which `data.views` makes; quarter turns are the
published ones. The two losses together, beside `cross_entropy` and `kd` on the plain images, are the published method.
They see one micro-batch: with `train.accumulate` there are fewer images to choose from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdx

TURNS = ("r90", "r180", "r270")
"""The views that are read where a config names no others."""


def rank(scores: Tensor, right: Tensor) -> Tensor:
    """How many entries of each row [N, K] are above the one at `right` [N], int64 [N]; 0 is a right first choice."""
    return (scores > scores.gather(1, right[:, None])).sum(1)


def selected(ranks: Tensor, keep: float) -> Tensor:
    """All rows of rank 0 and the given share of the others, those of low rank first; bool [N]."""
    wrong = (ranks > 0).sum()
    count = len(ranks) - wrong + (keep * wrong).floor()
    place = torch.empty_like(ranks)
    place[ranks.argsort(stable=True)] = torch.arange(len(ranks), device=ranks.device)
    return place < count


def mean_of(values: Tensor, kept: Tensor) -> Tensor:
    """The mean of the values [N] at the kept places, 0-d; 0 where there are none."""
    return torch.where(kept, values, 0.0).sum() / kept.sum().clamp(min=1)


def divergence(student: Tensor, teacher: Tensor, temperature: Tensor) -> Tensor:
    """`tau^2 KL(teacher || student)` of softened rows [N, K], [N]; the temperature is 0-d, or [B] for N a multiple."""
    if temperature.ndim:
        temperature = temperature.repeat(len(student) // len(temperature))
    tau = kdx.per_sample(temperature, student)
    ours, theirs = F.log_softmax(student / tau, dim=1), F.log_softmax(teacher / tau, dim=1)
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1) * temperature.square()


def similarities(plain: Tensor, views: Tensor) -> Tensor:
    """The cosine of each altered embedding [V * B, D] with each plain one [B, D]: [V * B, B]."""
    return F.normalize(views, dim=1) @ F.normalize(plain, dim=1).T


class AlteredLogits(kdx.Loss):
    """Soft targets on altered views (Xu et al.: SSKD, ECCV 2020), 0-d: `kd` of selected views at `temperature`.

    student_views, teacher_views: the logits [B, K] of V views, in the same order.

    Selected are the views that the teacher classifies rightly and, of the others, the share `keep` in which the right
    class ranks highest. What is right for a sample without a label is the teacher's first choice for the plain image.
    0 for a perfect student. Published: weight 2.7 and all views, beside 0.1 of the labels and 0.9 of `kd`.
    """

    name = "sskd_logits"
    confidence = "code"
    inputs = {
        "student_views": kdx.Many(*(f"student@{view}.logits" for view in TURNS)),
        "teacher_views": kdx.Many(*(f"teacher@{view}.logits" for view in TURNS)),
        "teacher": "teacher.logits",
        "label": "batch.label",
    }
    knobs = {"temperature": kdx.Knob(4.0, above=0.0)}

    @dataclass(frozen=True)
    class Config:
        keep: float = 1.0

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        _check(config.keep, given, "sskd_logits")

    def forward(
        self,
        student_views: list[Tensor],
        teacher_views: list[Tensor],
        teacher: Tensor,
        label: Tensor,
        temperature: Tensor,
    ) -> Tensor:
        ours, theirs = torch.cat(student_views), torch.cat(teacher_views).detach()
        right = torch.where(label >= 0, label, teacher.argmax(1)).repeat(len(student_views))
        kept = selected(rank(theirs, right), self.config.keep)
        return mean_of(divergence(ours, theirs, temperature), kept)


class SelfSupervision(kdx.Loss):
    """Distillation of the similarity of views to images (Xu et al.: SSKD, ECCV 2020), 0-d, without any label.

    student, teacher: embeddings [B, D] of the plain images; student_views, teacher_views: those of V altered views, in
    the same order. Either net has a head of two layers, trained here, before the cosines of its views with all plain
    images. The student's are drawn to the teacher's: KL at `temperature` of the selected rows, which are those in which
    the teacher's head finds the right image and, of the others, the share `keep` in which it ranks highest.
    The value is `transfer` times that term plus `task` times the cross-entropy, at temperature 1, by which the
    teacher's head learns the task itself; so it is not 0 for a perfect student. The head takes no gradient from the
    student's term and gives none to the teacher. By default both learn together. The authors train the head
    beforehand, for 60 epochs; that is a first stage in which `transfer` and the weights of all other losses are 0, and
    a second one in which `task` is 0, as `configs/methods/sskd.yaml` shows.
    Published: weight 10.

    width: of the heads' two layers; that of each embedding by default.
    """

    name = "sskd"
    confidence = "code"
    inputs = {
        "student": "student.embedding",
        "teacher": "teacher.embedding",
        "student_views": kdx.Many(*(f"student@{view}.embedding" for view in TURNS)),
        "teacher_views": kdx.Many(*(f"teacher@{view}.embedding" for view in TURNS)),
    }
    knobs = {
        "temperature": kdx.Knob(0.5, above=0.0),
        "transfer": kdx.Knob(1.0, at_least=0.0),
        "task": kdx.Knob(1.0, at_least=0.0),
    }

    @dataclass(frozen=True)
    class Config:
        keep: float = 0.75
        width: int | None = None

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        _check(config.keep, given, "sskd")
        if config.width is not None and config.width < 1:
            raise kdx.ConfigError(f"width: found {config.width}, expected 1 or more")
        for who in ("student", "teacher"):
            shapes = {given.shape(who), *given.shapes[f"{who}_views"]}
            if len(shapes) > 1 or len(given.shape(who)) != 1:
                raise kdx.PlanError(f"sskd compares embeddings [D] of equal width, but {who} gives {sorted(shapes)}")
        self.student_head = _head(given.shape("student")[0], config.width)
        self.teacher_head = _head(given.shape("teacher")[0], config.width)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        student_views: list[Tensor],
        teacher_views: list[Tensor],
        temperature: Tensor,
        transfer: Tensor,
        task: Tensor,
    ) -> Tensor:
        ours = similarities(self.student_head(student), self.student_head(torch.cat(student_views)))
        views = torch.cat(teacher_views).detach()
        theirs = similarities(self.teacher_head(teacher.detach()), self.teacher_head(views))
        image = torch.arange(len(student), device=student.device).repeat(len(student_views))
        own = F.cross_entropy(theirs, image)
        theirs = theirs.detach()
        kept = selected(rank(theirs, image), self.config.keep)
        return transfer.mean() * mean_of(divergence(ours, theirs, temperature), kept) + task.mean() * own


def _head(width: int, inner: int | None) -> nn.Sequential:
    out = inner or width
    return nn.Sequential(nn.Linear(width, out), nn.ReLU(), nn.Linear(out, out))


def _check(keep: float, given: kdx.Given, name: str) -> None:
    if not 0 <= keep <= 1:
        raise kdx.ConfigError(f"keep: found {keep}, expected a share from 0 to 1")
    mine, theirs = (len(given.shapes[f"{who}_views"]) for who in ("student", "teacher"))
    if mine != theirs:
        raise kdx.PlanError(f"{name}: found {mine} student_views and {theirs} teacher_views, expected as many")


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [AlteredLogits, SelfSupervision]
