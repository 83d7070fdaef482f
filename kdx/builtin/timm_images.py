"""Image data sets that timm's readers know how to read."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from PIL import Image

from kdx.builtin.image_data import ImageDataset, digest, labels_of, sampled
from kdx.builtin.pictures import SEEN_FOR_CHANNELS, PictureSplit, read_channels, read_size
from kdx.components import Split
from kdx.errors import ConfigError, DataError


class TimmReader(ImageDataset):
    """Images that a reader of `timm.data.create_dataset` gives: a folder, or a data set of Hugging Face.

    reader: the name of the data set as timm takes it; empty for a folder, `hfds/NAME` for Hugging Face.
    train, val, test: the names of the splits; for a folder, its sub-folders. Without `val`, training is divided.

    The fingerprint covers all labels, and the content of 64 images of each split.
    """

    name = "timm_reader"
    places = ("root",)

    @dataclass(frozen=True)
    class Config:
        root: str
        reader: str = ""
        train: str = "train"
        val: str | None = None
        test: str | None = None
        size: int = 64
        channels: str = "auto"
        augment: dict[str, Any] = field(default_factory=dict)

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._size = read_size(config.size)

    def classes(self) -> tuple[str, ...]:
        numbers: dict[str, int] = self._readers["train"].class_to_idx
        return tuple(sorted(numbers, key=lambda name: numbers[name]))

    def fingerprint(self) -> str:
        return digest(part for split in self.splits.values() for part in sampled(split))

    @cached_property
    def _readers(self) -> dict[str, Any]:
        names = {split: getattr(self.config, split) for split in ("train", "val", "test")}
        readers = {split: self._reader(split, name) for split, name in names.items() if name is not None}
        train = readers["train"]
        for split, reader in readers.items():
            if split != "train" and getattr(reader, "samples", split) == getattr(train, "samples", None):
                raise ConfigError(
                    f"data.{split}: {self.config.root!r} has no part {names[split]!r} of its own; timm reads the "
                    "training images for it"
                )
            if reader.class_to_idx != train.class_to_idx:
                raise DataError(
                    f"data.{split}: the classes of {names[split]!r} ({', '.join(reader.class_to_idx)}) are not those "
                    f"of training ({', '.join(train.class_to_idx)})"
                )
        return readers

    def _reader(self, split: str, name: str) -> Any:
        from timm.data.dataset_factory import create_dataset

        config = self.config
        try:
            reader = getattr(create_dataset(config.reader, config.root, split=name), "reader", None)
        except (AssertionError, RuntimeError, OSError, ValueError, NameError) as error:
            raise DataError(
                f"data.root: timm's reader {config.reader!r} cannot read {name!r} in {config.root!r}: "
                f"{error or 'there is no such file or folder'}"
            ) from error
        if not hasattr(reader, "__getitem__") or not hasattr(reader, "class_to_idx"):
            raise ConfigError(
                f"data.reader: timm's reader {config.reader!r} of {config.root!r} does not give classes and "
                "numbered samples; expected a folder or hfds/NAME (for those of torchvision: `use: torchvision`)"
            )
        return reader

    @cached_property
    def splits(self) -> dict[str, Split]:
        train = self._readers["train"]
        seen = range(0, len(train), max(1, len(train) // SEEN_FOR_CHANNELS))
        channels = read_channels(self.config.channels, (_read_picture(train, i) for i in seen))
        return {
            split: _ReaderSplit(reader, labels_of(reader), self._size, channels)
            for split, reader in self._readers.items()
        }


class _ReaderSplit(PictureSplit):
    """Samples of a timm reader. timm's own data set would put the next image in the place of an unreadable one."""

    def __init__(self, reader: Any, labels: list[int], size: int, channels: int) -> None:
        super().__init__(labels, size, channels)
        self._reader = reader

    def picture(self, i: int) -> Image.Image:
        return _read_picture(self._reader, i)

    def where(self, i: int) -> str:
        return str(self._reader.filename(i, absolute=True))


def _read_picture(reader: Any, i: int) -> Image.Image:
    try:
        with reader[i][0] as file:
            return Image.open(io.BytesIO(file.read()))
    except Exception as error:  # decoders raise whatever they like
        where = reader.filename(i, absolute=True)
        raise DataError(f"{where}: cannot be read: {type(error).__name__}: {error}") from error
