"""What all image data sets share: uint8 images become floats in `0..1` on the device, and training ones vary there."""

from __future__ import annotations

import copy
import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from kdx.builtin.augment import AUGMENTATIONS, Augmentation, read_augment
from kdx.components import Dataset, Split
from kdx.data import TensorSplit
from kdx.errors import ConfigError
from kdx.randomness import Randomness
from kdx.types import Batch, DataFacts, StreamFacts

STATISTICS_FROM = 512
"""How many images the statistics of a data set are computed from where its images lie in files."""
BLOCK = 1 << 16
"""How many values are looked at at once. The memory of larger results goes back to the system after each operation,
which takes 8 times as long."""


class ImageDataset(Dataset):
    """A data set with an option `augment`: a mapping from the name of an augmentation to its options, kept in order.

    `augmentations` are those that may be named.
    """

    augmentations: ClassVar[Mapping[str, type[Augmentation]]] = AUGMENTATIONS

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._augment: tuple[Augmentation, ...] = read_augment(config.augment, self.augmentations)
        _check_labels_hold(config.augment, self._augment)

    @property
    @abstractmethod
    def splits(self) -> Mapping[str, Split]:
        """`train`, with `val` and `test` where the data set has them. Asked for often, so made once."""

    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their labels."""

    def train(self) -> Split:
        return self.splits["train"]

    def val(self) -> Split | None:
        return self.splits.get("val")

    def test(self) -> Split | None:
        return self.splits.get("test")

    def facts(self) -> DataFacts:
        return self._facts

    @cached_property
    def _facts(self) -> DataFacts:
        source = self.train()
        return DataFacts(streams=stream_facts(source), classes=self.classes(), size=len(source))

    def view(self, config: Any) -> ImageDataset:
        other = copy.copy(self)  # what has been read is shared
        other.config = config
        other._augment = read_augment(config.augment, self.augmentations)
        _check_one_mixture(config.augment, other._augment, [*self._sizes().values()])
        return other

    @property
    def records(self) -> Mapping[str, StreamFacts]:
        mixes = any(step.mixes for step in self._augment)
        return {"mix_share": StreamFacts("vector", ()), "mix_partner": StreamFacts("vector", ())} if mixes else {}

    def on_device(self, batch: Batch, randomness: Randomness | None) -> Batch:
        found = {name: self._ready(batch[name], name, randomness) for name in batch}
        mixing = next((step for step in self._augment if step.mixes), None)
        if randomness is not None and mixing is not None:
            share = mixing.shares(randomness, next(iter(self._sizes().values()), (1, 1)))
            found |= {"mix_share": share, "mix_partner": batch["index"].roll(1, 0)}
        return found

    def varies(self, stream: str) -> bool:
        return self._facts.streams[stream].kind == "image" and self._acts_on("image")

    def mixes(self, stream: str) -> bool:
        kind = "image" if stream in self._sizes() else stream
        return any(step.mixes and step.acts_on == kind for step in self._augment)

    def _sizes(self) -> dict[str, tuple[int, int]]:
        """Height and width of each stream of images."""
        streams = self._facts.streams.items()
        return {name: (facts.shape[-2], facts.shape[-1]) for name, facts in streams if facts.kind == "image"}

    def _acts_on(self, *kinds: str) -> bool:
        """Whether a step of the augmentation is for one of these kinds of streams."""
        return any(step.acts_on in kinds for step in self._augment)

    def _ready(self, tensor: Tensor, name: str, randomness: Randomness | None) -> Tensor:
        if name not in self._facts.streams or self._facts.streams[name].kind != "image":
            return tensor
        images = to_unit(tensor)
        if randomness is not None:
            for augmentation in self._augment:
                if augmentation.acts_on == "image":
                    images = augmentation(images, randomness)
        return images


def _check_labels_hold(options: Mapping[str, Any], augment: Iterable[Augmentation]) -> None:
    """Refuse steps that mix images. A view may have them, for it is read by the losses that name it alone."""
    for name, step in zip(options, augment, strict=True):
        if step.mixes:
            raise ConfigError(
                f"data.augment.{name}: it mixes images, and a label stays that of the unmixed one; put it into a view, "
                f"as in `data: {{views: {{mixed: {{augment: {{{name}: {{}}}}}}}}}}`, for losses without labels, "
                "as in `inputs: {student: student@mixed.logits, teacher: teacher@mixed.logits}`, or for the loss "
                "mixed_cross_entropy, which knows both labels"
            )


def _check_one_mixture(
    options: Mapping[str, Any], augment: Iterable[Augmentation], sizes: Sequence[tuple[int, int]]
) -> None:
    """Refuse what the one record of a view, of what was mixed with what, cannot say."""
    steps = [*zip(options, augment, strict=True)]
    mixing = {name: step for name, step in steps if step.mixes}
    if len({(step.mixes, *vars(step).items()) for step in mixing.values()}) > 1:
        raise ConfigError(
            f"data.augment.{[*mixing][-1]}: found {' and '.join(mixing)} in one view, expected one way of mixing; give "
            "each a view of its own"
        )
    if "cutmix" not in mixing:
        return
    if len({*sizes}) != 1:
        raise ConfigError(
            f"data.augment.cutmix: found images of {len({*sizes})} sizes, expected one, for the share of a rectangle "
            "is that of its pixels"
        )
    after = [name for name, step in steps[[*options].index("cutmix") + 1 :] if step.acts_on == "image"]
    if after:
        raise ConfigError(
            f"data.augment.cutmix: found {', '.join(after)} after it, expected it last: what moves or covers pixels "
            "changes the share of its rectangle"
        )


def to_unit(images: Tensor) -> Tensor:
    """uint8 images as floats in `0..1`; float ones as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def stream_facts(split: Split) -> dict[str, StreamFacts]:
    """Kind, shape and statistics of each stream, from all samples in memory or else from `STATISTICS_FROM` of them.

    An image stream is `[C, H, W]` for one sample, an integer stream `label` is a label, bool ones are masks, all else
    is a vector. A mask `x_present` marks the samples that have the stream `x`.
    """
    if isinstance(split, TensorSplit):
        tensors = split.tensors
    else:
        count = min(len(split), STATISTICS_FROM)
        tensors = split.fetch([i * len(split) // count for i in range(count)])
    return with_masks({name: _facts(name, tensor) for name, tensor in tensors.items()})


def with_masks(streams: Mapping[str, StreamFacts]) -> dict[str, StreamFacts]:
    """The facts of streams, each told of its mask where there is one."""
    return {
        name: replace(stream, present=mask) if (mask := f"{name}_present") in streams else stream
        for name, stream in streams.items()
    }


def _facts(name: str, tensor: Tensor) -> StreamFacts:
    shape = tuple(tensor.shape[1:])
    if name == "label":
        return StreamFacts("label", shape)
    if not shape or tensor.dtype == torch.bool:
        return StreamFacts("mask" if tensor.dtype == torch.bool else "vector", shape)
    mean, std = _statistics(tensor)
    return StreamFacts("image" if len(shape) == 3 else "vector", shape, mean, std)


def _statistics(tensor: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel (axis 1), on the scale of `to_unit`."""
    moments = torch.zeros(2, tensor.shape[1], dtype=torch.float64)
    for block in torch.split(tensor, max(1, BLOCK // tensor[0].numel())):
        moments += _sums(block.transpose(0, 1).flatten(1))
    mean, square = moments * tensor.shape[1] / tensor.numel()
    std = (square - mean.square()).clamp(min=0).sqrt()
    # A channel that never varies would make a normalised input infinite.
    return tuple(mean.tolist()), tuple(std.clamp(min=1 / 255).tolist())


def _sums(channels: Tensor) -> Tensor:
    """For channels `[C, N]` the sums of values and of squares, float64 `[2, C]`, on the scale of `to_unit`."""
    if channels.dtype == torch.uint8 and len(channels) <= 4:  # histograms take a third of the time
        counts = torch.stack([channel.bincount(minlength=256) for channel in channels]).double()
        values = torch.arange(256, dtype=torch.float64) / 255
        return torch.stack([counts @ values, counts @ values.square()])
    values = to_unit(channels).double()
    return torch.stack([values.sum(1), values.square().sum(1)])


def digest(parts: Iterable[bytes | memoryview | str]) -> str:
    """The SHA-256 of these parts, each with its length, so that no two sequences agree by chance."""
    found = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        found.update(len(raw).to_bytes(8, "big"))
        found.update(raw)
    return found.hexdigest()


def tensor_parts(tensors: Mapping[str, Tensor]) -> Iterable[memoryview | str]:
    """Name, type, shape and content of tensors, for `digest`; the content is not copied."""
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        yield tensor.reshape(-1).view(torch.uint8).numpy().data


def sampled(split: Split, count: int = 64) -> Iterable[memoryview | str]:
    """For `digest`: all labels, and the content of up to `count` samples that are spread evenly over the split."""
    if isinstance(split, TensorSplit):
        return tensor_parts(split.tensors)
    tensors = split.fetch(list(range(0, len(split), max(1, len(split) // count))))
    return tensor_parts({**tensors, "labels": torch.zeros(0) if split.labels is None else split.labels})


def labels_of(source: Any) -> list[int]:
    """All labels of a data set or reader, without decoding an image where it keeps a list of them."""
    for name in ("targets", "labels", "_labels"):
        if len(getattr(source, name, ())) == len(source):
            return [int(label) for label in getattr(source, name)]
    for name in ("samples", "_samples"):
        if len(getattr(source, name, ())) == len(source):
            return [int(sample[1]) for sample in getattr(source, name)]
    return [int(source[i][1]) for i in range(len(source))]
