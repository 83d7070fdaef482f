"""Classification data sets on disk that torchvision knows how to read."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdx.builtin.image_data import ImageDataset, digest, labels_of, sampled
from kdx.builtin.pictures import SEEN_FOR_CHANNELS, PictureSplit, read_channels, read_size
from kdx.components import Split
from kdx.data import TensorSplit
from kdx.errors import ConfigError, DataError, did_you_mean

Setting = tuple[str, Any]

_BY_FLAG: dict[str, Setting] = {"train": ("train", True), "test": ("train", False)}
TORCHVISION: dict[str, dict[str, Setting]] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "USPS"), _BY_FLAG),
    **{
        name: {split: ("split", word) for split, word in zip(("train", "val", "test"), words, strict=True) if word}
        for name, words in {
            "Country211": ("train", "valid", "test"),
            "DTD": ("train", "val", "test"),
            "FGVCAircraft": ("train", "val", "test"),
            "Flowers102": ("train", "val", "test"),
            "Food101": ("train", None, "test"),
            "GTSRB": ("train", None, "test"),
            "ImageNet": ("train", "val", None),
            "Imagenette": ("train", "val", None),
            "OxfordIIITPet": ("trainval", None, "test"),
            "PCAM": ("train", "val", "test"),
            "RenderedSST2": ("train", "val", "test"),
            "STL10": ("train", None, "test"),
            "SVHN": ("train", None, "test"),
        }.items()
    },
}
"""Data set of torchvision -> split -> the argument of its constructor that chooses it, and the value."""


class TorchvisionDataset(ImageDataset):
    """A classification data set of torchvision, by its class name, that lies below `root` or is downloaded.

    size: images are cut to a square and scaled to `[size, size]`; needed where they differ in size.
    channels: `1`, `3`, or `auto`, which looks at the first images.
    download: let torchvision fetch what is not there; off unless asked for.

    The fingerprint covers all labels, and the content of all images where they lie in memory, else of 64 per split.
    """

    name = "torchvision"
    places = ("root", "download")

    @dataclass(frozen=True)
    class Config:
        dataset: str
        root: str
        download: bool = False
        size: int | None = None
        channels: str = "auto"
        augment: dict[str, Any] = field(default_factory=dict)

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.dataset not in TORCHVISION:
            raise ConfigError(
                f"data.dataset: {config.dataset!r} is none of the image data sets with classes that torchvision has; "
                f"{did_you_mean(config.dataset, TORCHVISION)}"
            )
        self._size = None if config.size is None else read_size(config.size)

    def classes(self) -> tuple[str, ...]:
        names = getattr(self._sources["train"], "classes", None)
        if names is None:
            labels = self.train().labels
            names = range(0 if labels is None else int(labels.max()) + 1)
        return tuple(str(name[0]) if isinstance(name, tuple) else str(name) for name in names)

    def fingerprint(self) -> str:
        return digest(part for split in self.splits.values() for part in sampled(split))

    @cached_property
    def _sources(self) -> dict[str, Any]:
        from torchvision import datasets

        config = self.config
        make = getattr(datasets, config.dataset)
        if config.download and "download" not in inspect.signature(make).parameters:
            raise ConfigError(f"data.download: torchvision cannot download {config.dataset}; it must lie in data.root")
        extra = {"download": True} if config.download else {}
        sources = {}
        for split, (argument, value) in TORCHVISION[config.dataset].items():
            try:
                sources[split] = make(config.root, **{argument: value}, **extra)
            except (RuntimeError, OSError) as error:
                hint = "" if config.download else "; put it there, or let it be fetched with data.download: true"
                raise DataError(
                    f"data.root: torchvision cannot read the {split} split of {config.dataset} below "
                    f"{config.root!r}{hint}: {error}"
                ) from error
        return sources

    @cached_property
    def splits(self) -> dict[str, Split]:
        stacked = {split: _in_memory(source) for split, source in self._sources.items()}
        splits: dict[str, Split] = {}
        channels = None
        for split, source in self._sources.items():
            images, labels = stacked[split], [int(label) for label in labels_of(source)]
            if images is not None and self._size in (None, images.shape[-1]) and self.config.channels == "auto":
                splits[split] = TensorSplit({"image": images, "label": torch.tensor(labels)})
                continue
            if self._size is None and images is None:
                raise ConfigError(f"data.size: the images of {self.config.dataset} differ in size; expected a number")
            size = self._size or int(images.shape[-1])  # type: ignore[union-attr]
            if channels is None:
                seen = range(min(len(source), SEEN_FOR_CHANNELS))
                channels = read_channels(self.config.channels, (source[i][0] for i in seen))
            where = f"data: sample {{}} of the {split} split of {self.config.dataset}"
            splits[split] = _SourceSplit(source, where, labels, size, channels)
        return splits


class _SourceSplit(PictureSplit):
    """Samples of a torchvision data set that gives PIL pictures."""

    def __init__(self, source: Any, where: str, labels: list[int], size: int, channels: int) -> None:
        super().__init__(labels, size, channels)
        self._source = source
        self._where = where

    def picture(self, i: int) -> Image.Image:
        picture: Image.Image = self._source[i][0]
        return picture

    def where(self, i: int) -> str:
        return self._where.format(i)


def _in_memory(source: Any) -> Tensor | None:
    """uint8 images `[N, C, H, W]` of a torchvision data set that holds all of them in one array, or None."""
    data = getattr(source, "data", None)
    if not isinstance(data, Tensor | np.ndarray):
        return None
    images = torch.as_tensor(data)
    if images.ndim == 3:
        return images[:, None]
    return images if images.shape[1] == 3 else images.permute(0, 3, 1, 2).contiguous()
