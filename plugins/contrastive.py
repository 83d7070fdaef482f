"""Contrastive losses: a sample's two embeddings against those of other samples, from a memory or from the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdx

MODES = ("exact", "relax")
TERMS = ("affinity", "feature", "interactive", "task")
MOST_NEGATIVES = 16384
EPS = 1e-7
WARMEST = 100.0
"""The largest factor that a learnt scale may reach, as in CLIP."""


def noise_contrast(scores: Tensor, size: int) -> Tensor:
    """Noise-contrastive loss of positive scores [B, 1 + K], the first of each row being the true pair's; [B].

    With `c = K / size`: `-log(x_0 / (x_0 + c)) - sum_j log(c / (x_j + c))`. The negatives are summed, not averaged.
    """
    chance = (scores.shape[1] - 1) / size
    true, false = scores[:, 0], scores[:, 1:]
    return -(true / (true + chance + EPS)).log() - (chance / (false + chance + EPS)).log().sum(1)


class ContrastiveRepresentation(kdx.Loss):
    """Contrastive representation distillation (Tian, Krishnan, Isola, ICLR 2020), one value per sample.

    Vectors [B, D]; other shapes are flattened. A linear layer on either side, both trained, gives embeddings of length
    1. Each is told from samples of other classes by what the memory holds of the other net for them. It is above 0
    also for a perfect student. Published weight: 0.8, alone or with `kd` of weight 1.

    dim: the width of both embeddings, and of the memory: two tensors [N, dim] for N training samples.
    negatives: how many others each sample is told from; by default 16384 or, where there are fewer, all.
    mode: the true pair is the same sample (`exact`) or a random one of its class (`relax`).
    momentum: how much of the old memory stays when a sample comes by.
    temperature: divides the cosines.

    Negatives have another label or none; a sample without a label is told from any other, and is its own true pair.
    Samples that are held out or unlabelled stand in the memory too, the former as they were drawn at first. The two
    constants that scale the scores come from the first batch and stay. Memory, constants and generator are saved, so
    a resumed run goes on exactly. Passes without gradient leave the memory as it is.

    Negatives are drawn afresh for each sample without replacement; the authors' code draws them on the data side.
    """

    name = "crd"
    confidence = "values"
    inputs = {"student": "student.embedding", "teacher": "teacher.embedding", "index": "batch.index"}
    knobs = {"temperature": kdx.Knob(0.07, above=0.0)}

    @dataclass(frozen=True)
    class Config:
        dim: int = 128
        negatives: int | None = None
        mode: str = "exact"
        momentum: float = 0.5

    config: Config
    labels: Tensor
    members: Tensor
    counts: Tensor
    starts: Tensor
    student_memory: Tensor
    teacher_memory: Tensor
    student_constant: Tensor
    teacher_constant: Tensor

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        self.size = given.facts.size
        labels = given.facts.labels or (-1,) * self.size
        self.register_buffer("labels", torch.tensor(labels, dtype=torch.int64), persistent=False)
        self._check(config)
        shown = self.labels[self.labels >= 0]
        counts = shown.bincount(minlength=1)
        available = self.size - max(int(counts.max()), 1)
        if available < 1:
            raise kdx.PlanError(f"crd needs samples of another class, but all {self.size} training samples have one")
        if config.negatives is not None and config.negatives > available:
            raise kdx.ConfigError(
                f"negatives: found {config.negatives}, expected at most {available}, the samples outside of the largest"
                " class"
            )
        self.negatives = config.negatives or min(MOST_NEGATIVES, available)
        if config.mode == "relax" and not len(shown):
            raise kdx.PlanError("crd with `mode: relax` pairs samples of one class, but no training sample has a label")
        by_class = self.labels.argsort(stable=True)
        self.register_buffer("members", by_class[self.size - len(shown) :], persistent=False)
        self.register_buffer("counts", counts, persistent=False)
        self.register_buffer("starts", counts.cumsum(0) - counts, persistent=False)
        self.student_layer = nn.Linear(math.prod(given.shape("student")), config.dim)
        self.teacher_layer = nn.Linear(math.prod(given.shape("teacher")), config.dim)
        reach = math.sqrt(3 / config.dim)  # a vector of even numbers in +-reach has length 1 on average
        for side in ("student", "teacher"):
            drawn = (2 * torch.rand(self.size, config.dim) - 1) * reach
            self.register_buffer(f"{side}_memory", drawn)
            self.register_buffer(f"{side}_constant", torch.tensor(-1.0))

    def forward(self, student: Tensor, teacher: Tensor, index: Tensor, temperature: Tensor) -> Tensor:
        ours = F.normalize(self.student_layer(student.flatten(1)), dim=1)
        theirs = F.normalize(self.teacher_layer(teacher.detach().flatten(1)), dim=1)
        others = self._draw(index)
        to_teacher = (ours @ self.teacher_memory.T / kdx.per_sample(temperature, ours)).gather(1, others).exp()
        to_student = (theirs @ self.student_memory.T / kdx.per_sample(temperature, theirs)).gather(1, others).exp()
        student_constant = self._constant(self.student_constant, to_teacher)
        teacher_constant = self._constant(self.teacher_constant, to_student)
        if torch.is_grad_enabled():
            with torch.no_grad():
                self.student_constant.copy_(student_constant)
                self.teacher_constant.copy_(teacher_constant)
                # New tensors: the backward pass still reads the old memory.
                self.student_memory = self._remember(self.student_memory, index, ours)
                self.teacher_memory = self._remember(self.teacher_memory, index, theirs)
        return noise_contrast(to_teacher / student_constant, self.size) + noise_contrast(
            to_student / teacher_constant, self.size
        )

    def _draw(self, index: Tensor) -> Tensor:
        """For each sample its true pair and then its negatives, as positions in the memory, [B, 1 + K]."""
        generator, device = self.given.generator, index.device
        label = self.labels[index]
        order = torch.rand(len(index), self.size, generator=generator, device=device)
        same = (self.labels == label[:, None]) & (label >= 0)[:, None]
        order = order.masked_fill(same, 2.0).scatter(1, index[:, None], 2.0)
        negatives = order.topk(self.negatives, dim=1, largest=False, sorted=False).indices
        true = index if self.config.mode == "exact" else self._of_the_same_class(index, label)
        return torch.cat([true[:, None], negatives], 1)

    def _of_the_same_class(self, index: Tensor, label: Tensor) -> Tensor:
        """A random sample of the same class for each labelled sample, else the sample itself."""
        known = label.clamp(min=0)
        draw = torch.rand(len(index), generator=self.given.generator, device=index.device)
        place = self.starts[known] + (draw * self.counts[known]).long()
        return torch.where(label >= 0, self.members[place], index)

    def _constant(self, known: Tensor, scores: Tensor) -> Tensor:
        """What the scores are divided by: the mean of the first batch's, times the number of samples."""
        return torch.where(known > 0, known, scores.detach().mean() * self.size)

    def _remember(self, memory: Tensor, index: Tensor, rows: Tensor) -> Tensor:
        kept = self.config.momentum
        return memory.index_copy(0, index, F.normalize(kept * memory[index] + (1 - kept) * rows, dim=1))

    def _check(self, config: Config) -> None:
        if not self.size:
            raise kdx.PlanError("crd keeps a memory of the training samples, but the data says not how many there are")
        kdx.check_choice("mode", config.mode, MODES)
        if config.dim < 1:
            raise kdx.ConfigError(f"dim: found {config.dim}, expected a width from 1")
        if config.negatives is not None and config.negatives < 1:
            raise kdx.ConfigError(f"negatives: found {config.negatives}, expected a number from 1")
        if not 0 <= config.momentum < 1:
            raise kdx.ConfigError(f"momentum: found {config.momentum}, expected a number from 0 and below 1")


