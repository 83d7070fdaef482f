"""The classes that plugins derive from. Their docstrings are the contract between a plugin and the engine."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final

import pluggy
import torch
from torch import Tensor, nn

from kdx.errors import PlanError
from kdx.types import Batch, Clock, DataFacts, Shape, StreamFacts

if TYPE_CHECKING:
    from kdx.randomness import Randomness

hookimpl = pluggy.HookimplMarker("kdx")
"""Decorates each hook that a plugin implements: `@kdx.hookimpl`."""


class _Mark:
    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"kdx.{self.name}"


REQUIRED: Final = _Mark("REQUIRED")
"""An input that the config must name."""
OPTIONAL: Final = _Mark("OPTIONAL")
"""An input that the config may name; `forward` gets None when it does not."""


class Many:
    """An input that takes any number of refs; `forward` gets a list. `*.logits` means that of every teacher."""

    def __init__(self, *default: str) -> None:
        self.default = default


Input = str | Many | _Mark


@dataclass(frozen=True)
class Knob:
    """A number that may move. A config gives a constant, a schedule or a ref for it; `forward` gets a tensor.

    The tensor is 0-d, or `[B]` when the ref has one value per sample: `kdx.per_sample(knob, like)` makes either
    broadcast. Constants outside of the range are refused when the config is read.
    """

    default: float
    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None

    def problem(self, value: float) -> str | None:
        """What is wrong with a constant, or None."""
        if not math.isfinite(value):
            return "must be a finite number"
        if self.above is not None and not value > self.above:
            return f"must be above {self.above:g}"
        if self.at_least is not None and not value >= self.at_least:
            return f"must be at least {self.at_least:g}"
        if self.at_most is not None and not value <= self.at_most:
            return f"must be at most {self.at_most:g}"
        return None


def per_sample(knob: Tensor, like: Tensor) -> Tensor:
    """Shape a knob (0-d or `[B]`) so that it broadcasts against `like` (`[B, ...]`)."""
    return knob if knob.ndim == 0 else knob.reshape(-1, *([1] * (like.ndim - 1)))


@dataclass(frozen=True)
class Given:
    """What the engine hands to a node or an updater when it is built.

    `shapes` maps each input to the shape of one sample (a list of shapes for `Many`); `facts` describes the data;
    `generator` is the node's own source of random numbers, saved with the checkpoint; `refs` maps each input to the
    tensor behind it (a list for `Many`), as `cnn.logits`. An updater is told the `losses`: the name of each and the
    component behind it, in the order of `Losses.parts`.
    """

    shapes: Mapping[str, Any] = field(default_factory=dict)
    facts: DataFacts = field(default_factory=lambda: DataFacts(streams={}))
    generator: torch.Generator = field(default_factory=torch.Generator)
    refs: Mapping[str, Any] = field(default_factory=dict)
    losses: Mapping[str, str] = field(default_factory=dict)

    def shape(self, name: str) -> Shape:
        """The per-sample shape of the input `name`."""
        shape: Shape = self.shapes[name]
        return shape

    def owners(self, name: str) -> tuple[str, ...]:
        """The models and nodes behind an input of many refs, as `cnn` for `cnn.logits`, in their order; their positions
        (`0`, `1`) where the node was made without refs.
        """
        refs = self.refs.get(name) or [str(place) for place in range(len(self.shapes[name]))]
        return tuple(ref.partition(".")[0] for ref in refs)


class Component:
    """Anything that a config can name with `use:`. Its options are the fields of the nested frozen dataclass."""

    name: ClassVar[str] = ""

    @dataclass(frozen=True)
    class Config:
        """No options."""


class Model(Component, ABC):
    """Makes a network. `build` returns a `kdx.Network`: the bare net, the streams that it reads, and what turns raw
    streams into its input. It normalises and resizes for itself, so student and teachers may differ in both.

    `offers` are the tensors that refs can name besides taps, for checks before anything is built; None where only the
    built net knows.
    """

    offers: ClassVar[tuple[str, ...] | None] = None

    def __init__(self, config: Any, facts: DataFacts, streams: tuple[str, ...]) -> None:
        self.config = config
        self.facts = facts
        self.streams = streams

    @abstractmethod
    def build(self) -> Network:
        """A fresh network. The engine has seeded torch's global generator by the model's role."""

    def skeleton(self) -> Network:
        """The same network without published weights, for weights that are put in afterwards."""
        return self.build()


class Network(nn.Module):
    """A net with its input side: `net(*[prepare(stream) for stream in streams])`.

    `net` returns a tensor (the `logits`) or a dict of named tensors. Only `net` is saved and exported, so its
    state-dict keys are those of the library that it came from.
    """

    def __init__(self, net: nn.Module, streams: Sequence[str] = ("image",), prepare: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net
        self.streams = tuple(streams)
        self.prepare = nn.Identity() if prepare is None else prepare

    def forward(self, *streams: Tensor) -> Any:
        return self.net(*[self.prepare(stream) for stream in streams])

    def answer(self, batch: Batch) -> Tensor:
        """What is evaluated: `net.predict` where there is one, else the logits that `net` returns."""
        streams = [self.prepare(batch[stream]) for stream in self.streams]
        predict = getattr(self.net, "predict", None)
        found = predict(*streams) if predict is not None else self.net(*streams)
        found = found["logits"] if isinstance(found, Mapping) else found
        found = found[0] if isinstance(found, (tuple, list)) else found
        if not isinstance(found, Tensor):
            raise PlanError(f"{type(self.net).__name__} answers with a {type(found).__name__}, expected a tensor")
        return found


class Node(Component, nn.Module):
    """A component that makes tensors from refs.

    inputs: each parameter of `forward` -> its default ref, `REQUIRED`, `OPTIONAL`, or `Many(...)`.
    knobs: each knob of `forward` -> `Knob`.
    outputs: the fields that `forward` returns; `("out",)` for a plain tensor, else a dict with these keys.
    borrows: each parameter of `forward` -> a sub-module of a model, as `teacher.classifier`. It is called with gradient
        to its input and none to its weights. `Many("*.classifier")` gives a list, one for each teacher.
    trains: the borrowed parts whose weights learn from the node as well. They must be parts of a model that is trained.
    same_shape: groups of inputs whose shapes must be equal.
    confidence: how sure it is that a published method is computed: `values` where numbers of public code are met,
        `code` where it was written after public code, `paper` after the description alone; empty for one's own rules.
    gaps: the input of any number of refs of which single ones may be absent for a sample, as a teacher that listens is
        for one without sound. `forward` then takes `present`, bool [B, M], which is None where all are always there.
    separable: whether what it gives for a sample depends on no other sample, or is a plain mean over the batch of what
        does so, and whether it remembers nothing. Each of several processes then works it out for its own samples. By
        default a node sees the samples of all processes, and needs to know nothing of them. A class says it for itself,
        not for those that derive from it.
    whole_batch: whether it needs all samples of a batch at once, as one that looks for the partners of mixtures does.
        It is refused where `train.accumulate` or `train.micro_batch` splits the batch.

    Parameters are trained with the student; buffers and the generator are saved, so state survives a resume.
    """

    inputs: ClassVar[Mapping[str, Input]] = {}
    knobs: ClassVar[Mapping[str, Knob]] = {}
    outputs: ClassVar[tuple[str, ...]] = ("out",)
    borrows: ClassVar[Mapping[str, str | Many]] = {}
    trains: ClassVar[tuple[str, ...]] = ()
    same_shape: ClassVar[tuple[tuple[str, ...], ...]] = ()
    confidence: ClassVar[str] = ""
    separable: ClassVar[bool] = False
    whole_batch: ClassVar[bool] = False
    gaps: ClassVar[str] = ""

    def __init__(self, config: Any, given: Given) -> None:
        super().__init__()
        self.config = config
        self.given = given

    def calibrate(self, **tensors: Any) -> None:
        """Called with the node's inputs for some batches before training starts; most nodes need nothing."""

    def after_update(self, clock: Clock) -> None:
        """Called after each optimizer step, without gradient; most nodes need nothing."""


