"""A data set of tensors in memory, for users of the Python API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from kdx.builtin.image_data import ImageDataset, digest, tensor_parts
from kdx.data import SampleSplit, TensorSplit
from kdx.errors import ConfigError, DataError
from kdx.types import Batch

Source = Mapping[str, Any] | TorchDataset[Any]


class TensorDataset(ImageDataset):
    """Tensors in memory, or any map-style data set of torch that gives `(image, label)` pairs.

    Made in Python by `from_tensors`, and handed to `kdx.run(..., data=...)`; a config file alone cannot hold it. The
    fingerprint is the SHA-256 of all content, so a map-style data set is read once for it.
    """

    name = "tensors"

    @dataclass(frozen=True)
    class Config:
        augment: dict[str, Any] = field(default_factory=dict)

    config: Config
    _given: Mapping[str, TensorSplit | PairSplit] | None = None
    _names: tuple[str, ...] | None = None

    @classmethod
    def from_tensors(
        cls,
        train: Source,
        val: Source | None = None,
        test: Source | None = None,
        classes: Sequence[str] | None = None,
        augment: Mapping[str, Any] | None = None,
    ) -> TensorDataset:
        """A data set of `{"image": ..., "label": ...}` mappings (tensors or arrays), or of torch data sets.

        Images are `[N, C, H, W]`, or `[N, H, W]` for grey ones: uint8, or floats that stay as they are. Labels are
        integers `[N]`, -1 where there is none. `classes` names them in order; left out, they are called by number.
        """
        made = cls(cls.Config(augment=dict(augment or {})))
        sources = {"train": train, "val": val, "test": test}
        made._given = {name: _split(source, name) for name, source in sources.items() if source is not None}
        made._names = None if classes is None else tuple(classes)
        return made

    def classes(self) -> tuple[str, ...]:
        if self._names is not None:
            return self._names
        highest = [int(split.labels.max()) for split in self.splits.values() if split.labels is not None]
        return tuple(str(label) for label in range(max(highest, default=-1) + 1))

    def fingerprint(self) -> str:
        return self._digest

    @cached_property
    def _digest(self) -> str:
        parts: list[memoryview | str] = [" ".join(self.classes())]
        for name, split in self.splits.items():
            if isinstance(split, TensorSplit):
                parts += [name, *tensor_parts(split.tensors)]
            else:
                parts += [name, *(digest(tensor_parts(split.sample(i))) for i in range(len(split)))]
        return digest(parts)

    @property
    def splits(self) -> Mapping[str, TensorSplit | PairSplit]:
        if self._given is None:
            raise ConfigError(
                "data.use: 'tensors' stands for data handed over in Python: "
                "kdx.run(..., data=TensorDataset.from_tensors(train=...))"
            )
        return self._given


class PairSplit(SampleSplit):
    """A map-style data set of torch that gives `(image, label)` pairs, the image as a tensor or a PIL picture."""

    def __init__(self, pairs: TorchDataset[Any], name: str) -> None:
        if not hasattr(pairs, "__len__"):
            raise DataError(f"data: {name}: {type(pairs).__name__} has no length; expected a map-style data set")
        self._pairs: Any = pairs
        self._name = name
        self.labels: Tensor = torch.tensor(self._all_labels(), dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._pairs)

    def sample(self, i: int) -> Batch:
        image, label = self._pair(i)
        return {"image": as_image(image), "label": torch.tensor(self._whole_number(i, label))}

    def where(self, i: int) -> str:
        return f"data: sample {i} of {self._name}"

    def _all_labels(self) -> list[int]:
        targets = getattr(self._pairs, "targets", ())
        if len(targets) == len(self) and getattr(self._pairs, "target_transform", None) is None:
            return [self._whole_number(i, label) for i, label in enumerate(targets)]
        return [self._whole_number(i, self._pair(i)[1]) for i in range(len(self))]

    def _whole_number(self, i: int, label: Any) -> int:
        try:
            return int(label)
        except (TypeError, ValueError) as error:
            raise DataError(f"{self.where(i)}: found the label {label!r}, expected the number of a class") from error

    def _pair(self, i: int) -> tuple[Any, Any]:
        pair = self._pairs[i]
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise DataError(f"{self.where(i)}: found {type(pair).__name__}, expected a pair (image, label)")
        return pair[0], pair[1]


def as_image(image: Any) -> Tensor:
    """A tensor `[C, H, W]` or `[H, W]` with a channel axis in front, or a PIL picture as uint8 `[C, H, W]`."""
    if isinstance(image, Tensor):
        return image if image.ndim != 2 else image[None]
    array = torch.from_numpy(np.array(image))
    return array[None] if array.ndim == 2 else array.permute(2, 0, 1).contiguous()


def _split(source: Source, name: str) -> TensorSplit | PairSplit:
    if not isinstance(source, Mapping):
        return PairSplit(source, name)
    tensors = {stream: torch.as_tensor(content) for stream, content in source.items()}
    image = tensors.get("image")
    if image is not None and image.ndim == 3:
        tensors["image"] = image[:, None]
    label = tensors.get("label")
    if label is not None and not label.is_floating_point():
        tensors["label"] = label.long()
    return TensorSplit(tensors)
