"""Finds the stamps of Tux Paint in a folder: picture, caption and sound of each, and which belong together."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kdx.errors import DataError, did_you_mean

SOUNDS = (".ogg", ".wav")
EFFECT = "effect"
"""What `data.sound` says for the sound that a thing makes, in place of the language of its spoken caption."""
ENGLISH = "en"


@dataclass(frozen=True)
class Stamp:
    """One thing. `name` is its path below the root without an ending, `category` the first folder of that.

    `captions` maps a language to the text; `sound` is the file that was asked for, None where there is none.
    """

    name: str
    picture: Path
    captions: Mapping[str, str]
    sound: Path | None

    @property
    def category(self) -> str:
        return self.name.partition("/")[0]

    @cached_property
    def picture_digest(self) -> str:
        """The SHA-256 of the picture."""
        return _content_of(self.picture)

    @cached_property
    def sound_digest(self) -> str:
        """The SHA-256 of the sound, empty where there is none."""
        return "" if self.sound is None else _content_of(self.sound)


def read_stamps(root: Path, sound: str, *, svg: bool) -> list[Stamp]:
    """All stamps below `root` that have a caption and a picture, in the order of their names.

    `sound` is a language code or `effect`. With `svg` drawings count as pictures too, where there is no other one.
    Raises `DataError` where there is no stamp, or none that has this sound.
    """
    if not root.is_dir():
        raise DataError(
            f"data.root: {root} is not a folder; expected that of the stamps, as /usr/share/tuxpaint/stamps"
        )
    endings = (".png", ".svg") if svg else (".png",)
    found, spoken = [], set()
    for text in sorted(root.rglob("*.txt")):
        files = sorted(file for file in text.parent.glob(f"{glob.escape(text.stem)}*") if file.suffix in SOUNDS)
        sounds = {key: file for file in reversed(files) if (key := _key(file, text.stem)) is not None}
        spoken |= set(sounds)
        pictures = [file for ending in endings if (file := text.with_suffix(ending)).is_file()]
        name = text.relative_to(root).with_suffix("").as_posix()
        if pictures and "/" in name:
            found.append(Stamp(name, pictures[0], read_captions(text), sounds.get(sound)))
    if not found:
        raise DataError(f"data.root: {root} has no stamps; expected folders with pairs such as cat.png and cat.txt")
    if not any(stamp.sound is not None for stamp in found):
        raise DataError(f"data.sound: no stamp below {root} has {sound!r}; {did_you_mean(sound, spoken, what='found')}")
    return found


def read_captions(file: Path) -> dict[str, str]:
    """Language -> caption. The first line is English, lines such as `fr.utf8=Un chat.` are translations."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as text in UTF-8: {error}") from error
    if not lines or not lines[0].strip():
        raise DataError(f"{file}: found no first line; expected the caption in English")
    captions = {ENGLISH: lines[0].strip()}
    for line in lines[1:]:
        language, mark, text = line.partition(".utf8=")
        if mark and text.strip():
            captions.setdefault(language.strip(), text.strip())
    return captions


def same_files_once(stamps: Sequence[Stamp]) -> dict[Path, Path]:
    """Each sound file -> the first one with the same content."""
    first: dict[str, Path] = {}
    return {file: first.setdefault(s.sound_digest, file) for s in stamps if (file := s.sound) is not None}


def groups_of(stamps: Sequence[Stamp]) -> list[list[int]]:
    """Stamps that share a picture, a sound or a caption in English, directly or by way of others, as positions.

    Two of a group may not be in different splits: what training has seen or heard would be tested.
    """
    parent = list(range(len(stamps)))

    def top(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, stamp in enumerate(stamps):
        for key in _shared(stamp):
            parent[top(i)] = top(first.setdefault(key, i))
    groups: dict[int, list[int]] = {}
    for i in range(len(stamps)):
        groups.setdefault(top(i), []).append(i)
    return list(groups.values())


def spread_groups(stamps: Sequence[Stamp], shares: Mapping[str, float]) -> dict[str, list[int]]:
    """Split -> positions of stamps; `train` gets what is not in `shares`. Groups stay whole.

    Category by category, as many groups as make up the share, in an order that depends on names alone. A group belongs
    to the category of its first stamp; every category leaves at least one group for training.
    """
    by_category: dict[str, list[list[int]]] = {}
    for group in groups_of(stamps):
        by_category.setdefault(stamps[group[0]].category, []).append(group)
    found: dict[str, list[int]] = {"train": [], **{split: [] for split in shares}}
    for groups in by_category.values():
        rest = sorted(groups, key=lambda group: hashlib.sha256(stamps[group[0]].name.encode()).digest())
        total = sum(map(len, groups))
        for split, share in shares.items():
            taken = 0
            while len(rest) > 1 and taken + len(rest[-1]) <= round(share * total):
                taken += len(rest[-1])
                found[split] += rest.pop()
        found["train"] += [i for group in rest for i in group]
    return {split: sorted(positions) for split, positions in found.items()}


def _shared(stamp: Stamp) -> Iterable[str]:
    yield f"picture {stamp.picture_digest}"
    yield f"caption {stamp.captions[ENGLISH].casefold()}"
    if stamp.sound is not None:
        yield f"sound {stamp.sound_digest}"


def _key(file: Path, stem: str) -> str | None:
    """What a sound file of a stamp is: `effect`, the language of a spoken caption, or of another stamp (None)."""
    rest = file.stem[len(stem) :]
    if rest == "":
        return EFFECT
    spoken = re.fullmatch(r"_desc(?:_([A-Za-z]{2,3}(?:_[A-Za-z]+)?))?", rest)
    return None if spoken is None else spoken.group(1) or ENGLISH


def _content_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