def pairing(rows: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
    """Minus the log of the share that sample b's own column has in its row of scaled cosines, [B], of [B, D] each."""
    scores = kdx.per_sample(scale, rows) * (rows @ columns.T)
    return -scores.log_softmax(1).diagonal()


def affinity_divergence(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], student_scale: Tensor, teacher_scale: Tensor
) -> Tensor:
    """KL divergence of the student's affinities between two modalities from the teacher's, [B].

    Each side gives embeddings [B, D] of length 1 for both modalities; the mean of both directions.
    """
    total = torch.zeros((), dtype=student[0].dtype, device=student[0].device)
    for first, second in ((0, 1), (1, 0)):
        ours = kdx.per_sample(student_scale, student[0]) * (student[first] @ student[second].T)
        theirs = kdx.per_sample(teacher_scale, teacher[0]) * (teacher[first] @ teacher[second].T)
        divergence = F.kl_div(ours.log_softmax(1), theirs.log_softmax(1), reduction="none", log_target=True)
        total = total + divergence.sum(1) / 2
    return total


class ClipDistillation(kdx.Loss):
    """Distillation of embeddings as in CLIP-KD (Yang et al., CVPR 2024), one value per sample.

    student, teacher: vectors [B, D] of the first modality; student_other, teacher_other: of the second one. Without
    the second modality the first stands in for it, and there is no `task`. Other shapes are flattened, and all
    embeddings are brought to length 1. Each sample is told from the others of its batch.

    terms: which parts are computed, all that the inputs allow by default; each has a weight of its own:
    affinity: KL divergence of the student's softmax over its similarities from the teacher's, in both directions.
    interactive: the student's embedding picks out the teacher's of the same sample in the other modality, with a scale
        that is learnt (from 1 / 0.07, at most 100). Public code multiplies by its logarithm.
    feature: squared difference from the teacher's embedding, mean over its width, summed over modalities.
    task: the student's own contrastive loss between its modalities.
    student_scale, teacher_scale: what the models multiply cosines with. A ref to a learnt one trains it.

    Where widths differ, a linear layer brings the student's to the teacher's for `interactive` and `feature`.
    Above 0 for a perfect student, but for `affinity` (with equal scales) and `feature`.
    """

    name = "clip_kd"
    confidence = "code"
    inputs = {
        "student": "student.embedding",
        "teacher": "teacher.embedding",
        "student_other": kdx.OPTIONAL,
        "teacher_other": kdx.OPTIONAL,
    }
    knobs = {
        "affinity": kdx.Knob(1.0, at_least=0.0),
        "interactive": kdx.Knob(1.0, at_least=0.0),
        "feature": kdx.Knob(2000.0, at_least=0.0),
        "task": kdx.Knob(1.0, at_least=0.0),
        "student_scale": kdx.Knob(1 / 0.07, above=0.0),
        "teacher_scale": kdx.Knob(1 / 0.07, above=0.0),
    }

    @dataclass(frozen=True)
    class Config:
        terms: list[str] = field(default_factory=list)

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        widths = {name: math.prod(shape) for name, shape in given.shapes.items()}
        others = [name for name in ("student_other", "teacher_other") if name in widths]
        if len(others) == 1:
            raise kdx.PlanError(f"clip_kd compares two modalities, but only {others[0]} is given; name both or neither")
        for term in config.terms:
            if term not in TERMS:
                raise kdx.ConfigError(f"terms: found {term!r}, expected some of {', '.join(TERMS)}")
        if "task" in config.terms and not others:
            raise kdx.PlanError("clip_kd needs student_other and teacher_other for `task`: it pairs two modalities")
        for side in ("student", "teacher"):
            if others and widths[side] != widths[f"{side}_other"]:
                raise kdx.PlanError(
                    f"clip_kd multiplies {side} with {side}_other, but they have {widths[side]} and "
                    f"{widths[f'{side}_other']} numbers"
                )
        self.terms = tuple(config.terms) or (TERMS if others else TERMS[:-1])
        bridged = widths["student"] != widths["teacher"] and bool({"interactive", "feature"} & {*self.terms})
        self.layers = nn.ModuleList(
            nn.Linear(widths["student"], widths["teacher"]) if bridged else nn.Identity()
            for _ in range(2 if others else 1)
        )
        if "interactive" in self.terms:
            self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        student_other: Tensor | None,
        teacher_other: Tensor | None,
        affinity: Tensor,
        interactive: Tensor,
        feature: Tensor,
        task: Tensor,
        student_scale: Tensor,
        teacher_scale: Tensor,
    ) -> Tensor:
        raw = [student.flatten(1)]
        theirs = [_unit(teacher.detach())]
        if student_other is not None and teacher_other is not None:
            raw.append(student_other.flatten(1))
            theirs.append(_unit(teacher_other.detach()))
        ours = [_unit(one) for one in raw]
        bridged = [_unit(layer(one)) for layer, one in zip(self.layers, raw, strict=False)]
        parts: list[Tensor] = []
        if "affinity" in self.terms:
            both = (ours[0], ours[-1]), (theirs[0], theirs[-1])
            parts.append(affinity * affinity_divergence(*both, student_scale, teacher_scale))
        if "interactive" in self.terms:
            scale = self.log_scale.clamp(max=math.log(WARMEST)).exp()
            crossed = pairing(bridged[0], theirs[-1], scale) + pairing(bridged[-1], theirs[0], scale)
            parts.append(interactive * crossed / 2)
        if "feature" in self.terms:
            gaps = [(s - t).square().mean(1) for s, t in zip(bridged, theirs, strict=True)]
            parts.append(feature * torch.stack(gaps).sum(0))
        if "task" in self.terms and len(ours) == 2:
            paired = pairing(ours[0], ours[1], student_scale) + pairing(ours[1], ours[0], student_scale)
            parts.append(task * paired / 2)
        return torch.stack(parts).sum(0)


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows.flatten(1), dim=1)


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [ContrastiveRepresentation, ClipDistillation]
