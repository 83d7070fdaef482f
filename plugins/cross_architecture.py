"""Distillation between nets of unlike families: inner stages are compared as logits, through heads of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdx

HEADS = ("auto", "conv", "tokens")
GRID = 7
"""The side of the grid that patches are merged down to."""
ATTENTION_HEADS = 4


def adaptive_target(
    student: Tensor, teacher: Tensor, label: Tensor, temperature: Tensor, power: Tensor | float = 1.0
) -> Tensor:
    """`-sum_k ((q_k + m_k)^power - m_k) log p_k`, [B], of logits [B, K], with `m` 1 for the label [B] and 0 elsewhere.

    p and q are the student's and the teacher's distributions at the temperature. A `power` above 1 raises the true
    class. A sample without a label (-1) has the power 1, which is the cross-entropy with q.
    """
    tau = kdx.per_sample(temperature, student)
    q = (teacher.detach() / tau).softmax(1)
    is_known = (label >= 0)[:, None]
    m = F.one_hot(label.clamp(min=0), q.shape[1]) * is_known
    power = kdx.per_sample(power, q) if isinstance(power, Tensor) else power
    wanted = torch.where(is_known, (q + m) ** power - m, q)
    return -(wanted * F.log_softmax(student / tau, dim=1)).sum(1)


class OneForAll(kdx.Loss):
    """One-for-all distillation across architectures (Hao et al., NeurIPS 2023), one value per sample.

    `final` times `adaptive_target` of the student's logits [B, K] plus `stages` times its sum over heads on inner
    stages, by default of four depths. No feature of the teacher is read, so its architecture does not matter. The heads
    are trained with the student and left behind. A cross-entropy: a perfect student has the teacher's entropy, not 0.
    Published: all weights 1, temperature 1, `power` 1 to 1.5. `power` counts for samples with a label.

    head: `conv` for maps [B, C, H, W]: one separable block for each stage that follows, which halves the size and
        doubles the channels up to `width`, or a 1x1 convolution for the last one; mean over positions; a linear layer.
        `tokens` for tokens [B, N, D] or maps: neighbours merged by four while the grid has even sides of 14 or more;
        a transformer block for each stage that follows, at least one; the first token where tokens precede the grid,
        else the mean; a linear layer. `auto` is `tokens` for tokens and where all maps have one shape, as those of
        plain transformers, and `conv` elsewhere.
    width: of what enters the linear layer, by default the width of the student's last stage. The authors take the
        teacher's for `conv` where that is larger.
    """

    name = "ofa"
    confidence = "values"
    inputs = {
        "student": "student.logits",
        "teacher": "teacher.logits",
        "label": "batch.label",
        "inner": kdx.Many("student.depth_25", "student.depth_50", "student.depth_75", "student.depth_100"),
    }
    knobs = {
        "temperature": kdx.Knob(1.0, above=0.0),
        "power": kdx.Knob(1.0, at_least=1.0),
        "final": kdx.Knob(1.0, at_least=0.0),
        "stages": kdx.Knob(1.0, at_least=0.0),
    }
    same_shape = (("student", "teacher"),)

    @dataclass(frozen=True)
    class Config:
        head: str = "auto"
        width: int | None = None

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_choice("head", config.head, HEADS)
        if config.width is not None and config.width < 1:
            raise kdx.ConfigError(f"width: found {config.width}, expected at least 1")
        shapes: list[kdx.Shape] = given.shapes["inner"]
        classes = given.shape("student")
        if len(classes) != 1 or classes[0] < 2:
            raise kdx.PlanError(f"ofa needs logits of at least two classes [K], but student is {list(classes)}")
        for shape in shapes:
            if len(shape) not in (2, 3) or (len(shape) == 2 and config.head == "conv"):
                expected = "maps [C, H, W]" if config.head == "conv" else "maps [C, H, W] or tokens [N, D]"
                raise kdx.PlanError(f"ofa puts its heads on {expected}, but one of inner is {list(shape)}")
        self.is_conv = config.head == "conv" or (config.head == "auto" and not _is_plain(shapes))
        width = config.width or (shapes[-1][0] if len(shapes[-1]) == 3 else shapes[-1][1])
        make = conv_head if self.is_conv else TokenHead
        self.heads = nn.ModuleList(
            make(shape, width, classes[0], len(shapes) - 1 - place) for place, shape in enumerate(shapes)
        )

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        label: Tensor,
        inner: list[Tensor],
        temperature: Tensor,
        power: Tensor,
        final: Tensor,
        stages: Tensor,
    ) -> Tensor:
        value = final * adaptive_target(student, teacher, label, temperature, power)
        for head, feature in zip(self.heads, inner, strict=True):
            value = value + stages * adaptive_target(head(feature), teacher, label, temperature, power)
        return value

    def describe(self) -> str:
        return "convolutional heads" if self.is_conv else "heads of transformer blocks"


def conv_head(shape: kdx.Shape, width: int, classes: int, following: int) -> nn.Module:
    """Logits [B, K] from maps [B, C, H, W]; `following` is how many stages come after this one."""
    channels = shape[0]
    layers: list[nn.Module] = []
    for place in range(following):
        wider = width if place == following - 1 else min(2 * channels, width)
        layers.append(separable(channels, wider))
        channels = wider
    layers = layers or [nn.Conv2d(channels, width, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def separable(channels: int, wider: int) -> nn.Module:
    """Two depthwise-separable convolutions with batch norm and ReLU; the first halves the size."""
    layers: list[nn.Module] = []
    for out, stride in ((channels, 2), (wider, 1)):
        layers += [
            nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False),
            nn.Conv2d(channels, out, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


class TokenHead(nn.Module):
    """Logits [B, K] from tokens [B, N, D] or maps [B, D, H, W]; tokens before the square grid are kept apart."""

    def __init__(self, shape: kdx.Shape, width: int, classes: int, following: int) -> None:
        super().__init__()
        if width % ATTENTION_HEADS:
            raise kdx.PlanError(f"ofa: a width of {width} does not divide by {ATTENTION_HEADS} attention heads")
        if len(shape) == 3:
            wide, height, across = shape
            self.before = 0
        else:
            wide = shape[1]
            self.before = _tokens_before_grid(shape[0])
            height = across = math.isqrt(shape[0] - self.before)
        self.project = nn.Identity() if wide == width else nn.Linear(wide, width)
        self.merges = nn.ModuleList()
        while min(height, across) >= 2 * GRID and height % 2 == 0 and across % 2 == 0:
            self.merges.append(Merge(height, across, width))
            height, across = height // 2, across // 2
        self.blocks = nn.Sequential(
            *[
                nn.TransformerEncoderLayer(
                    width, ATTENTION_HEADS, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
                )
                for _ in range(max(following, 1))
            ]
        )
        self.answer = nn.Linear(width, classes)

    def forward(self, feature: Tensor) -> Tensor:
        tokens = self.project(feature.flatten(2).transpose(1, 2) if feature.ndim == 4 else feature)
        before, patches = tokens[:, : self.before], tokens[:, self.before :]
        for merge in self.merges:
            patches = merge(patches)
        tokens = self.blocks(torch.cat([before, patches], dim=1))
        answer: Tensor = self.answer(tokens[:, 0] if self.before else tokens.mean(1))
        return answer


class Merge(nn.Module):
    """Joins each 2x2 neighbours of a grid of tokens [B, H W, D] into one, [B, H W / 4, D]."""

    def __init__(self, height: int, across: int, width: int) -> None:
        super().__init__()
        self.size = (height, across)
        self.layers = nn.Sequential(nn.LayerNorm(4 * width), nn.Linear(4 * width, width, bias=False), nn.GELU())

    def forward(self, tokens: Tensor) -> Tensor:
        grid = tokens.reshape(len(tokens), *self.size, -1)
        corners = [grid[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        merged: Tensor = self.layers(torch.cat(corners, dim=-1)).flatten(1, 2)
        return merged


def _is_plain(shapes: list[kdx.Shape]) -> bool:
    """Whether the stages are those of a net that keeps its grid and width."""
    return any(len(shape) == 2 for shape in shapes) or (len(shapes) > 1 and len(set(map(tuple, shapes))) == 1)


def _tokens_before_grid(count: int) -> int:
    """How many class and register tokens come before a square grid of patches: the fewest that leave a square."""
    side = math.isqrt(count)
    return count - side * side


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [OneForAll]
