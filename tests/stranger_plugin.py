"""A stranger's plugin for tests: one component of each kind and every hook, with public names alone.

Each hook writes a line to the file `calls.txt` beside this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import kdx

CALLS = Path(__file__).with_name("calls.txt")


def note(text: str) -> None:
    with CALLS.open("a", encoding="utf-8") as file:
        file.write(f"{text}\n")


class Striped(kdx.Split):
    """Images [1, 8, 8] whose stripes lie (class 0) or stand (class 1), in noise."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(count) % 2
        lying = (torch.arange(8) % 2).float()[:, None].expand(8, 8)
        pattern = torch.stack([lying, lying.T])[self.labels]
        self.images = (pattern[:, None] + torch.rand(count, 1, 8, 8, generator=generator)) / 2

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: Sequence[int]) -> kdx.Batch:
        chosen = torch.as_tensor(indices)
        return {"image": self.images[chosen], "label": self.labels[chosen]}


class Stripes(kdx.Dataset):
    """Stripes that lie or stand; training images are turned upside down at random."""

    name = "stripes"

    @dataclass(frozen=True)
    class Config:
        size: int = 40

    config: Config

    def facts(self) -> kdx.DataFacts:
        streams = {
            "image": kdx.StreamFacts("image", (1, 8, 8), (0.5,), (0.3,)),
            "label": kdx.StreamFacts("label", ()),
        }
        return kdx.DataFacts(streams, ("lying", "standing"), self.config.size)

    def train(self) -> kdx.Split:
        return Striped(self.config.size, 1)

    def val(self) -> kdx.Split:
        return Striped(12, 2)

    def test(self) -> kdx.Split:
        return Striped(16, 3)

    def on_device(self, batch: kdx.Batch, randomness: kdx.Randomness | None) -> kdx.Batch:
        if randomness is None:
            return batch
        turned = (randomness.uniform("turn") < 0.5)[:, None, None, None]
        return {**batch, "image": torch.where(turned, batch["image"].flip(2), batch["image"])}

    def fingerprint(self) -> str:
        return f"stripes {self.config.size}"


class Perceptron(kdx.Model):
    """One hidden layer; images [B, C, H, W] -> logits [B, K]."""

    name = "perceptron"

    @dataclass(frozen=True)
    class Config:
        width: int = 8

    config: Config

    def build(self) -> kdx.Network:
        pixels = torch.Size(self.facts.streams[self.streams[0]].shape).numel()
        hidden = nn.Sequential(nn.Flatten(), nn.Linear(pixels, self.config.width), nn.ReLU())
        head = nn.Linear(self.config.width, len(self.facts.classes))
        return kdx.Network(nn.Sequential(hidden, head), self.streams)


class Calm(kdx.Target):
    """The logits [B, K] of a teacher, made smaller."""

    name = "calm"
    inputs = {"logits": "teacher.logits"}
    outputs = ("logits",)
    knobs = {"factor": kdx.Knob(0.5, above=0.0)}

    def forward(self, logits: Tensor, factor: Tensor) -> dict[str, Tensor]:
        return {"logits": logits * kdx.per_sample(factor, logits)}


class Stretch(kdx.Aligner):
    """A linear map of vectors, [B, D] -> [B, D']."""

    name = "stretch"

    def __init__(self, config: Stretch.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        self.map = nn.Linear(given.shape("source")[0], given.shape("like")[0])

    def forward(self, source: Tensor) -> Tensor:
        return self.map(source)


class Closeness(kdx.Loss):
    """Absolute difference of two tensors [B, D], one value per sample; remembers how often it was called."""

    name = "closeness"
    inputs = {"student": kdx.REQUIRED, "teacher": kdx.REQUIRED, "mask": kdx.OPTIONAL}
    same_shape = (("student", "teacher"),)
    calls: Tensor

    def __init__(self, config: Closeness.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        gap = (student - teacher.detach()).abs().mean(1)
        return gap if mask is None else gap * mask

    def calibrate(self, **tensors: Tensor) -> None:
        note(f"calibrate {sorted(tensors)}")

    def after_update(self, clock: kdx.Clock) -> None:
        self.calls += 1


class Halving(kdx.Schedule):
    """1, half of it after each epoch."""

    name = "halving"

    def at(self, clock: kdx.Clock) -> float:
        return 0.5 ** (clock.epoch - 1)


class Hits(kdx.Metric):
    """`hit_rate`: the share of right answers, from logits [B, K]."""

    name = "hits"

    def __init__(self, config: Hits.Config, facts: kdx.DataFacts, device: torch.device) -> None:
        super().__init__(config, facts, device)
        self.right = torch.zeros((), device=device)
        self.seen = 0

    def update(self, logits: Tensor, label: Tensor) -> None:
        self.right += (logits.argmax(1) == label).sum()
        self.seen += len(label)

    def compute(self) -> dict[str, float]:
        return {"hit_rate": float(self.right) / self.seen}


class SignUpdater(kdx.Updater):
    """Steps by the sign of each gradient."""

    name = "sign"

    def backward(self, losses: kdx.Losses, share: float, engine: kdx.Engine) -> None:
        engine.backward(losses.total * share)

    def step(self, engine: kdx.Engine) -> None:
        for weight in engine.parameters():
            if weight.grad is not None:
                weight.grad.sign_()
        engine.update()


@kdx.hookimpl
def kdx_datasets() -> list[type[kdx.Dataset]]:
    return [Stripes]


@kdx.hookimpl
def kdx_models() -> list[type[kdx.Model]]:
    return [Perceptron]


@kdx.hookimpl
def kdx_targets() -> list[type[kdx.Target]]:
    return [Calm]


@kdx.hookimpl
def kdx_aligners() -> list[type[kdx.Aligner]]:
    return [Stretch]


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [Closeness]


@kdx.hookimpl
def kdx_schedules() -> list[type[kdx.Schedule]]:
    return [Halving]


@kdx.hookimpl
def kdx_metrics() -> list[type[kdx.Metric]]:
    return [Hits]


@kdx.hookimpl
def kdx_updaters() -> list[type[kdx.Updater]]:
    return [SignUpdater]


@kdx.hookimpl
def kdx_plan_ready(plan: kdx.Plan) -> None:
    note(f"plan {', '.join(plan.teachers)}")


@kdx.hookimpl
def kdx_run_start(run: kdx.RunInfo) -> None:
    note(f"start {run.name} {run.steps}")


@kdx.hookimpl
def kdx_step_end(report: kdx.StepReport) -> None:
    note(f"step {report.clock.step} {', '.join(sorted(report.terms))}")


@kdx.hookimpl
def kdx_eval_end(report: kdx.EvalReport) -> None:
    note(f"eval {report.clock.step} {report.who} {', '.join(report.metrics)}")


@kdx.hookimpl
def kdx_run_end(run: kdx.RunInfo) -> None:
    note(f"end {run.name}")
