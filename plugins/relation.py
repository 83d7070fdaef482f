"""Losses on relations between the samples of a batch: similarities, distances, angles and ranks.

They compare a [B, B] picture of the student's batch with the teacher's, so the two features may differ in every axis
but the batch. They see one micro-batch: with `train.accumulate` there are fewer relations. None needs a label.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdx

TINY = 1e-12
CC_FORMS = ("paper", "adjacent")


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of two similarity matrices, one row's mean per sample, [B], of features [B, ...].

    The mean over the batch is `||G_s - G_t||_F^2 / B^2`, where `G` holds inner products and each row has length 1.
    """
    return (_similarity_rows(student) - _similarity_rows(teacher.detach())).square().mean(1)


class SimilarityPreserving(kdx.Loss):
    """Similarity-preserving distillation (Tung and Mori, ICCV 2019), one value per sample and no parameters.

    Features of any shape [B, ...], by default the last stage before pooling. 0 where both nets find the same samples
    alike; a rotation or a positive factor of either feature does not count. Published weight: 3000.
    """

    name = "sp"
    confidence = "values"
    inputs = {"student": "student.depth_100", "teacher": "teacher.depth_100"}

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return similarity_preserving(student, teacher)


def gaussian_correlation(rows: Tensor, gamma: float = 0.4, order: int = 2) -> Tensor:
    """The kernel `exp(-gamma |x_i - x_j|^2)` of unit rows [B, D] as its Taylor series up to `order`, [B, B]."""
    inner = rows @ rows.T
    terms = [(2 * gamma) ** p / math.factorial(p) * inner**p for p in range(order + 1)]
    return math.exp(-2 * gamma) * torch.stack(terms).sum(0)


def correlation_congruence(student: Tensor, teacher: Tensor, *, gamma: float = 0.4, order: int = 2) -> Tensor:
    """Squared difference of two kernel matrices, one row's mean per sample, [B], of vectors [B, D]."""
    kernels = [gaussian_correlation(F.normalize(rows, dim=1), gamma, order) for rows in (student, teacher)]
    return (kernels[0] - kernels[1]).square().mean(1)


def adjacent_correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over neighbours in the batch of `sum_d |s - t|_i |s - t|_(i+1)`, 0-d, of vectors [B, D] of one width."""
    gap = (student - teacher).abs()
    return (gap[:-1] * gap[1:]).sum() / max(len(gap) - 1, 1)


class CorrelationCongruence(kdx.Loss):
    """Correlation congruence (Peng et al., ICCV 2019) of vectors [B, D]; other shapes are flattened.

    form: `paper` compares Gaussian kernel matrices, one value per sample; `adjacent` is what a public benchmark
        computes instead, 0-d: the product of the absolute differences of neighbours. The two share no scale.
        Published weight of `adjacent`: 0.02.
    embed: the width of a linear layer on either side, both trained; 0 for none. `adjacent` without it needs equal
        widths. Trained layers can also agree by carrying less: the term alone is no measure of agreement.
    gamma, order: of the Gaussian and of its series, in the form `paper`.

    0 for a perfect student without `embed`. A public library gives the norm where this gives its square.
    """

    name = "cc"
    confidence = "values"
    inputs = {"student": "student.embedding", "teacher": "teacher.embedding"}

    @dataclass(frozen=True)
    class Config:
        form: str = "paper"
        embed: int = 128
        gamma: float = 0.4
        order: int = 2

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_choice("form", config.form, CC_FORMS)
        if config.embed < 0:
            raise kdx.ConfigError(f"embed: found {config.embed}, expected a width, or 0 for no layer")
        if not 0 < config.gamma < math.inf or config.order < 1:
            raise kdx.ConfigError(
                f"gamma, order: found {config.gamma} and {config.order}, expected a number above 0 and a power from 1"
            )
        student, teacher = (math.prod(given.shape(name)) for name in ("student", "teacher"))
        if config.form == "adjacent" and not config.embed and student != teacher:
            raise kdx.PlanError(
                f"cc with `form: adjacent` subtracts the two features, but they have {student} and {teacher} numbers; "
                "say `embed`, the width that both are brought to"
            )
        self.student_layer = nn.Linear(student, config.embed) if config.embed else nn.Identity()
        self.teacher_layer = nn.Linear(teacher, config.embed) if config.embed else nn.Identity()

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        ours = self.student_layer(student.flatten(1))
        theirs = self.teacher_layer(teacher.detach().flatten(1))
        if self.config.form == "adjacent":
            return adjacent_correlation(ours, theirs)
        return correlation_congruence(ours, theirs, gamma=self.config.gamma, order=self.config.order)


def relational_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber difference of distance matrices in units of their own mean, one row's mean per sample, [B].

    Vectors [B, D]. The mean of either side is over its pairs of different samples, and has a gradient.
    """
    ours, theirs = _relative_distances(student), _relative_distances(teacher.detach())
    return F.smooth_l1_loss(ours, theirs, reduction="none").mean(1)


