"""Losses on pooled features behind a trained projector: the teacher's classifier, orthogonality, correlation.

Features are vectors [B, D]; maps [B, C, H, W] and tokens [B, N, D] are averaged over their positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdx

LEAST = 1e-12


class SoftmaxRegression(kdx.Loss):
    """Softmax regression representation learning (Yang et al., ICLR 2021), one value per sample.

    A connector, 1x1 convolution, batch norm and ReLU, gives the student's last feature the teacher's width. The value
    is `feature` times the squared difference from the teacher's embedding [B, D] plus `regression` times that of the
    logits [B, K] which the teacher's own classifier gives for either, both means over the axis. The classifier is
    frozen and passes the gradient on. 0 where the connected feature is the teacher's. The published `regression` is 1
    for ImageNet and 5 for CIFAR.

    The ReLU is left out where the batches seen before training show that the teacher's embedding goes below 0. What is
    compared is what enters the teacher's classifier, where the authors average the teacher's last map.
    """

    name = "srrl"
    confidence = "code"
    inputs = {"student": "student.depth_100", "teacher": "teacher.embedding", "teacher_logits": "teacher.logits"}
    knobs = {"feature": kdx.Knob(1.0, at_least=0.0), "regression": kdx.Knob(1.0, at_least=0.0)}
    borrows = {"head": "teacher.classifier"}

    rectify: Tensor

    def __init__(self, config: SoftmaxRegression.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        teacher = given.shape("teacher")
        if len(teacher) != 1:
            raise kdx.PlanError(f"srrl feeds a vector to the teacher's classifier, but teacher is {list(teacher)}")
        layer = nn.Conv1d(_width("srrl", "student", given), teacher[0], 1, bias=False)
        nn.init.normal_(layer.weight, 0, math.sqrt(2 / teacher[0]))
        self.connector = nn.Sequential(layer, nn.BatchNorm1d(teacher[0]))
        self.register_buffer("rectify", torch.tensor(True))

    def calibrate(self, **tensors: Any) -> None:
        self.rectify &= (tensors["teacher"] >= 0).all()

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        teacher_logits: Tensor,
        feature: Tensor,
        regression: Tensor,
        head: Callable[[Tensor], Tensor],
    ) -> Tensor:
        connected = self.connector(_positions_last(student))
        pooled = torch.where(self.rectify, connected.relu(), connected).mean(2)
        gap = (pooled - teacher.detach()).square().mean(1)
        answer_gap = (head(pooled) - teacher_logits.detach()).square().mean(1)
        return feature * gap + regression * answer_gap


class OrthogonalProjector(nn.Module):
    """A linear map [B, D] -> [B, E] whose matrix has orthonormal rows or columns, whichever are fewer, at any time.

    It is the orthogonal factor of a trained matrix, with the signs that make the triangular factor positive.
    """

    def __init__(self, source: int, wanted: int) -> None:
        super().__init__()
        self.is_wide = wanted < source
        self.raw = nn.Parameter(torch.randn(max(source, wanted), min(source, wanted)))

    def matrix(self) -> Tensor:
        """[E, D]."""
        q: Tensor
        r: Tensor
        q, r = torch.linalg.qr(self.raw)
        q = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
        return q.T if self.is_wide else q

    def forward(self, source: Tensor) -> Tensor:
        return source @ self.matrix().T


class OrthogonalDistillation(kdx.Loss):
    """Distillation through an orthogonal projector (Miles, Elezi, Deng: VkD, CVPR 2024), one value per sample.

    The student's feature, averaged over its positions and projected, against the teacher's, averaged and standardised
    over its channels; Huber difference with its bend at 1, mean over channels. By default of the last stages. The
    projector cannot change lengths, so that the student has to. 0 where the projected feature is the standardised one.
    Published weight: 1.

    The authors' paper whitens the teacher for generative tasks; this is the form for classification. Their matrix comes
    from the matrix exponential, this one from a QR decomposition: the sets of matrices agree up to signs.
    """

    name = "vkd"
    confidence = "code"
    inputs = {"student": "student.depth_100", "teacher": "teacher.depth_100"}

    def __init__(self, config: OrthogonalDistillation.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        self.projector = OrthogonalProjector(_width("vkd", "student", given), _width("vkd", "teacher", given))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        wanted = _pool(teacher).detach()
        wanted = F.layer_norm(wanted, wanted.shape[1:])
        return F.smooth_l1_loss(self.projector(_pool(student)), wanted, reduction="none").mean(1)


def log_distance(student: Tensor, teacher: Tensor, power: float = 4.0) -> Tensor:
    """`log(sum |student - teacher|^power)` over samples and channels of vectors [B, D], 0-d."""
    return ((student - teacher).abs().pow(power).sum() + LEAST).log()


class SimpleProjector(kdx.Loss):
    """The simple projector recipe (Miles and Mikolajczyk, AAAI 2024), one value for the batch, 0-d.

    A linear layer gives the student's feature [B, D] the teacher's width; both are standardised over the batch, and
    `log(sum |s - t|^power)` is the value. By default of what enters the classifiers. A perfect student has the value
    `log(1e-12)`. Published weight: 2, along with `kd` at temperature 1.
    """

    name = "srd"
    confidence = "code"
    inputs = {"student": "student.embedding", "teacher": "teacher.embedding"}

    @dataclass(frozen=True)
    class Config:
        power: float = 4.0

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        if not 1 < config.power < math.inf:
            raise kdx.ConfigError(f"power: found {config.power}, expected a number above 1")
        width = _width("srd", "teacher", given)
        self.projector = nn.Linear(_width("srd", "student", given), width)
        self.student_norm = nn.BatchNorm1d(width, eps=1e-4, affine=False)
        self.teacher_norm = nn.BatchNorm1d(width, eps=1e-4, affine=False)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        ours = self.student_norm(self.projector(_pool(student)))
        return log_distance(ours, self.teacher_norm(_pool(teacher).detach()), self.config.power)


def channel_correlation(student: Tensor, teacher: Tensor, alpha: float = 1.01) -> Tensor:
    """`log2(sum_d |v_d - 1|^(2 alpha))`, 0-d, of vectors [B, D].

    `v_d` is the mean over the batch of the product of both columns d, each standardised with the unbiased deviation.
    """
    products = (_standardised(student) * _standardised(teacher.detach())).mean(0)
    return (products - 1).abs().pow(2 * alpha).sum().clamp(min=LEAST).log2()


def mutual_information(student: Tensor, teacher: Tensor) -> Tensor:
    """Minus the mutual information of two batches of vectors [B, D], [B, E], in the second-order form, 0-d.

    `sum(G_s^2 - G_st^2)`, where the `G` are the cosines between samples of the student and their product with those of
    the teacher, each divided by its trace.
    """
    ours, theirs = F.normalize(student, dim=1), F.normalize(teacher.detach(), dim=1)
    own = ours @ ours.T
    joint = own * (theirs @ theirs.T)
    own, joint = (kernel / kernel.diagonal().sum().clamp(min=LEAST) for kernel in (own, joint))
    return (own.square() - joint.square()).sum()


class InformationTheoretic(kdx.Loss):
    """Information-theoretic distillation (Miles, Rodriguez, Mikolajczyk, BMVC 2022), one value for the batch, 0-d.

    `correlation` times the log of how far each channel is from the teacher's over the batch, plus `mutual` times minus
    the mutual information. By default of what enters the classifiers. A linear layer gives the student's feature
    [B, D] the teacher's width; for `mutual` only where the widths differ. The value is not bounded below by 0. Two
    samples at least.

    alpha: 1.01 in most of the authors' settings, 1.5 in one for CIFAR.
    """

    name = "itrd"
    confidence = "values"
    inputs = {"student": "student.embedding", "teacher": "teacher.embedding"}
    knobs = {"correlation": kdx.Knob(2.0, at_least=0.0), "mutual": kdx.Knob(1.0, at_least=0.0)}

    @dataclass(frozen=True)
    class Config:
        alpha: float = 1.01

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        if not 1 <= config.alpha < math.inf:
            raise kdx.ConfigError(f"alpha: found {config.alpha}, expected a number from 1")
        widths = _width("itrd", "student", given), _width("itrd", "teacher", given)
        self.projector = nn.Linear(*widths)
        self.is_even = widths[0] == widths[1]

    def forward(self, student: Tensor, teacher: Tensor, correlation: Tensor, mutual: Tensor) -> Tensor:
        student, teacher = _pool(student), _pool(teacher)
        projected = self.projector(student)
        apart = channel_correlation(projected, teacher, self.config.alpha)
        return correlation.mean() * apart + mutual.mean() * mutual_information(
            student if self.is_even else projected, teacher
        )


def _standardised(rows: Tensor) -> Tensor:
    """Columns with mean 0 and unbiased deviation 1; a constant one is 0, with no gradient."""
    centred = rows - rows.mean(0)
    variance = centred.square().sum(0) / max(len(rows) - 1, 1)
    return centred * torch.where(variance > LEAST, variance, torch.inf).rsqrt()


def _width(who: str, side: str, given: kdx.Given) -> int:
    """The channels of the student's or the teacher's feature."""
    shape = given.shape(side)
    if len(shape) not in (1, 2, 3):
        raise kdx.PlanError(
            f"{who} needs vectors [D], tokens [N, D] or maps [C, H, W], but {side} is {list(shape)}; tap another tensor"
        )
    return shape[0] if len(shape) == 3 else shape[-1]


def _positions_last(feature: Tensor) -> Tensor:
    """[B, D], [B, N, D] or [B, C, H, W] as [B, channels, positions]."""
    if feature.ndim == 4:
        return feature.flatten(2)
    return feature[:, :, None] if feature.ndim == 2 else feature.transpose(1, 2)


def _pool(feature: Tensor) -> Tensor:
    """The mean over positions, [B, D]."""
    return _positions_last(feature).mean(2)


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [SoftmaxRegression, OrthogonalDistillation, SimpleProjector, InformationTheoretic]
