"""The image data set that kdx ships, and the list of all built-in data sets."""

from __future__ import annotations

import io
import lzma
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdx.builtin.audio_folder import AudioFolder
from kdx.builtin.image_data import ImageDataset, digest, tensor_parts
from kdx.builtin.image_folder import ImageFolder
from kdx.builtin.paired import Paired
from kdx.builtin.spoken_digits import SpokenDigits
from kdx.builtin.tensor_data import TensorDataset
from kdx.builtin.timm_images import TimmReader
from kdx.builtin.torchvision_images import TorchvisionDataset
from kdx.builtin.tuxpaint import TuxPaint
from kdx.components import Dataset
from kdx.data import TensorSplit
from kdx.errors import DataError

FILE = Path(__file__).parent / "files" / "fashion_mnist_10k.npy.xz"


class FashionMnist(ImageDataset):
    """10,000 images of Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017), `[1, 28, 28]` in 10 classes, which kdx brings.

    Training has 800 images of each class, taken from the official training file; test has 200 of each, taken from the
    official test file. The fingerprint is the SHA-256 of the pixels and labels.
    """

    name = "fashion_mnist"

    @dataclass(frozen=True)
    class Config:
        augment: dict[str, Any] = field(default_factory=dict)

    def classes(self) -> tuple[str, ...]:
        return (
            "t-shirt",
            "trouser",
            "pullover",
            "dress",
            "coat",
            "sandal",
            "shirt",
            "sneaker",
            "bag",
            "ankle boot",
        )

    def fingerprint(self) -> str:
        return digest(part for split in self.splits.values() for part in tensor_parts(split.tensors))

    @cached_property
    def splits(self) -> dict[str, TensorSplit]:
        try:
            images, labels, test_images, test_labels = _read(FILE)
        except (OSError, lzma.LZMAError) as error:
            raise DataError(f"data: the Fashion-MNIST file of kdx cannot be read: {FILE}: {error}") from error
        return {
            "train": TensorSplit({"image": images[:, None], "label": labels.long()}),
            "test": TensorSplit({"image": test_images[:, None], "label": test_labels.long()}),
        }


@cache
def _read(path: Path) -> list[torch.Tensor]:
    """The four arrays of the file, unpacked once for all runs of a process: a run opens its data for each run that it
    needs.
    """
    content = io.BytesIO(lzma.decompress(path.read_bytes()))
    return [torch.from_numpy(np.load(content, allow_pickle=False)) for _ in range(4)]


DATASETS: list[type[Dataset]] = [
    FashionMnist,
    SpokenDigits,
    ImageFolder,
    AudioFolder,
    Paired,
    TuxPaint,
    TorchvisionDataset,
    TimmReader,
    TensorDataset,
]
