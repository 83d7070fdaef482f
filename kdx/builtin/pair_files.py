"""Samples that are rows of files: an image, a clip, or both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kdx.builtin.pictures import open_picture, to_tensor
from kdx.builtin.sound_files import Clip, SoundReader
from kdx.data import SampleSplit
from kdx.types import Batch


@dataclass(frozen=True)
class Row:
    """One sample. A file that it lacks is None; `label` is -1 without one; `where` says where the row stands."""

    image: Path | None
    sound: Clip | None
    label: int
    where: str


class RowSplit(SampleSplit):
    """Rows, read file by file.

    `picture` is the size and number of channels of images, None where the data has none; `reader` makes waveforms, None
    where the data has no sound. Where it has both, each sample says whether it has an image and a clip: what is absent
    is 0. `vectors` are further streams, with a row for each sample.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        picture: tuple[int, int] | None,
        reader: SoundReader | None,
        *,
        labelled: bool,
        vectors: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.rows = rows
        self._picture = picture
        self._reader = reader
        self._vectors = dict(vectors or {})
        self.labels = torch.tensor([row.label for row in rows], dtype=torch.int64) if labelled else None

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, i: int) -> Batch:
        row = self.rows[i]
        found: Batch = {}
        if self._picture is not None:
            size, channels = self._picture
            found["image"] = torch.zeros(channels, size, size, dtype=torch.uint8)
            if row.image is not None:
                with open_picture(row.image, size) as picture:
                    found["image"] = to_tensor(picture, size, channels)
        if self._reader is not None:
            audio = self._reader.silence() if row.sound is None else self._reader.read(row.sound)
            found["audio"], found["audio_mask"] = audio
        if self._picture is not None and self._reader is not None:
            found["image_present"] = torch.tensor(row.image is not None)
            found["audio_present"] = torch.tensor(row.sound is not None)
        for name, vectors in self._vectors.items():
            found[name] = vectors[i]
        if self.labels is not None:
            found["label"] = self.labels[i]
        return found

    def where(self, i: int) -> str:
        return self.rows[i].where


def described(rows: Iterable[Row], roots: tuple[Path, Path]) -> Iterator[str]:
    """What a fingerprint covers of rows: label, and size, time of change and path of each file below its root.

    The roots are those of images and of clips.
    """
    for row in rows:
        yield str(row.label)
        for file, root in zip((row.image, None if row.sound is None else row.sound.file), roots, strict=True):
            yield "" if file is None else _state(file, root)


def _state(file: Path, root: Path) -> str:
    state = file.stat()
    name = file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name
    return f"{name} {state.st_size} {state.st_mtime_ns}"
