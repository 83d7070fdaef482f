"""A frozen teacher of one modality for a student of another: what carries over where maps and classes do not fit.

A sample without the teacher's modality is left out by the engine. Features of two modalities have no common grid, so
they are compared after pooling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdx

DISTANCES = ("l2", "cosine")
REDUCTIONS = ("sum", "mean")


def pooled(feature: Tensor) -> Tensor:
    """A feature as one vector for each sample, [B, D]: maps [B, C, ...] are averaged over their places."""
    return feature if feature.ndim == 2 else feature.flatten(2).mean(2)


def feature_regression(student: Tensor, teacher: Tensor, kind: str = "l2") -> Tensor:
    """How far vectors [B, D] are apart, [B]: mean square of the differences, or one minus the cosine."""
    teacher = teacher.detach()
    if kind == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=1)
    return (student - teacher).square().mean(1)


class SupervisionTransfer(kdx.Loss):
    """Regression of a paired feature of another modality (Gupta, Hoffman, Malik, CVPR 2016), one value per sample.

    Vectors [B, D], by default the embeddings; maps [B, C, ...] are averaged over their places. No label is read. 0 for
    a student whose projected feature is the teacher's. It is followed by training with labels, or stands beside it.

    distance: `l2`, the mean square of the differences, or `cosine`, one minus the cosine.
    project: puts a linear layer behind the student's feature; left out, where the widths differ.
    standardise: gives each number of the teacher mean 0 and variance 1 over the batches seen before training, so that
        the value does not depend on the teacher's scale.

    The authors regress the last map of two images of one scene, whose grids agree, with half of the sum of squares.
    """

    name = "supervision_transfer"
    confidence = "paper"
    inputs = {"student": "student.embedding", "teacher": "teacher.embedding"}

    @dataclass(frozen=True)
    class Config:
        distance: str = "l2"
        project: bool | None = None
        standardise: bool = True

    config: Config
    count: Tensor
    mean: Tensor
    spread: Tensor

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_choice("distance", config.distance, DISTANCES)
        ours, theirs = (_width(self.name, name, given) for name in ("student", "teacher"))
        if config.project is False and ours != theirs:
            raise kdx.PlanError(
                f"supervision_transfer: student has {ours} numbers and teacher {theirs}; say `project: true`"
            )
        project = ours != theirs if config.project is None else config.project
        self.projector = nn.Linear(ours, theirs) if project else nn.Identity()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(theirs))
        self.register_buffer("spread", torch.zeros(theirs))

    def calibrate(self, **tensors: Any) -> None:
        rows = pooled(tensors["teacher"]).to(self.mean)
        count = self.count + len(rows)
        shift = rows.mean(0) - self.mean
        apart = (rows - rows.mean(0)).square().sum(0) + shift.square() * (self.count * len(rows) / count)
        self.spread.copy_(((self.spread.square() * self.count + apart) / count).sqrt())
        self.mean += shift * (len(rows) / count)
        self.count.copy_(count)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        theirs = pooled(teacher.detach())
        if self.config.standardise:
            known = (self.spread > 0).logical_and(self.count > 0)  # a number that never varies stays as it is
            theirs = torch.where(known, (theirs - self.mean) / torch.where(known, self.spread, 1.0), theirs)
            theirs = theirs.to(student.dtype)
        return feature_regression(self.projector(pooled(student)), theirs, self.config.distance)


def head_divergences(
    students: Sequence[Tensor], teachers: Sequence[Tensor], reduction: str = "sum", present: Tensor | None = None
) -> Tensor:
    """`KL(softmax(z_k) || softmax(s_k))` of M pairs of logits [B, K_k], mean over the teachers that are present, [B].

    `present` is bool [B, M]. The `reduction` `mean` divides each by its K.
    """
    each = []
    for ours, theirs in zip(students, teachers, strict=True):
        values = F.kl_div(ours.log_softmax(1), theirs.detach().log_softmax(1), reduction="none", log_target=True)
        each.append(values.sum(1) if reduction == "sum" else values.mean(1))
    found = torch.stack(each, 1)
    if present is None:
        return found.mean(1)
    return torch.where(present, found, 0.0).sum(1) / present.sum(1).clamp(min=1)


class SoundNet(kdx.Loss):
    """What M image nets recognise, predicted from sound (Aytar, Vondrick, Torralba: SoundNet, NeurIPS 2016), [B].

    `student` is the embedding [B, D], or a map that is averaged over its places; the loss owns a linear head for each
    teacher, so classes of the teachers need not be those of the data, nor the same. The value is the mean of the
    divergences at temperature 1, without labels. 0 for a student whose heads give the teachers' distributions. The
    heads are not deployed: the student's own classifier is trained with labels, beside or afterwards.

    reduction: `sum` over the classes, or their `mean`, as in the public code, whose weight 250 belongs to that.

    The authors compare windows of five seconds with the frames in them; here a sample is one window.
    """

    name = "soundnet"
    separable = True
    confidence = "code"
    inputs = {"student": "student.embedding", "teacher": kdx.Many("*.logits")}
    gaps = "teacher"

    @dataclass(frozen=True)
    class Config:
        reduction: str = "sum"

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_choice("reduction", config.reduction, REDUCTIONS)
        shapes: list[kdx.Shape] = given.shapes["teacher"]
        if wrong := [list(shape) for shape in shapes if len(shape) != 1]:
            raise kdx.PlanError(f"soundnet: found {wrong[0]} for one sample of a teacher, expected logits [K]")
        width = _width(self.name, "student", given)
        self.heads = nn.ModuleList(nn.Linear(width, shape[0]) for shape in shapes)

    def forward(self, student: Tensor, teacher: list[Tensor], present: Tensor | None = None) -> Tensor:
        embedding = pooled(student)
        return head_divergences([head(embedding) for head in self.heads], teacher, self.config.reduction, present)


def texture(spectra: Tensor) -> Tensor:
    """Statistics of sound that do not say when: [B, 3 F - 1] from log-mel spectrograms [B, 1, F, T].

    Mean and standard deviation of each band over time, and the correlation of each band with the next one.
    """
    bands = spectra.reshape(len(spectra), -1, spectra.shape[-1])
    mean = bands.mean(2)
    apart = bands - mean.unsqueeze(2)
    spread = apart.square().mean(2).sqrt()
    shared = (apart[:, 1:] * apart[:, :-1]).mean(2) / (spread[:, 1:] * spread[:, :-1]).clamp(min=1e-6)
    return torch.cat([mean, spread, shared], 1)


class AmbientSound(kdx.Loss):
    """Which kind of sound belongs to an image, told from the image (Owens et al., ECCV 2016), one value per sample.

    `student` is the embedding [B, D] of a net that sees, `sound` a log-mel spectrogram [B, 1, F, T]. Statistics of the
    sound are clustered over the batches seen before training; the value is the cross-entropy of a linear head, which
    the loss owns, with the number of the nearest cluster. It reads neither labels nor a teacher. It tends to 0 for a
    student that is sure of each cluster.

    clusters: how many, at most as many as there are samples in a batch. The authors have 30.

    Left out: the binary codes, which they tried beside clusters. Their statistics have more: modulations, and
    correlations of all bands. Clusters start as samples that lie far from each other, and follow mini-batches (Sculley,
    WWW 2010).
    """

    name = "ambient_sound"
    confidence = "paper"
    inputs = {"student": "student.embedding", "sound": "batch.mel"}

    @dataclass(frozen=True)
    class Config:
        clusters: int = 30

    config: Config
    centres: Tensor
    sizes: Tensor
    scale: Tensor

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        shape = given.shape("sound")
        if len(shape) not in (2, 3) or shape[-2] < 2:
            raise kdx.PlanError(
                f"ambient_sound: sound is {list(shape)} for one sample, expected a spectrogram [1, F, T]"
            )
        if config.clusters < 2:
            raise kdx.ConfigError(f"clusters: found {config.clusters}, expected 2 or more")
        size = 3 * math.prod(shape[:-1]) - 1
        self.head = nn.Linear(_width(self.name, "student", given), config.clusters)
        self.register_buffer("centres", torch.zeros(config.clusters, size))
        self.register_buffer("sizes", torch.zeros(config.clusters))
        self.register_buffer("scale", torch.ones(size))

    def calibrate(self, **tensors: Any) -> None:
        rows = texture(tensors["sound"]).to(self.centres)
        if not self.sizes.any():
            if len(rows) < len(self.centres):
                raise kdx.PlanError(
                    f"ambient_sound: {len(self.centres)} clusters cannot start from a batch with {len(rows)} sounds; "
                    "expected fewer clusters, or a larger `train.batch`"
                )
            self.scale.copy_(rows.std(0).clamp(min=1e-6))
            self.centres.copy_(rows[_far_apart(rows / self.scale, len(self.centres))])
        member = F.one_hot(self._nearest(rows), len(self.centres)).to(rows)
        self.sizes += member.sum(0)
        rate = 1 / self.sizes.clamp(min=1).unsqueeze(1)
        self.centres += rate * (member.T @ rows - member.sum(0).unsqueeze(1) * self.centres)

    def forward(self, student: Tensor, sound: Tensor) -> Tensor:
        cluster = self._nearest(texture(sound.detach()).to(self.centres))
        return F.cross_entropy(self.head(pooled(student)), cluster, reduction="none")

    def _nearest(self, rows: Tensor) -> Tensor:
        return torch.cdist(rows / self.scale, self.centres / self.scale).argmin(1)


def strongest(logits: Sequence[Tensor], present: Tensor | None = None) -> Tensor:
    """The largest logit of each class over frames, [B, K], from logits [B, K] of each, or [B, F, K] of F of them.

    `present`, bool [B, M], says which of the M tensors count.
    """
    each = torch.stack([z.amax(1) if z.ndim == 3 else z for z in logits], 1)
    if present is None:
        return each.amax(1)
    counted = present | ~present.any(1, keepdim=True)
    return torch.where(counted.unsqueeze(2), each, -math.inf).amax(1)


class EmotionTransfer(kdx.Loss):
    """A face's expression, told from the voice (Albanie et al., ACM Multimedia 2018), one value per sample.

    `teacher` are the logits of the frames that belong to a clip: several tensors [B, K], as of several views, or one
    [B, F, K]. The largest over the frames is taken for each class; the value is the cross-entropy of the two
    distributions, both at the temperature. No factor tau^2, no labels. Its least value is the entropy of the teacher's
    distribution, for a student that has the same. Published: temperature 2.
    """

    name = "emotion_transfer"
    separable = True
    confidence = "paper"
    inputs = {"student": "student.logits", "teacher": kdx.Many("*.logits")}
    gaps = "teacher"
    knobs = {"temperature": kdx.Knob(2.0, above=0.0)}

    def __init__(self, config: EmotionTransfer.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_classes(self.name, given, "student")
        ours = given.shape("student")[0]
        if wrong := [list(shape) for shape in given.shapes["teacher"] if len(shape) not in (1, 2) or shape[-1] != ours]:
            raise kdx.PlanError(f"emotion_transfer: found {wrong[0]} for one sample of a teacher, expected [{ours}]")

    def forward(
        self, student: Tensor, teacher: list[Tensor], temperature: Tensor, present: Tensor | None = None
    ) -> Tensor:
        tau = kdx.per_sample(temperature, student)
        target = (strongest(teacher, present).detach() / tau).softmax(1)
        return -(target * (student / tau).log_softmax(1)).sum(1)


def _far_apart(rows: Tensor, count: int) -> Tensor:
    """The places of `count` of the rows [N, D], each the farthest from those before it; the first is the one farthest
    from the mean.
    """
    chosen = [(rows - rows.mean(0)).square().sum(1).argmax()]
    nearest = (rows - rows[chosen[0]]).square().sum(1)
    for _ in range(count - 1):
        chosen.append(nearest.argmax())
        nearest = torch.minimum(nearest, (rows - rows[chosen[-1]]).square().sum(1))
    return torch.stack(chosen)


def _width(who: str, name: str, given: kdx.Given) -> int:
    shape = given.shape(name)
    if not shape:
        raise kdx.PlanError(f"{who}: {name} is one number for a sample, expected a vector [D] or a map [C, H, W]")
    return shape[0]


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [SupervisionTransfer, SoundNet, AmbientSound, EmotionTransfer]
