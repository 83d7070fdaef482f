"""A plugin for tests: a tiny network and nodes that do, one by one, what a plan must notice or put up with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdx


class TinyNet(nn.Module):
    """Convolution, batch norm, two changes in place, a linear head. Gives `logits` and `pooled`."""

    def __init__(self, channels: int, width: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.act(self.norm(self.conv(images)))
        x += 1
        pooled = x.mean((2, 3))
        return {"logits": self.head(self.dropout(pooled)), "pooled": pooled}


class TwiceNet(nn.Module):
    """Runs the same activation twice."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.act(self.act(images - 0.5).mean((2, 3))))


class Tiny(kdx.Model):
    name = "tiny"

    @dataclass(frozen=True)
    class Config:
        width: int = 4
        classes: int | None = None

    config: Config

    def build(self) -> kdx.Network:
        channels = self.facts.streams[self.streams[0]].shape[0]
        net = TinyNet(channels, self.config.width, self.config.classes or len(self.facts.classes))
        return kdx.Network(net, self.streams)


class Twice(kdx.Model):
    name = "twice"

    def build(self) -> kdx.Network:
        shape = self.facts.streams[self.streams[0]].shape
        return kdx.Network(TwiceNet(shape[0], len(self.facts.classes)), self.streams)


class Huge(kdx.Model):
    """Cannot be built, so that nobody can say that it was."""

    name = "huge"
    offers = ("logits", "embedding")

    def build(self) -> kdx.Network:
        raise MemoryError("this network does not fit into memory")


class Pass(kdx.Target):
    """Its input, as it is."""

    name = "pass"
    inputs = {"x": kdx.REQUIRED}

    def forward(self, x: Tensor) -> Tensor:
        return x


class Half(kdx.Target):
    """Declares two outputs and gives one."""

    name = "half"
    inputs = {"x": kdx.REQUIRED}
    outputs = ("logits", "weights")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": x}


class Learnt(kdx.Target):
    """Its input times a learnt factor."""

    name = "learnt"
    inputs = {"x": kdx.REQUIRED}
    outputs = ("logits",)

    def __init__(self, config: Learnt.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": x * self.factor}


class Stubborn(kdx.Aligner):
    """Gives its source, whatever `like` is."""

    name = "stubborn"

    def forward(self, source: Tensor) -> Tensor:
        return source


class Restless(kdx.Loss):
    """Leaves traces wherever it can: buffers, a bank that grows, random numbers of its own."""

    name = "restless"
    inputs = {"student": "student.logits"}

    def __init__(self, config: Restless.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("bank", torch.zeros(0, given.shape("student")[0]))

    def forward(self, student: Tensor) -> Tensor:
        self.count += 1
        self.bank = torch.cat([self.bank, student.detach()])
        noise = torch.rand(len(student), generator=self.given.generator)
        return (student.square().mean(1) * noise).mean()


class Wide(kdx.Loss):
    """A term per class, which no loss may give."""

    name = "wide"
    inputs = {"student": "student.logits"}

    def forward(self, student: Tensor) -> Tensor:
        return student.square()


class Masked(kdx.Loss):
    """Has an input that may be absent, and one that takes any number of refs."""

    name = "masked"
    inputs = {"logits": kdx.Many("student.logits"), "mask": kdx.OPTIONAL}
    knobs = {"scale": kdx.Knob(1.0, at_least=0.0, at_most=10.0)}

    def forward(self, logits: list[Tensor], mask: Tensor | None, scale: Tensor) -> Tensor:
        size = torch.stack(logits).square().mean((0, 2)) * scale
        return size if mask is None else size * mask


class Reused(kdx.Loss):
    """Cross-entropy of a borrowed classifier on features of the student."""

    name = "reused"
    inputs = {"features": "student.embedding", "label": "batch.label"}
    borrows = {"head": "teacher.classifier"}

    def forward(self, features: Tensor, label: Tensor, head: nn.Module) -> Tensor:
        return F.cross_entropy(head(features), label)


@kdx.hookimpl
def kdx_models() -> list[type[kdx.Model]]:
    return [Tiny, Twice, Huge]


@kdx.hookimpl
def kdx_targets() -> list[type[kdx.Target]]:
    return [Pass, Half, Learnt]


@kdx.hookimpl
def kdx_aligners() -> list[type[kdx.Aligner]]:
    return [Stubborn]


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [Restless, Wide, Masked, Reused]
