"""The data that flows through a run. Nothing here computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Batch: TypeAlias = "dict[str, Tensor]"
"""Stream name -> tensor, batch axis first. `label` is -1 where a sample has no label; `index` is always there."""

Shape: TypeAlias = tuple[int, ...]
"""The shape of one sample's part of a tensor: `[B, C, H, W]` is `(C, H, W)`; `[B]` and a 0-d tensor are `()`."""


@dataclass(frozen=True)
class StreamFacts:
    """What is known about one stream before a batch is read.

    `kind` is `image`, `audio` (a waveform `[T]`), `vector`, `label`, or `mask` (bool: `[T]` where a clip has sound,
    `()` for whether the sample has a modality at all). `mean` and `std` are per channel, on the scale that
    `Dataset.on_device` gives (`0..1` for images, `-1..1` for waveforms); a model normalises its own input with them
    unless it brings its own. `rate` is that of a waveform in Hz, 0 for all else. `present` names the mask (bool, `()`
    for one sample) of the samples that have this stream, where some may lack it.
    """

    kind: str
    shape: Shape
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    rate: int = 0
    present: str = ""


@dataclass(frozen=True)
class DataFacts:
    """What components may know about the data: streams, class names, and how many training samples there are.

    `size` counts every sample of the training source: `batch.index` is always below it. `labels` holds the label
    of each of these, -1 where the run may not see it. `labelled` says that each sample that the run trains on has one.
    """

    streams: Mapping[str, StreamFacts]
    classes: tuple[str, ...] = ()
    size: int = 0
    labels: tuple[int, ...] = field(default=(), repr=False)
    labelled: bool = False


@dataclass(frozen=True)
class Clock:
    """Where training stands. `step` counts finished updates, so it is 0 during the first one."""

    step: int
    steps_per_epoch: int
    steps: int

    @property
    def epoch(self) -> int:
        """The current epoch, counted from 1."""
        return min(self.step, max(self.steps - 1, 0)) // self.steps_per_epoch + 1

    @property
    def epochs(self) -> float:
        """The length of training in epochs."""
        return self.steps / self.steps_per_epoch

    @property
    def time(self) -> float:
        """Epochs finished so far, with the fraction of the current one."""
        return self.step / self.steps_per_epoch


@dataclass(frozen=True)
class Losses:
    """What one forward pass of the learner gives. `total` and `parts` have a graph, the rest is for reports.

    `parts` maps each loss to its term times its weight, averaged over the batch (0-d); their sum is `total`. `terms`
    are unweighted, 0-d or `[B]`, and `means` their averages over the batch; `knobs` holds those that were read from
    nodes, by config path; `shown` what reports show of targets, `[B]`, `[B, M]` or 0-d by key.
    """

    total: Tensor
    terms: Mapping[str, Tensor]
    knobs: Mapping[str, Tensor] = field(default_factory=dict)
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    shown: Mapping[str, Tensor] = field(default_factory=dict)
    means: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StepReport:
    """What one update produced. Tensors stay on the device: read them only when they are shown (`numbers`).

    `terms` are unweighted, averaged over micro-batches, with `total` among them; `knobs` holds every knob that can
    move, per-sample ones as their mean, and what the updater shows; `shown` what targets show, such as the weights of
    teachers, each as the mean over the samples and, under a name that ends in `/std`, their spread.
    """

    clock: Clock
    lr: float
    terms: Mapping[str, Tensor]
    knobs: Mapping[str, Tensor]
    samples: int
    shown: Mapping[str, Tensor] = field(default_factory=dict)

    def numbers(self) -> dict[str, float]:
        """All values as floats, in one transfer from the device."""
        import torch

        tensors = {**self.terms, **self.knobs, **self.shown}
        if not tensors:
            return {"lr": self.lr}
        stacked = torch.stack([value.detach().float().reshape(()) for value in tensors.values()]).tolist()
        return {**dict(zip(tensors, stacked, strict=True)), "lr": self.lr}


@dataclass(frozen=True)
class EvalReport:
    """What one evaluation produced: `metrics` of `who` (`student`, a teacher, a target) on `split`.

    On the split `train` these are no scores but what a target showed over the epoch that has just ended: the mean of a
    number, its spread (`weights.wide/std`) and its mean in each class (`weights.wide[cat]`).
    """

    clock: Clock
    split: str
    who: str
    metrics: Mapping[str, float]
    best: bool = False


@dataclass(frozen=True)
class RunInfo:
    """What watchers may know of the run they watch."""

    name: str
    folder: Path
    hash: str
    config: Mapping[str, Any]
    steps: int
    steps_per_epoch: int
    resumed_at: int = 0
    """The number of updates that were already done when this process took the run up."""