class Target(Node):
    """Makes something from model outputs: an ensemble, a logit transform, a temperature.

    shown: the fields whose numbers reports show over training and class by class: [B], 0-d, or [B, M] with one column
        for each ref of an input of M refs. Those of the usual names need not be declared.
    """

    shown: ClassVar[tuple[str, ...]] = ("weights", "temperature")


class Aligner(Node):
    """Makes the tensor `source` comparable to `like`. `forward(source)` returns the shape of `like`."""

    inputs = {"source": REQUIRED, "like": REQUIRED}


class Loss(Node):
    """Gives one term: the mean over the batch (0-d), or one value per sample (`[B]`).

    The engine hands in float32 tensors whatever the precision of the run, and applies `weight`; there is no weight
    inside.

    A method that changes what is deployed names in `answers` the inputs and borrowed parts of its `answer`: the inputs
    must be tensors of the student, and the parts and the loss's own parameters become a part of the exported student.
    """

    answers: ClassVar[tuple[str, ...]] = ()

    @property
    def is_soft_divergence(self) -> bool:
        """Whether the term is `kdx.soft_divergence` of the inputs `student` and `teacher` and the knob `temperature`.

        It may then be worked out together with the cross-entropy of the same logits. A class says it for itself, not
        for those that derive from it.
        """
        return False

    def answer(self, **tensors: Any) -> Tensor:
        """The logits of the deployed student; called only where `answers` names inputs."""
        raise AssertionError(f"{self.name} names no inputs in `answers`")


