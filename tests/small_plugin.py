"""A plugin for tests of whole runs: tiny images, a tiny net, and a loss that keeps every kind of state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

import kdx

CLASSES = ("left", "right", "both")


def made_images(count: int, seed: int) -> kdx.Batch:
    """Images [count, 1, 8, 8] in `0..1` whose bright halves tell the class, in noise, with their labels."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % len(CLASSES)
    image = torch.rand(count, 1, 8, 8, generator=generator) * 0.7
    image[label != 1, :, :, :4] += 0.3
    image[label != 0, :, :, 4:] += 0.3
    return {"image": image, "label": label}


class Tensors(kdx.Split):
    """Samples in memory."""

    def __init__(self, tensors: kdx.Batch) -> None:
        self.tensors = tensors
        self.labels = tensors["label"]

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: Sequence[int]) -> kdx.Batch:
        return {name: tensor[list(indices)] for name, tensor in self.tensors.items()}


class Halves(kdx.Dataset):
    """The images of `made_images`; training ones are flipped top to bottom at random."""

    name = "halves"
    view_options = ("flip",)

    @dataclass(frozen=True)
    class Config:
        size: int = 48
        flip: bool = True

    config: Config

    def facts(self) -> kdx.DataFacts:
        streams = {
            "image": kdx.StreamFacts("image", (1, 8, 8), (0.5,), (0.3,)),
            "label": kdx.StreamFacts("label", ()),
        }
        return kdx.DataFacts(streams=streams, classes=CLASSES, size=self.config.size)

    def train(self) -> kdx.Split:
        return Tensors(made_images(self.config.size, 1))

    def test(self) -> kdx.Split:
        return Tensors(made_images(24, 2))

    def on_device(self, batch: kdx.Batch, randomness: kdx.Randomness | None) -> kdx.Batch:
        if randomness is None or not self.config.flip:
            return batch
        turned = randomness.uniform("flip") < 0.5
        image = torch.where(turned[:, None, None, None], batch["image"].flip(2), batch["image"])
        return {**batch, "image": image}

    def fingerprint(self) -> str:
        return f"halves {self.config.size}"


class SmallNet(nn.Module):
    """Two convolutions, with batch norm if asked, dropout, a linear head."""

    def __init__(self, width: int, dropout: float, classes: int, norm: bool = True) -> None:
        super().__init__()
        norms = [nn.BatchNorm2d(width) if norm else nn.Identity() for _ in range(2)]
        self.first = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), norms[0], nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1, bias=False), norms[1], nn.ReLU())
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.dropout(self.second(self.first(images)).mean((2, 3))))


class Small(kdx.Model):
    """A `SmallNet` for grey images."""

    name = "small"

    @dataclass(frozen=True)
    class Config:
        width: int = 4
        dropout: float = 0.0
        classes: int = 0
        norm: bool = True

    config: Config

    def build(self) -> kdx.Network:
        config = self.config
        classes = config.classes or len(self.facts.classes)
        return kdx.Network(SmallNet(config.width, config.dropout, classes, config.norm), self.streams)


class Stateful(kdx.Loss):
    """Pulls noisy logits to a learnt centre. Keeps a parameter, buffers, a bank that grows, and a generator."""

    name = "stateful"
    inputs = {"student": "student.logits"}
    knobs = {"noise": kdx.Knob(0.1, at_least=0.0)}

    def __init__(self, config: Stateful.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        width = given.shape("student")[0]
        self.centre = nn.Parameter(torch.zeros(width))
        self.register_buffer("start", torch.zeros(width))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("bank", torch.zeros(0, width))

    def calibrate(self, student: Tensor, noise: Tensor) -> None:
        self.start += student.mean(0)

    def after_update(self, clock: kdx.Clock) -> None:
        self.seen.fill_(clock.step)
        if len(self.bank) < 6:
            self.bank = torch.cat([self.bank, self.centre.detach()[None]])

    def forward(self, student: Tensor, noise: Tensor) -> Tensor:
        random = torch.randn(student.shape, generator=self.given.generator)
        drift = self.bank.sum(0) * 0.01 + self.start * 0.01 + self.seen * 0.001
        return (student + noise * random - self.centre - drift).square().mean(1)


class Reuse(kdx.Loss):
    """Maps the student's features to the teacher's, whose classifier is deployed behind them."""

    name = "reuse"
    inputs = {"student": "student.mid", "teacher": "wide.mid"}
    borrows = {"head": "wide.head"}
    answers = ("student", "head")

    def __init__(self, config: Reuse.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        self.projector = nn.Conv2d(given.shape("student")[0], given.shape("teacher")[0], 1)

    def forward(self, student: Tensor, teacher: Tensor, head: nn.Module) -> Tensor:
        return (self.projector(student) - teacher).square().mean((1, 2, 3))

    def answer(self, student: Tensor, head: nn.Module) -> Tensor:
        return head(self.projector(student).mean((2, 3)))


class Doubt(kdx.Target):
    """One number from 1 to 2 for each sample, the higher the less sure its logits are, [B]."""

    name = "doubt"
    inputs = {"logits": "teacher.logits"}

    def forward(self, logits: Tensor) -> Tensor:
        return 2 - logits.softmax(1).amax(1)


class Peek(kdx.Target):
    """Logits that were told the label."""

    name = "peek"
    inputs = {"logits": "teacher.logits", "label": "batch.label"}
    outputs = ("logits",)

    def forward(self, logits: Tensor, label: Tensor) -> dict[str, Tensor]:
        right = torch.arange(logits.shape[1], device=logits.device) == label[:, None]
        return {"logits": logits + right}


class Centred(kdx.Target):
    """Logits less the mean that was found before training, and the number of updates since."""

    name = "centred"
    inputs = {"logits": "teacher.logits"}
    outputs = ("logits", "updates")

    def __init__(self, config: Centred.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        self.register_buffer("mean", torch.zeros(given.shape("logits")))
        self.register_buffer("updates", torch.zeros(()))

    def calibrate(self, logits: Tensor) -> None:
        self.mean += logits.mean(0)

    def after_update(self, clock: kdx.Clock) -> None:
        self.updates += 1

    def forward(self, logits: Tensor) -> dict[str, Tensor]:
        return {"logits": logits - self.mean, "updates": self.updates.clone()}


class Scripted(kdx.Metric):
    """`score`, the next of the given numbers each time that it is computed."""

    name = "scripted"
    computed: ClassVar[int] = 0

    @dataclass(frozen=True)
    class Config:
        scores: list[float] = field(default_factory=list)

    config: Config

    def update(self, logits: Tensor, label: Tensor) -> None:
        pass

    def compute(self) -> dict[str, float]:
        type(self).computed += 1
        return {"score": self.config.scores[type(self).computed - 1]}


@kdx.hookimpl
def kdx_metrics() -> list[type[kdx.Metric]]:
    return [Scripted]


@kdx.hookimpl
def kdx_datasets() -> list[type[kdx.Dataset]]:
    return [Halves]


@kdx.hookimpl
def kdx_models() -> list[type[kdx.Model]]:
    return [Small]


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [Stateful, Reuse]


@kdx.hookimpl
def kdx_targets() -> list[type[kdx.Target]]:
    return [Doubt, Peek, Centred]
