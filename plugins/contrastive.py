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
        by_class = self.labels.argsort(stable=True)
        self.register_buffer("members", by_class[len(by_class) - len(shown) :], persistent=False)
        self.register_buffer("counts", counts, persistent=False)
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
        true = index
        if self.config.mode == "relax":
            known = label.clamp(min=0)
            place = torch.rand(len(index), generator=generator, device=device) * self.counts[known]
            first = self.counts.cumsum(0)[known] - self.counts[known]
            other = self.members[(first + place.long()).clamp(max=max(len(self.members) - 1, 0))] if len(
                self.members
            ) else index
            true = torch.where(label >= 0, other, index)
        return torch.cat([true[:, None], negatives], 1)

    def _constant(self, known: Tensor, scores: Tensor) -> Tensor:
        """What the scores are divided by: the mean of the first batch's, times the number of samples."""
        return torch.where(known > 0, known, scores.detach().mean() * self.size)

    def _remember(self, memory: Tensor, index: Tensor, rows: Tensor) -> Tensor:
        kept = self.config.momentum
        return memory.index_copy(0, index, F.normalize(kept * memory[index] + (1 - kept) * rows, dim=1))

    def _check(self, config: Config) -> None:
        if not self.size:
            raise kdx.PlanError("crd keeps a memory of the training samples, but the data says not how many there are")
        if config.mode not in MODES:
            raise kdx.ConfigError(f"mode: found {config.mode!r}, expected one of {', '.join(MODES)}")
        if config.dim < 1:
            raise kdx.ConfigError(f"dim: found {config.dim}, expected a width from 1")
        if config.negatives is not None and config.negatives < 1:
            raise kdx.ConfigError(f"negatives: found {config.negatives}, expected a number from 1")
        if not 0 <= config.momentum < 1:
            raise kdx.ConfigError(f"momentum: found {config.momentum}, expected a number from 0 and below 1")