class Schedule(Component, ABC):
    """A number as a pure function of the clock."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def at(self, clock: Clock) -> float: ...


class Split(ABC):
    """Samples that can be fetched by position. `labels` (int64 `[N]`) is None where the samples carry no class."""

    labels: Tensor | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def fetch(self, indices: Sequence[int]) -> Batch:
        """The samples at these positions as one batch on the CPU, without `index`. Runs inside loader workers."""


class Dataset(Component, ABC):
    """Gives batches of named streams with raw values; models normalise and resize for themselves.

    `view_options` are the options that act in `on_device` alone: the views of a sample may differ in them. `places` are
    the options that say where the data lies or how it gets there, not what it is: they do not count for the hash of a
    run, as `fingerprint` covers the content.
    """

    view_options: ClassVar[tuple[str, ...]] = ("augment",)
    places: tuple[str, ...] = ()

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def facts(self) -> DataFacts:
        """Streams, class names and size of the training source; `labels` may be left empty."""

    @abstractmethod
    def train(self) -> Split: ...

    def val(self) -> Split | None:
        """The data set's own validation split; None lets the engine take one from `train`."""
        return None

    @abstractmethod
    def test(self) -> Split | None: ...

    def on_device(self, batch: Batch, randomness: Randomness | None) -> Batch:
        """Decode and augment a batch that is already on the device; no augmentation where `randomness` is None."""
        return batch

    def reading(self, streams: Iterable[str]) -> Dataset:
        """The same data for a run that reads these streams alone: `on_device` may leave others out; by default it does
        not.
        """
        return self

    @property
    def records(self) -> Mapping[str, StreamFacts]:
        """Streams that `on_device` adds where it augments, as what was mixed with what. Only views have them."""
        return {}

    def varies(self, stream: str) -> bool:
        """Whether `on_device` may change this stream at random; by default, whether any of `view_options` is set."""
        return any(bool(getattr(self.config, option, None)) for option in self.view_options)

    def mixes(self, stream: str) -> bool:
        """Whether `on_device` may mix this stream of several samples of a batch, as `mixup` does; by default not."""
        return False

    def view(self, config: Any) -> Dataset:
        """The same data with other values of `view_options`, for another view of its samples."""
        return type(self)(config)

    @abstractmethod
    def fingerprint(self) -> str:
        """A digest that changes whenever the content of the data does."""


class Metric(Component, ABC):
    """Numbers over an evaluation split, kept on the device until `compute`."""

    inputs: ClassVar[Mapping[str, str]] = {"logits": "student.logits", "label": "batch.label"}

    def __init__(self, config: Any, facts: DataFacts, device: torch.device) -> None:
        self.config = config
        self.facts = facts
        self.device = device

    @abstractmethod
    def update(self, **tensors: Tensor) -> None: ...

    @abstractmethod
    def compute(self) -> dict[str, float]: ...