def relational_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber difference of the cosines of the angle at each sample between each two others, mean over pairs, [B].

    Vectors [B, D]. Takes memory for B^3 cosines.
    """
    return F.smooth_l1_loss(_cosines(student), _cosines(teacher.detach()), reduction="none").mean((1, 2))


class RelationalDistillation(kdx.Loss):
    """Relational distillation by distances and angles (Park et al., CVPR 2019), one value per sample.

    Vectors [B, D]; other shapes are flattened. The value is `distance * D + angle * A`. 0 for a perfect student;
    shifts, rotations and positive factors of either side do not count. Its memory grows with B^3, so keep B to a few
    hundred. A pair closer than 1e-6 has no gradient.

    normalize: bring each vector to length 1 first. The authors do so, with weight 1; the public classification
        benchmark does not, with weight 25 (its weights 25 and 50 stand in the same ratio).
    """

    name = "rkd"
    confidence = "values"
    inputs = {"student": "student.embedding", "teacher": "teacher.embedding"}
    knobs = {"distance": kdx.Knob(1.0, at_least=0.0), "angle": kdx.Knob(2.0, at_least=0.0)}

    @dataclass(frozen=True)
    class Config:
        normalize: bool = False

    config: Config

    def forward(self, student: Tensor, teacher: Tensor, distance: Tensor, angle: Tensor) -> Tensor:
        student, teacher = student.flatten(1), teacher.flatten(1)
        if self.config.normalize:
            student, teacher = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
        return distance * relational_distance(student, teacher) + angle * relational_angle(student, teacher)


def probabilistic_transfer(student: Tensor, teacher: Tensor, eps: float = 1e-7) -> Tensor:
    """`mean_j Q_ij log((Q_ij + eps) / (P_ij + eps))`, [B], of vectors [B, D].

    Rows of P (student) and Q (teacher) are cosines shifted to `0..1` and divided by their sum.
    """
    ours, theirs = _affinities(student), _affinities(teacher.detach())
    return (theirs * ((theirs + eps) / (ours + eps)).log()).mean(1)


class ProbabilisticTransfer(kdx.Loss):
    """Probabilistic knowledge transfer (Passalis and Tefas, ECCV 2018), one value per sample and no parameters.

    Vectors [B, D]; other shapes are flattened. 0 where both nets give a sample the same neighbours; positive factors
    and rotations do not count. The mean is over B^2 pairs, so the value falls with about 1 / B^2. Published weight:
    30000 at B = 64.
    """

    name = "pkt"
    confidence = "values"
    inputs = {"student": "student.embedding", "teacher": "teacher.embedding"}

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return probabilistic_transfer(student.flatten(1), teacher.flatten(1))


def rank_transfer(student: Tensor, teacher: Tensor, alpha: Tensor, beta: Tensor, length: int = 4) -> Tensor:
    """Minus the log-likelihood (Plackett-Luce) of the teacher's order of nearest others, [B], of vectors [B, D].

    The student's score of another sample at distance d is `-alpha * d^beta`. The order is that of the teacher's
    `length` nearest, or of all others where there are fewer.
    """
    B = len(student)
    far = torch.eye(B, dtype=torch.bool, device=student.device)
    apart = _distances(teacher.detach()).masked_fill(far, math.inf)
    nearest = apart.sort(dim=1, stable=True).indices[:, : min(length, B - 1)]
    distances = _distances(student).gather(1, nearest)
    scores = -kdx.per_sample(alpha, distances) * distances ** kdx.per_sample(beta, distances)
    left = scores.flip(1).logcumsumexp(1).flip(1)  # of this one and all that come after it
    return (left - scores).sum(1)


class DarkRank(kdx.Loss):
    """DarkRank, its hard form (Chen, Wang, Zhang, AAAI 2018), one value per sample and no parameters.

    Vectors [B, D]; other shapes are flattened. The student learns in which order the nearest others of a sample come;
    it is above 0 also for a perfect student, and small where the distances that the order rests on differ much.

    length: how many of the nearest others are ordered.
    normalize: bring each vector to length 1 first, as the defaults of alpha and beta suppose.
    """

    name = "darkrank"
    confidence = "code"
    inputs = {"student": "student.embedding", "teacher": "teacher.embedding"}
    knobs = {"alpha": kdx.Knob(3.0, above=0.0), "beta": kdx.Knob(3.0, at_least=1.0)}

    @dataclass(frozen=True)
    class Config:
        length: int = 4
        normalize: bool = True

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        if config.length < 2:
            raise kdx.ConfigError(f"length: found {config.length}, expected at least 2 samples to put in order")

    def forward(self, student: Tensor, teacher: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        student, teacher = student.flatten(1), teacher.flatten(1)
        if self.config.normalize:
            student, teacher = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
        return rank_transfer(student, teacher, alpha, beta, self.config.length)


def relation_graph_edges(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of two matrices of squared distances, each divided by its largest, one row's mean, [B]."""
    return (_relative_squares(student) - _relative_squares(teacher.detach())).square().mean(1)


