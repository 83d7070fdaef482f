"""From a data set to splits: which samples a run sees, and with which labels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdx.class_choice import choose_classes, chosen_names
from kdx.components import Dataset, Split
from kdx.errors import ConfigError, DataError, KdxError, did_you_mean
from kdx.formats import counted
from kdx.randomness import seeded
from kdx.types import Batch, DataFacts

UNLABELLED = ("keep", "drop")


@dataclass
class SplitOptions:
    """Which samples a run trains on and whose labels it may see; the options of `data:` that any data set has.

    `views` is one more: how many versions of each sample there are, or further views by name, or both.

    classes: the numbers of the classes that the run is about; None for all. Only their samples are trained and tested
        on, and a label is the place of its class in this list: `[5, 7]` makes 0 of 5 and 1 of 7. A teacher that is
        such a run knows these classes alone.
    labelled: how many training samples keep their label, as a count (`500`) or a share (`0.1`), drawn class by class;
        None for all. With 0 a student learns from its teachers alone.
    unlabelled: `keep` trains on the other samples without their label, `drop` leaves them out.
    validation: how many training samples are held out, as a count or a share, where the data set brings no validation
        split of its own; 0 for none.
    split_seed: decides which samples these are. Fewer labels are a subset of more labels where the classes are
        balanced.
    """

    classes: list[int] | None = None
    labelled: int | float | None = None
    unlabelled: str = "keep"
    validation: int | float = 0.1
    split_seed: int = 0


class View(Split):
    """The samples of `source` at `positions` (int64 `[N]`), with `labels` (int64 `[N]`, -1 where hidden).

    Batches carry `index`, the position in the source.
    """

    def __init__(self, source: Split, positions: Tensor, labels: Tensor | None) -> None:
        self.source = source
        self.positions = positions
        self.labels = labels

    def __len__(self) -> int:
        return len(self.positions)

    def fetch(self, indices: Sequence[int]) -> Batch:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        labels = None if self.labels is None else self.labels.index_select(0, chosen)
        return self._at(self.positions.index_select(0, chosen), labels)

    def read(self, plan: Sequence[Tensor]) -> Iterator[Batch]:
        """As `fetch` for one batch after another (each int64 [B]), with one look for the labels of all of them."""
        if not plan:
            return
        order, sizes = torch.cat([*plan]), [len(indices) for indices in plan]
        labels = None if self.labels is None else torch.split(self.labels.index_select(0, order), sizes)
        for place, positions in enumerate(torch.split(self.positions.index_select(0, order), sizes)):
            yield self._at(positions, None if labels is None else labels[place])

    def _at(self, positions: Tensor, labels: Tensor | None) -> Batch:
        source = self.source
        if isinstance(source, TensorSplit):
            batch = source.take(positions, but=() if labels is None else ("label",))
        else:
            batch = dict(source.fetch(positions.tolist()))
        if labels is not None:
            batch["label"] = labels
        batch["index"] = positions
        return batch


@dataclass(frozen=True)
class Splits:
    """What a run trains on, validates on and is tested on, and the facts that its components may know."""

    train: View
    val: View | None
    test: View | None
    facts: DataFacts


def make_splits(dataset: Dataset, options: SplitOptions) -> Splits:
    """The splits of a run. Labels that the run may not see are -1 in batches and in `facts.labels`.

    Raises ConfigError for options that the data cannot meet, DataError for labels that do not fit the classes.
    """
    facts, chosen = dataset.facts(), options.classes
    source = dataset.train()
    labels = _labels(source, facts.classes, "train")
    own_val, own_test = dataset.val(), dataset.test()
    train = torch.arange(len(source))
    val = None if own_val is None else _whole(own_val, facts.classes, chosen, "val")
    if chosen is not None:
        labels = choose_classes(labels, chosen, facts.classes, "train")
    if own_val is None:
        held = _held_out(options, labels, len(source))
        if held.any():
            val = View(source, train[held], None if labels is None else labels[held])
            train = train[~held]
    if chosen is not None and labels is not None:
        train = train[labels[train] >= 0]
    visible = _visible(options, labels, train)
    if options.unlabelled == "drop" and visible is not None:
        train = train[visible[train] >= 0]
        if not len(train):
            raise ConfigError("data.unlabelled: 'drop' leaves no training sample, because none has a label")
    return Splits(
        train=View(source, train, None if visible is None else visible[train]),
        val=val,
        test=None if own_test is None else _whole(own_test, facts.classes, chosen, "test"),
        facts=replace(
            facts,
            classes=facts.classes if chosen is None else chosen_names(chosen, facts.classes),
            size=len(source),
            labels=() if visible is None else tuple(visible.tolist()),
            labelled=visible is not None and bool((visible[train] >= 0).all()),
        ),
    )


def _whole(split: Split, classes: tuple[str, ...], chosen: list[int] | None, name: str) -> View:
    """All samples of a split, or those of the chosen classes."""
    labels = _labels(split, classes, name)
    if chosen is None:
        return View(split, torch.arange(len(split)), labels)
    labels = choose_classes(labels, chosen, classes, name)
    return View(split, (labels >= 0).nonzero()[:, 0], labels[labels >= 0])


def _labels(split: Split, classes: tuple[str, ...], name: str) -> Tensor | None:
    """The labels of a split, once it is sure that they fit its length and the classes."""
    if len(split) == 0:
        raise DataError(f"data: the {name} split has no samples")
    if split.labels is None:
        return None
    labels = split.labels.to("cpu", torch.int64)
    if labels.shape != (len(split),):
        raise DataError(
            f"data: the {name} split has {len(split)} samples but labels of shape {list(labels.shape)}; "
            f"expected [{len(split)}]"
        )
    wrong = (labels < -1) | (labels >= len(classes)) if classes else labels < -1
    if wrong.any():
        first = int(wrong.int().argmax())
        expected = f"0 to {len(classes) - 1} for {len(classes)} classes" if classes else "0 or more"
        raise DataError(
            f"data: sample {first} of the {name} split has label {int(labels[first])}; expected {expected}, "
            "or -1 for a sample without a label"
        )
    return labels


def _held_out(options: SplitOptions, labels: Tensor | None, size: int) -> Tensor:
    """Which training samples are held out for validation, bool `[size]`; only labelled ones where there are labels."""
    found = options.validation
    if isinstance(found, bool) or not isinstance(found, int | float) or found < 0:
        raise ConfigError(f"data.validation: found {found!r}, expected a count, or a share of at least 0 and below 1")
    if isinstance(found, float) and found >= 1:
        raise ConfigError(f"data.validation: found {found}, but a share is below 1 (a count has no decimal point)")
    held = torch.zeros(size, dtype=torch.bool)
    candidates = held.logical_not() if labels is None else labels >= 0
    available = int(candidates.sum())
    if not found or not available:
        return held
    count = found if isinstance(found, int) else max(1, round(found * available))
    if count >= size:
        whole = counted(size, "training sample")
        raise ConfigError(f"data.validation: found {found}, but of {whole} at least one must be left")
    if count > available:
        labelled = counted(available, "training sample")
        raise ConfigError(f"data.validation: found {found}, but there are labels for only {labelled}")
    held[_draw(labels, candidates, count, 0, seeded("validation", options.split_seed))] = True
    return held


def _visible(options: SplitOptions, labels: Tensor | None, train: Tensor) -> Tensor | None:
    """The labels that training may see, for every sample of the source."""
    if options.unlabelled not in UNLABELLED:
        raise ConfigError(
            f"data.unlabelled: found {options.unlabelled!r}, {did_you_mean(str(options.unlabelled), UNLABELLED)}"
        )
    if labels is None:
        if options.labelled is not None:
            raise ConfigError(f"data.labelled: found {options.labelled!r}, but the data set has no class labels")
        return None
    candidates = torch.zeros(len(labels), dtype=torch.bool)
    candidates[train] = labels[train] >= 0
    shown = candidates.nonzero()[:, 0]
    if options.labelled is not None:
        count = _labelled_count(options.labelled, labels[candidates])
        if count < len(shown):
            shown = _draw(labels, candidates, count, min(1, count), seeded("labelled", options.split_seed))
    visible = torch.full_like(labels, -1)
    visible[shown] = labels[shown]
    return visible


def _labelled_count(found: int | float, labels: Tensor) -> int:
    """How many samples keep their label; `labels` are those of the training samples that have one."""
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise ConfigError(f"data.labelled: found {found!r}, expected a count (500), a share (0.1) or null for all")
    if isinstance(found, float) and not 0 < found <= 1:
        raise ConfigError(f"data.labelled: found {found}, but a share is above 0 and at most 1 (a count has no point)")
    if found < 0 or found > len(labels):
        raise ConfigError(
            f"data.labelled: found {found}, expected 0 to {len(labels)}, the training samples that have a label "
            "once validation has been taken"
        )
    count = found if isinstance(found, int) else round(found * len(labels))
    classes = int((labels.bincount() > 0).sum())
    if (count or found) and count < classes:
        share = "" if isinstance(found, int) else f" (a share of {found} of {len(labels)} samples)"
        raise ConfigError(
            f"data.labelled: {count} labels{share} cannot cover {classes} classes; expected {classes} or more, "
            "0 for none, or null for all"
        )
    return count


def _draw(labels: Tensor | None, candidates: Tensor, count: int, least: int, generator: torch.Generator) -> Tensor:
    """`count` of the candidates (bool `[N]`), as positions; each class by its share and with at least `least`."""
    shuffled = torch.randperm(len(candidates), generator=generator)
    shuffled = shuffled[candidates[shuffled]]
    if labels is None:
        return shuffled[:count]
    sizes = labels[shuffled].bincount()
    classes = sizes.nonzero()[:, 0]
    quotas = _quotas(sizes[classes].tolist(), count, least)
    return torch.cat([shuffled[labels[shuffled] == c][:n] for c, n in zip(classes.tolist(), quotas, strict=True)])


def _quotas(sizes: list[int], count: int, least: int) -> list[int]:
    """`count` shared out in proportion to `sizes`, no part above its size or below `least`."""
    wanted = [size * count / sum(sizes) for size in sizes]
    given = [max(least, int(want)) for want in wanted]
    parts = range(len(sizes))
    while sum(given) < count:
        given[max((i for i in parts if given[i] < sizes[i]), key=lambda i: wanted[i] - given[i])] += 1
    while sum(given) > count:
        given[min((i for i in parts if given[i] > least), key=lambda i: wanted[i] - given[i])] -= 1
    return given


class TensorSplit(Split):
    """Samples that lie in memory: stream -> tensor with the sample axis first. Images may stay uint8."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        lengths = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(lengths.values())) != 1:
            listing = ", ".join(f"{name} {length}" for name, length in lengths.items()) or "no stream at all"
            raise DataError(f"data: every stream needs the same number of samples, but found {listing}")
        self.tensors = dict(tensors)
        label = self.tensors.get("label")
        self.labels = label if label is not None and label.ndim == 1 and not label.is_floating_point() else None

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def fetch(self, indices: Sequence[int]) -> Batch:
        return self.take(torch.as_tensor(indices, dtype=torch.int64))

    def take(self, positions: Tensor, but: Container[str] = ()) -> Batch:
        """The samples at `positions` (int64 [B]) as one batch, without some streams: one gather for each."""
        return {name: tensor.index_select(0, positions) for name, tensor in self.tensors.items() if name not in but}


class SampleSplit(Split):
    """Samples that are read one by one, from files for instance."""

    @abstractmethod
    def sample(self, i: int) -> Batch:
        """Sample `i`: stream -> tensor without a batch axis."""

    @abstractmethod
    def where(self, i: int) -> str:
        """The file or the place that sample `i` comes from, for error messages."""

    def fetch(self, indices: Sequence[int]) -> Batch:
        samples = [self._read(i) for i in indices]
        for i, sample in zip(indices, samples, strict=True):
            for name, tensor in samples[0].items():
                if name not in sample or sample[name].shape != tensor.shape:
                    found = list(sample[name].shape) if name in sample else "nothing"
                    raise DataError(
                        f"{self.where(i)}: found {found} for the stream '{name}', expected {list(tensor.shape)} "
                        f"as in {self.where(indices[0])}"
                    )
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    def _read(self, i: int) -> Batch:
        try:
            return self.sample(i)
        except KdxError:
            raise
        except Exception as error:  # decoders raise whatever they like: OSError, SyntaxError, struct.error, ...
            raise DataError(f"{self.where(i)}: cannot be read: {type(error).__name__}: {error}") from error
