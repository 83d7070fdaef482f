"""A data set of the stamps of Tux Paint: pictures of things, with spoken and written captions."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from kdx.builtin.audio_data import AudioDataset
from kdx.builtin.image_data import digest
from kdx.builtin.pair_files import Row, RowSplit
from kdx.builtin.pictures import check_picture, read_size
from kdx.builtin.sound_files import SoundReader, look, read_length
from kdx.builtin.stamps import ENGLISH, Stamp, read_stamps, same_files_once, spread_groups
from kdx.builtin.text_vectors import Texts, read_texts
from kdx.errors import ConfigError
from kdx.types import Batch

LABELS = ("category", "caption")
UNPAIRED = ("drop", "keep")


class TuxPaint(AudioDataset):
    """The stamps of Tux Paint as the Debian package `tuxpaint-stamps-default` installs them, each a sample: a picture,
    a clip and a caption. kdx brings none of them.

    root: the folder of the stamps, as `/usr/share/tuxpaint/stamps`.
    sound: the language of the spoken captions (`fr`, `ru`, `es`, ...), or `effect` for the sound that a thing makes.
    unpaired: what becomes of stamps without this sound: `drop`, or `keep`, with `audio_present` False.
    label: `category`, the first folder; or `caption`, the English one: nearly each thing is then a class of its own,
        for losses that match samples, as no classifier can know the captions of other splits.
    val_share, test_share: the shares of the samples, category by category. Stamps that share a picture, a clip (by its
        content) or a caption are in one split.
    keep: keeps what has been read in memory; off, each picture and clip is decoded whenever it is needed.
    svg: takes drawings too, where there is no other picture. Needs `kdx[svg]`.
    size: of the pictures, in colour and on white. rate, resample, length: of the clips, as in `audio_folder`.
    text: adds the stream `text`, a vector for each caption (see `kdx.builtin.text_vectors`); `language` is that of
        these captions, English where a stamp lacks it.

    Clips of the same content are one. The fingerprint is the SHA-256 of all content. Sound needs `kdx[audio]`.
    """

    name = "tuxpaint"
    places = ("root",)

    @dataclass(frozen=True)
    class Config:
        root: str
        sound: str = "fr"
        unpaired: str = "drop"
        label: str = "category"
        val_share: float = 0.1
        test_share: float = 0.2
        keep: bool = True
        svg: bool = False
        size: int = 64
        rate: int = 16000
        resample: bool = True
        length: float | None = None
        language: str = ENGLISH
        text: dict[str, Any] | None = None
        augment: dict[str, Any] = field(default_factory=dict)
        mel: dict[str, Any] | None = None
        mfcc: dict[str, Any] | None = None

    config: Config

    def __init__(self, config: Config) -> None:
        for option, choices in (("label", LABELS), ("unpaired", UNPAIRED)):
            if getattr(config, option) not in choices:
                found = getattr(config, option)
                raise ConfigError(f"data.{option}: found {found!r}, expected one of {', '.join(choices)}")
        shares = {"val": config.val_share, "test": config.test_share}
        if min(shares.values()) < 0 or sum(shares.values()) >= 1:
            raise ConfigError(
                f"data.test_share: found shares of {config.val_share} and {config.test_share}, expected 0 or more and "
                "less than 1 in all"
            )
        super().__init__(config)
        self._size = read_size(config.size)
        stamps = read_stamps(Path(config.root), config.sound, svg=config.svg)
        self._stamps = [stamp for stamp in stamps if config.unpaired == "keep" or stamp.sound is not None]
        self._shares = {split: share for split, share in shares.items() if share > 0}
        self._texts = read_texts(config.text)

    @property
    def rate(self) -> int:
        return self.config.rate

    def classes(self) -> tuple[str, ...]:
        return self._classes

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        return tuple(sorted({self._label(stamp) for stamp in self._stamps}))

    def may_lack(self, name: str) -> bool:
        return name == "audio" and any(row.sound is None for row in self.splits["train"].rows)

    def fingerprint(self) -> str:
        return digest(part for stamp in self._stamps for part in self._described(stamp))

    def _described(self, stamp: Stamp) -> tuple[str, ...]:
        vectors = () if self._texts is None else (self._texts.digest,)
        return (
            stamp.name,
            self._label(stamp),
            self._caption(stamp),
            stamp.picture_digest,
            stamp.sound_digest,
            *vectors,
        )

    @cached_property
    def splits(self) -> dict[str, RowSplit]:
        first = same_files_once(self._stamps)
        rows = [self._row(stamp, first) for stamp in self._stamps]
        positions = spread_groups(self._stamps, self._shares)
        train = [rows[i] for i in positions["train"]]
        reader = SoundReader(
            self.rate,
            read_length(self.config.length, self.rate, (row.sound for row in train if row.sound is not None)),
        )
        vectors = None if self._texts is None else self._vectors(self._texts)
        return {
            split: (KeptRows if self.config.keep else RowSplit)(
                [rows[i] for i in chosen],
                (self._size, 3),
                reader,
                labelled=True,
                vectors={} if vectors is None else {"text": vectors[chosen]},
            )
            for split, chosen in positions.items()
            if chosen
        }

    def _row(self, stamp: Stamp, first: dict[Path, Path]) -> Row:
        check_picture(stamp.picture, str(stamp.picture))
        sound = None
        if stamp.sound is not None:
            sound = look(first[stamp.sound], str(stamp.sound), self.rate, self.config.resample)
        return Row(stamp.picture, sound, self._classes.index(self._label(stamp)), str(stamp.picture))

    def _vectors(self, texts: Texts) -> Any:
        keys = [(stamp.name, self._caption(stamp)) for stamp in self._stamps]
        return texts.vectors([(key, caption, f"{self.config.root}/{key}.txt") for key, caption in keys])

    def _label(self, stamp: Stamp) -> str:
        return stamp.category if self.config.label == "category" else stamp.captions[ENGLISH]

    def _caption(self, stamp: Stamp) -> str:
        return stamp.captions.get(self.config.language, stamp.captions[ENGLISH])


class KeptRows(RowSplit):
    """Rows that stay in memory once they have been read."""

    @cached_property
    def _kept(self) -> dict[int, Batch]:
        return {}

    def sample(self, i: int) -> Batch:
        if i not in self._kept:
            self._kept[i] = super().sample(i)
        return self._kept[i]
