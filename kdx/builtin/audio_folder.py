"""A data set of sound files in one folder per class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from kdx.builtin.audio_augment import SOUND_AUGMENTATIONS
from kdx.builtin.audio_data import AudioDataset
from kdx.builtin.image_data import digest
from kdx.builtin.image_folder import labelled_files, read_folders
from kdx.builtin.pair_files import Row, RowSplit, described
from kdx.builtin.sound_files import SOUND_EXTENSIONS, Clip, SoundReader, look, read_length


class AudioFolder(AudioDataset):
    """Sound files in one folder per class, these perhaps below `train`, `val` and `test`.

    path: the folder, as seen from where kdx is started.
    rate: samples per second of the stream `audio`. resample: brings clips to this rate; off, others are refused.
    length: of every clip in seconds; left out, that of the longest training clip. Of longer clips the middle is kept,
        shorter ones are followed by silence, and `audio_mask` says where there is sound.

    Channels are averaged. Classes are the sub-folders of training in alphabetical order. The headers of all files are
    read before training: one that is unreadable, empty or of a rate that is refused is an error that names it. The
    fingerprint covers paths, sizes and times of change, as in `image_folder`. Needs `kdx[audio]`.
    """

    name = "audio_folder"
    places = ("path",)
    augmentations = SOUND_AUGMENTATIONS

    @dataclass(frozen=True)
    class Config:
        path: str
        rate: int = 16000
        resample: bool = True
        length: float | None = None
        augment: dict[str, Any] = field(default_factory=dict)
        mel: dict[str, Any] | None = None
        mfcc: dict[str, Any] | None = None

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._root = Path(config.path)
        self._files = labelled_files(read_folders(self._root), SOUND_EXTENSIONS, "sound")

    @property
    def rate(self) -> int:
        return self.config.rate

    def classes(self) -> tuple[str, ...]:
        return tuple(self._files["train"])

    def fingerprint(self) -> str:
        roots = (self._root, self._root)
        return digest(part for name, split in self.splits.items() for part in (name, *described(split.rows, roots)))

    @cached_property
    def splits(self) -> dict[str, RowSplit]:
        rows = {name: list(self._rows(files)) for name, files in self._files.items()}
        clips = (row.sound for row in rows["train"] if row.sound is not None)
        reader = SoundReader(self.rate, read_length(self.config.length, self.rate, clips))
        return {name: RowSplit(found, None, reader, labelled=True) for name, found in rows.items()}

    def _rows(self, files: Mapping[str, list[Path]]) -> Iterator[Row]:
        for name, group in files.items():
            for file in group:
                yield Row(None, self._look(file), self.classes().index(name), str(file))

    def _look(self, file: Path) -> Clip:
        return look(file, str(file), self.rate, self.config.resample)
