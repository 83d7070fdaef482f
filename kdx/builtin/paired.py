"""A data set of pairs of image and sound files that a table lists."""

from __future__ import annotations

import csv
import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from kdx.builtin.audio_data import AudioDataset
from kdx.builtin.image_data import digest
from kdx.builtin.image_folder import SPLITS
from kdx.builtin.pair_files import Row, RowSplit, described
from kdx.builtin.pictures import SEEN_FOR_CHANNELS, check_picture, read_channels, read_size
from kdx.builtin.sound_files import SoundReader, look, read_length
from kdx.builtin.text_vectors import read_texts
from kdx.errors import ConfigError, DataError, did_you_mean

COLUMNS = ("image", "audio", "caption", "label", "split")
MODALITIES = ("image", "audio")
Entry = dict[str, str]


class Paired(AudioDataset):
    """Pairs of an image and a clip, one in each row of a CSV file with a header.

    index: the file. Its columns are `image` and `audio` (paths), `caption` (text), `label` (the name of a class) and
        `split` (`train`, `val`, `test`); other columns are left alone. Any of them may be missing, but not both kinds
        of files: without `label` nothing has a label, without `split` all rows are for training. A cell may be empty:
        a sample without this modality, which `image_present` and `audio_present` say, or without a label.
    images, sounds: the folders that the paths are relative to; left out, that of the index.
    size, channels: of the images, as in `image_folder`.
    rate, resample, length: of the clips, as in `audio_folder`.
    text: adds the stream `text`, a vector for each caption, as in `tuxpaint`; where vectors are stored in a file, the
        key of a row is the path of its image (else of its clip) without the ending.
    allow_absent: lets all rows of `val` or `test` lack a modality, for networks that do not read it.

    Classes are the labels of training in alphabetical order, or in that of numbers. Wrong rows are named by file and
    row before training; the header is row 1. No file may be in two splits, or have two labels. The fingerprint covers
    labels, and path, size and time of change of every file. Sound needs `kdx[audio]`.
    """

    name = "paired"
    places = ("index", "images", "sounds")

    @dataclass(frozen=True)
    class Config:
        index: str
        images: str | None = None
        sounds: str | None = None
        size: int = 64
        channels: str = "auto"
        rate: int = 16000
        resample: bool = True
        length: float | None = None
        allow_absent: bool = False
        text: dict[str, Any] | None = None
        augment: dict[str, Any] = field(default_factory=dict)
        mel: dict[str, Any] | None = None
        mfcc: dict[str, Any] | None = None

    config: Config

    def __init__(self, config: Config) -> None:
        self._index = Path(config.index)
        self._roots = {
            "image": Path(config.images) if config.images is not None else self._index.parent,
            "audio": Path(config.sounds) if config.sounds is not None else self._index.parent,
        }
        self._columns, self._entries = read_index(self._index)
        super().__init__(config)
        self._size = read_size(config.size)
        if "audio" not in self._columns and (wrong := [n for n in ("mel", "mfcc") if getattr(config, n) is not None]):
            raise ConfigError(f"data.{wrong[0]}: {self._index} has no column 'audio' to make it from")
        self._texts = read_texts(config.text)
        if self._texts is not None and "caption" not in self._columns and (config.text or {}).get("file") is None:
            raise ConfigError(f"data.text: {self._index} has no column 'caption' to make vectors from")
        _check_modalities(self._index, self._columns, self._entries, config.allow_absent)

    def _check_steps(self) -> None:
        for name, step in zip(self.config.augment, self._augment, strict=True):
            column = "image" if step.acts_on == "image" else "audio"
            if column not in self._columns:
                raise ConfigError(f"data.augment.{name}: it is for {column}, a column that {self._index} lacks")
        super()._check_steps()

    @property
    def rate(self) -> int:
        return self.config.rate

    def classes(self) -> tuple[str, ...]:
        names = {entry["label"] for _, entry in self._entries["train"] if entry.get("label")}
        numbers = all(name.isdecimal() for name in names)
        return tuple(sorted(names, key=lambda name: (int(name) if numbers else 0, name)))

    def may_lack(self, name: str) -> bool:
        return any(not entry[name] for _, entry in self._entries["train"])

    def fingerprint(self) -> str:
        roots = (self._roots["image"], self._roots["audio"])
        parts = (part for name, split in self.splits.items() for part in (name, *described(split.rows, roots)))
        texts = () if self._texts is None else (self._texts.digest, *self._captions())
        return digest([*self.classes(), *parts, *texts])

    def _captions(self) -> Iterator[str]:
        return (entry.get("caption", "") for entries in self._entries.values() for _, entry in entries)

    def _vectors(self, entries: list[tuple[int, Entry]]) -> dict[str, Tensor]:
        """The stream `text` of these rows, where there is one."""
        if self._texts is None:
            return {}
        keys = [Path(entry.get("image") or entry.get("audio") or "").with_suffix("").as_posix() for _, entry in entries]
        texts = zip(keys, entries, strict=True)
        found = [(key, entry.get("caption", ""), f"{self._index} row {number}") for key, (number, entry) in texts]
        return {"text": self._texts.vectors(found)}

    @cached_property
    def splits(self) -> dict[str, RowSplit]:
        rows = {split: [self._row(*entry) for entry in entries] for split, entries in self._entries.items()}
        for column in MODALITIES:
            _check_apart(self._index, column, self._entries, self._roots[column])
        picture = reader = None
        if "image" in self._columns:
            files = [row.image for row in rows["train"] if row.image is not None]
            seen = files[:: max(1, len(files) // SEEN_FOR_CHANNELS)]
            picture = self._size, read_channels(self.config.channels, (Image.open(file) for file in seen))
        if "audio" in self._columns:
            clips = (row.sound for row in rows["train"] if row.sound is not None)
            reader = SoundReader(self.rate, read_length(self.config.length, self.rate, clips))
        labelled = "label" in self._columns
        return {
            split: RowSplit(found, picture, reader, labelled=labelled, vectors=self._vectors(self._entries[split]))
            for split, found in rows.items()
        }

    def _row(self, number: int, entry: Entry) -> Row:
        where = f"{self._index} row {number}"
        image = sound = None
        if entry.get("image"):
            image = self._roots["image"] / entry["image"]
            where += f": {image}"
            check_picture(image, where)
        if entry.get("audio"):
            file = self._roots["audio"] / entry["audio"]
            sound = look(file, f"{self._index} row {number}: {file}", self.rate, self.config.resample)
            where += f": {file}" if image is None else f" and {file}"
        label, classes = entry.get("label"), self._class_numbers
        if label and label not in classes:
            near = did_you_mean(label, classes, what="classes of training")
            raise DataError(f"{self._index} row {number}: found the label {label!r}, which no training row has; {near}")
        return Row(image, sound, classes[label] if label else -1, where)

    @cached_property
    def _class_numbers(self) -> Mapping[str, int]:
        return {name: number for number, name in enumerate(self.classes())}


def read_index(index: Path) -> tuple[tuple[str, ...], dict[str, list[tuple[int, Entry]]]]:
    """The known columns of a table, and for each split its rows with their numbers, `train` among them."""
    try:
        with index.open(newline="", encoding="utf-8-sig") as lines:
            table = csv.reader(lines)
            header = [name.strip().lower() for name in next(table, [])]
            rows = [(table.line_num, [cell.strip() for cell in row]) for row in table if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"data.index: {index} cannot be read as a table in UTF-8: {error}") from error
    columns = tuple(name for name in COLUMNS if name in header)
    _check_header(index, header, columns)
    found: dict[str, list[tuple[int, Entry]]] = {}
    for number, row in rows:
        if len(row) != len(header):
            raise DataError(f"{index} row {number}: found {len(row)} cells, expected {len(header)} as in the header")
        entry = {name: cell for name, cell in zip(header, row, strict=True) if name in columns}
        if not any(entry.get(column) for column in MODALITIES):
            raise DataError(f"{index} row {number}: it names neither an image nor a clip")
        found.setdefault(_split_of(entry, f"{index} row {number}"), []).append((number, entry))
    if "train" not in found:
        raise DataError(f"data.index: {index} has no row for training; expected rows whose split is 'train'")
    return columns, {split: found[split] for split in SPLITS if split in found}


def _check_header(index: Path, header: list[str], columns: tuple[str, ...]) -> None:
    for name in header:
        near = difflib.get_close_matches(name, COLUMNS, n=1, cutoff=0.75)
        if name not in COLUMNS and near and near[0] not in columns:
            raise DataError(f"{index} row 1: found the column {name!r}; {did_you_mean(name, COLUMNS, what='columns')}")
    for name in columns:
        if header.count(name) > 1:
            raise DataError(f"{index} row 1: the column {name!r} is there {header.count(name)} times")
    if not set(columns) & set(MODALITIES):
        listing = ", ".join(name for name in header if name) or "nothing"
        raise DataError(f"{index} row 1: found {listing}; expected a column 'image', a column 'audio', or both")


def _split_of(entry: Entry, where: str) -> str:
    found = entry.get("split", "train").lower()
    for split, names in SPLITS.items():
        if found in names:
            return split
    raise DataError(f"{where}: found the split {entry['split']!r}; {did_you_mean(found, SPLITS, what='splits')}")


def _check_modalities(
    index: Path, columns: tuple[str, ...], entries: Mapping[str, list[tuple[int, Entry]]], allow_absent: bool
) -> None:
    for split, rows in entries.items():
        for column in MODALITIES:
            if column not in columns or any(entry[column] for _, entry in rows):
                continue
            if split == "train" or not allow_absent:
                hint = "" if split == "train" else "; `data.allow_absent: true` lets other networks be tested"
                raise DataError(f"{index} rows {rows[0][0]} to {rows[-1][0]}: no row of {split} has {column}{hint}")


def _check_apart(index: Path, column: str, entries: Mapping[str, list[tuple[int, Entry]]], root: Path) -> None:
    """A file in two splits would be trained on and tested with; two labels of one file cannot both be right.

    Paths below `root` that are written in different ways are one file.
    """
    seen: dict[str, tuple[int, str, str]] = {}
    for split, rows in entries.items():
        for number, entry in rows:
            if not entry.get(column):
                continue
            label = entry.get("label", "")
            file = os.path.normpath(root / entry[column])
            first, known_split, known_label = seen.setdefault(file, (number, split, label))
            if known_split != split:
                raise DataError(
                    f"{index} row {number}: {entry[column]} is in {split}, and in {known_split} in row {first}; "
                    "a file belongs to one split"
                )
            if label and known_label and label != known_label:
                raise DataError(
                    f"{index} row {number}: {entry[column]} has the label {label!r}, and {known_label!r} in row {first}"
                )
