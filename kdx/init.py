"""Looks at a folder of images and writes a first config for it: `kdx init`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from PIL import Image

from kdx.builtin.image_folder import ImageFolder
from kdx.builtin.pictures import is_grey
from kdx.errors import ConfigError, DataError

SIZES = (32, 48, 64, 96, 128, 160, 192, 224)
"""The sizes that a generated config may ask for: the largest one that the median image fills."""
SMALL = 64
FEW = 5000


@dataclass(frozen=True)
class FolderFacts:
    """What a folder of images holds.

    `counts` maps each split to the images per class that can be read; `sides` are the shortest, the median and the
    longest of the images' shorter sides in pixels; `unreadable` maps each file that cannot be decoded to the reason.
    """

    folder: Path
    counts: Mapping[str, Mapping[str, int]]
    channels: int
    sides: tuple[int, int, int]
    unreadable: Mapping[Path, str]

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.counts["train"])

    @property
    def train_size(self) -> int:
        return sum(self.counts["train"].values())


def scan(folder: Path) -> FolderFacts:
    """Decode every image below `folder`, laid out as the data set `image_folder` wants it.

    Raises DataError where there are no two classes to learn.
    """
    files = ImageFolder(ImageFolder.Config(str(folder.resolve()))).files
    every = [file for classes in files.values() for group in classes.values() for file in group]
    with ThreadPoolExecutor() as pool:
        looks = dict(zip(every, pool.map(_look, every), strict=True))
    counts = {
        split: {name: sum(isinstance(looks[file], _Look) for file in group) for name, group in classes.items()}
        for split, classes in files.items()
    }
    if len(counts["train"]) < 2:
        raise DataError(
            f"{folder}: found only the class {', '.join(counts['train'])}; expected two or more to tell apart"
        )
    empty = [name for name, count in counts["train"].items() if not count]
    if empty:
        raise DataError(f"{folder}: no image of the class {', '.join(empty)} can be read")
    seen = [look for look in looks.values() if isinstance(look, _Look)]
    sides = [look.side for look in seen]
    return FolderFacts(
        folder=folder.resolve(),
        counts=counts,
        channels=1 if all(look.grey for look in seen) else 3,
        sides=(min(sides), round(median(sides)), max(sides)),
        unreadable={file: look for file, look in looks.items() if isinstance(look, str)},
    )


def write_config(facts: FolderFacts, out: Path) -> Path:
    """Write a config at `out` that distils a teacher into a small student; gives `out`.

    `data.yaml` and `teacher.yaml` come to lie beside it. Raises ConfigError rather than write over any of the three.
    """
    texts = {
        out.with_name("data.yaml"): _data_text(facts),
        out.with_name("teacher.yaml"): _teacher_text(facts),
        out: _student_text(facts),
    }
    if len(texts) < 3:
        raise ConfigError(f"{out}: this name is needed for another of the files that kdx writes; choose another one")
    for path in texts:
        if path.exists():
            raise ConfigError(
                f"{path} is there already and would be lost; move it away, or give another place with --out"
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return out


@dataclass(frozen=True)
class _Look:
    side: int
    grey: bool


def _look(file: Path) -> _Look | str:
    """What one image is like, or why it cannot be decoded."""
    try:
        with Image.open(file) as picture:
            look = _Look(min(picture.size), is_grey(picture))
            picture.draft(None, (1, 1))  # JPEG need not be decoded at its full size to be checked
            picture.load()
    except Exception as error:  # decoders raise whatever they like; the reason is reported
        return f"{type(error).__name__}: {error}"
    return look


def _size(facts: FolderFacts) -> int:
    return max((size for size in SIZES if size <= facts.sides[1]), default=SIZES[0])


def _data_text(facts: FolderFacts) -> str:
    low, middle, high = facts.sides
    lines = [f"# What kdx found in {facts.folder}:"]
    for split, counts in facts.counts.items():
        per_class = ", ".join(f"{name} {count}" for name, count in counts.items())
        text = f"{split}, {sum(counts.values())} images by class: {per_class}"
        lines += textwrap.wrap(text, 110, initial_indent="# - ", subsequent_indent="#   ")
    colour = "all images are grey" if facts.channels == 1 else "the images have colour"
    lines.append(f"# - {colour}; their shorter sides are {low} to {high} pixels, {middle} in the middle")
    if facts.unreadable:
        lines.append("# These files cannot be read, and a run stops at them: repair them or take them away.")
        lines += [
            f"# - {file.relative_to(facts.folder)}: {' '.join(why.split())}" for file, why in facts.unreadable.items()
        ]
    lines += [
        "data:",
        "  use: image_folder",
        f"  path: {json.dumps(str(facts.folder), ensure_ascii=False)}",
        f"  size: {_size(facts)}  # images are cut to a square and scaled to this many pixels",
        f"  channels: {facts.channels}",
        "  augment: {flip: {}, shift: {pixels: " + str(max(1, _size(facts) // 16)) + "}}",
    ]
    if "val" not in facts.counts:
        lines.append("  validation: 0.1  # there is no folder `val`, so this share of the training images is held out")
    if "test" not in facts.counts:
        lines.append("  # There is no folder `test`, so the report has validation numbers only.")
    few = facts.train_size < FEW
    batch = 64 if few else 128
    lines += [
        "train:",
        f"  epochs: {60 if facts.train_size < FEW // 5 else 40 if few else 20}",
        f"  batch: {batch}",
        "  optimizer: {use: adamw}",
        "  weight_decay: 0.05",
        "  lr: {use: cosine, peak: 0.002, warmup: 2}",
    ]
    return "\n".join(lines) + "\n"


def _teacher_text(facts: FolderFacts) -> str:
    small, few = _size(facts) < SMALL, facts.train_size < FEW
    why = "small images" if small else "few images" if few else "many images of a good size"
    return "\n".join(
        [
            f"# The teacher: a network for {why}, trained once and then kept.",
            "extends: data.yaml",
            "student:",
            "  use: timm",
            f"  model: {'resnet18' if small or few else 'resnet50'}",
            *(["  args: {output_stride: 8}  # keeps more of a small image than the usual 32"] if small else []),
            "  pretrained: false  # true starts from weights that timm downloads, which mostly gives a better teacher",
            "losses:",
            "  ce: {use: cross_entropy}",
            "",
        ]
    )


def _student_text(facts: FolderFacts) -> str:
    small, few = _size(facts) < SMALL, facts.train_size < FEW
    if small:
        student = [
            "  model: resnet18",
            "  args: {layers: [1, 1, 1, 1], channels: [16, 32, 64, 128], stem_width: 16, output_stride: 8}",
        ]
    else:
        student = [f"  model: {'mobilenetv3_small_050' if few else 'mobilenetv3_small_100'}"]
    return "\n".join(
        [
            f"# A small student for {len(facts.classes)} classes, taught by the network of teacher.yaml.",
            "# kdx trains the teacher first where there is no finished run of it.",
            "extends: data.yaml",
            "student:",
            "  use: timm",
            *student,
            "teachers:",
            "  teacher: {run: teacher.yaml}",
            "losses:",
            "  ce: {use: cross_entropy}  # what the labels say",
            "  kd: {use: kd, temperature: 4}  # what the teacher says",
            "",
        ]
    )