def relation_graph_steps(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """Squared difference of how far each sample moves from one map to the next, relative to the furthest, [B].

    Each side gives two maps [B, C, H, W] of one net, whose shapes may differ: both are averaged to the smaller number
    of channels, height and width.
    """
    ours, theirs = _relative_step(*student), _relative_step(*(one.detach() for one in teacher))
    return (ours - theirs).square()


class RelationGraph(kdx.Loss):
    """Instance relationship graph (Liu et al., CVPR 2019), one value per sample and no parameters.

    student, teacher: the layers that are compared, in the order of the net and as many on either side: maps
        [B, C, H, W], tokens [B, N, D] or vectors [B, D]. At least two of them are maps or tokens.
    vertex, edge, step: the weights of three parts: logits (mean squared difference), distances between samples (mean
        over the layers), and how far samples move from one map to the next (mean over such steps). The defaults are
        those of a public port and are not known to be the authors'.

    0 for a perfect student.
    """

    name = "irg"
    confidence = "code"
    inputs = {
        "student": kdx.Many("student.depth_50", "student.depth_100", "student.embedding"),
        "teacher": kdx.Many("teacher.depth_50", "teacher.depth_100", "teacher.embedding"),
        "student_logits": "student.logits",
        "teacher_logits": "teacher.logits",
    }
    knobs = {
        "vertex": kdx.Knob(0.1, at_least=0.0),
        "edge": kdx.Knob(5.0, at_least=0.0),
        "step": kdx.Knob(5.0, at_least=0.0),
    }
    same_shape = (("student_logits", "teacher_logits"),)

    def __init__(self, config: Any, given: kdx.Given) -> None:
        super().__init__(config, given)
        places = {side: [len(shape) > 1 for shape in given.shapes[side]] for side in ("student", "teacher")}
        if places["student"] != places["teacher"]:
            raise kdx.PlanError(
                f"irg compares layer by layer, but student gives {_kinds(places['student'])} and teacher "
                f"{_kinds(places['teacher'])}; name as many of the same kinds, in the same order"
            )
        if sum(places["student"]) < 2:
            raise kdx.PlanError(
                f"irg follows samples from one map to the next, but it was given {_kinds(places['student'])}; "
                "expected at least two maps or token sequences"
            )

    def forward(
        self,
        student: list[Tensor],
        teacher: list[Tensor],
        student_logits: Tensor,
        teacher_logits: Tensor,
        vertex: Tensor,
        edge: Tensor,
        step: Tensor,
    ) -> Tensor:
        vertices = kdx.squared_distance(student_logits, teacher_logits)
        edges = torch.stack([relation_graph_edges(s, t) for s, t in zip(student, teacher, strict=True)]).mean(0)
        pairs = zip(pairwise(_maps(student)), pairwise(_maps(teacher)), strict=True)
        steps = torch.stack([relation_graph_steps(ours, theirs) for ours, theirs in pairs]).mean(0)
        return vertex * vertices + edge * edges + step * steps


def _similarity_rows(feature: Tensor) -> Tensor:
    rows = feature.flatten(1)
    return F.normalize(rows @ rows.T, dim=1)


def _distances(rows: Tensor) -> Tensor:
    """Euclidean distances [B, B]; 0 without gradient where they are below 1e-6, as on the diagonal."""
    squares = (rows[:, None] - rows[None]).square().sum(-1)
    return torch.where(squares > TINY, squares.clamp(min=TINY).sqrt(), 0.0)


def _relative_distances(rows: Tensor) -> Tensor:
    distances = _distances(rows)
    scale = distances.sum() / (distances > 0).sum().clamp(min=1)
    return distances / scale.clamp(min=TINY)


def _cosines(rows: Tensor) -> Tensor:
    """`[i, j, k]`: the cosine of the angle at i between j and k, 0 where one of these is i; [B, B, B]."""
    apart = rows[None] - rows[:, None]
    squares = apart.square().sum(-1, keepdim=True)
    directions = torch.where(squares > TINY, apart * squares.clamp(min=TINY).rsqrt(), 0.0)
    return directions @ directions.mT


def _affinities(rows: Tensor) -> Tensor:
    rows = F.normalize(rows, dim=1)
    shifted = (rows @ rows.T + 1) / 2
    return shifted / shifted.sum(1, keepdim=True)


def _relative_squares(feature: Tensor) -> Tensor:
    rows = feature.flatten(1)
    lengths = rows.square().sum(1)
    squares = (lengths[:, None] + lengths - 2 * rows @ rows.T).clamp(min=0)
    squares = squares.masked_fill(torch.eye(len(rows), dtype=torch.bool, device=rows.device), 0)
    return squares / squares.amax().clamp(min=TINY)


def _relative_step(before: Tensor, after: Tensor) -> Tensor:
    C, H, W = (min(a, b) for a, b in zip(before.shape[1:], after.shape[1:], strict=True))
    before, after = (F.adaptive_avg_pool3d(one[:, None], (C, H, W)) for one in (before, after))
    squares = (before - after).square().flatten(1).sum(1)
    return squares / squares.amax().clamp(min=TINY)


def _maps(layers: list[Tensor]) -> list[Tensor]:
    """Maps as they are and tokens as maps [B, D, N, 1], without the vectors."""
    return [one if one.ndim == 4 else one.transpose(1, 2)[..., None] for one in layers if one.ndim > 2]


def _kinds(places: list[bool]) -> str:
    return ", ".join("a map" if has_places else "a vector" for has_places in places)


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [
        SimilarityPreserving, CorrelationCongruence, RelationalDistillation, ProbabilisticTransfer, DarkRank,
        RelationGraph,
    ]  # fmt: skip
