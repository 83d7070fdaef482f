"""A data set of image files in one folder per class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from kdx.builtin.image_data import ImageDataset, digest
from kdx.builtin.pictures import EXTENSIONS, SEEN_FOR_CHANNELS, PictureSplit, read_channels, read_size
from kdx.errors import DataError, did_you_mean

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
"""Split -> the folder names that mean it."""


class ImageFolder(ImageDataset):
    """Image files in one folder per class, these perhaps below `train`, `val` and `test`.

    path: the folder, as seen from where kdx is started.
    size: images are cut to a square and scaled to `[size, size]`.
    channels: `1`, `3`, or `auto`, which looks whether any of the first images has colour.

    Classes are the sub-folders of training in alphabetical order. Other folders' classes must be among them. A file
    counts as an image by its extension; one that cannot be decoded is an error that names it. The fingerprint covers
    the relative path, size in bytes and time of change of every image, not its pixels: an edit that keeps both size
    and time goes unnoticed, and a copy with new times counts as other data.
    """

    name = "image_folder"
    places = ("path",)

    @dataclass(frozen=True)
    class Config:
        path: str
        size: int = 64
        channels: str = "auto"
        augment: dict[str, Any] = field(default_factory=dict)

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._size = read_size(config.size)
        self._root = Path(config.path)
        self._folders = read_folders(self._root)

    def classes(self) -> tuple[str, ...]:
        return tuple(self.files["train"])

    def fingerprint(self) -> str:
        states = ((file, file.stat()) for files in self.files.values() for group in files.values() for file in group)
        return digest(
            f"{file.relative_to(self._root).as_posix()} {state.st_size} {state.st_mtime_ns}" for file, state in states
        )

    @cached_property
    def files(self) -> dict[str, dict[str, list[Path]]]:
        """Split -> class -> image files."""
        return labelled_files(self._folders, EXTENSIONS, "image")

    @cached_property
    def splits(self) -> dict[str, FileSplit]:
        # Spread over all classes: the first images alone would all be of one.
        every = [file for group in self.files["train"].values() for file in group]
        step = max(1, len(every) // SEEN_FOR_CHANNELS)
        channels = read_channels(self.config.channels, (_opened(file) for file in every[::step]))
        labels = {name: label for label, name in enumerate(self.files["train"])}
        return {
            split: FileSplit(
                [file for group in files.values() for file in group],
                [labels[name] for name, group in files.items() for _ in group],
                self._size,
                channels,
            )
            for split, files in self.files.items()
        }


class FileSplit(PictureSplit):
    """Labelled image files."""

    def __init__(self, files: list[Path], labels: list[int], size: int, channels: int) -> None:
        super().__init__(labels, size, channels)
        self._files = files

    def picture(self, i: int) -> Image.Image:
        return Image.open(self._files[i])

    def where(self, i: int) -> str:
        return str(self._files[i])


def read_folders(root: Path) -> dict[str, Path]:
    """Split -> its folder, `train` among them; `DataError` where there is none."""
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f"data.path: {root} {what}; expected a folder with one sub-folder per class")
    folders = split_folders(root)
    if "train" not in folders:
        found = ", ".join(folder.name for folder in folders.values())
        raise DataError(f"data.path: {root} has {found} but no folder 'train'")
    return folders


def labelled_files(
    folders: Mapping[str, Path], extensions: Sequence[str], what: str
) -> dict[str, dict[str, list[Path]]]:
    """Split -> class -> files of these extensions; each class has some and is one of training. `what` they hold."""
    files = {split: class_files(folder, extensions) for split, folder in folders.items()}
    train = files["train"]
    if not train:
        raise DataError(f"data.path: {folders['train']} has no sub-folders; expected one per class")
    for split, classes in files.items():
        for name, group in classes.items():
            folder = folders[split] / name
            if name not in train:
                raise DataError(f"data.path: {folder} is no class of training; {did_you_mean(name, train)}")
            if not group:
                raise DataError(f"data.path: {folder} holds no {what}; expected files {', '.join(extensions)}")
    return files


def split_folders(root: Path) -> dict[str, Path]:
    """Split -> its folder; the folder itself is `train` where no sub-folder is a split.

    A sub-folder is a split if it is called like one and has folders in it: `train` may also be a class, of vehicles.
    """
    found = {}
    for split, names in SPLITS.items():
        folders = [root / name for name in names if (root / name).is_dir() and _has_folders(root / name)]
        if folders:
            found[split] = folders[0]
    return found or {"train": root}


def _has_folders(folder: Path) -> bool:
    return any(child.is_dir() and not child.name.startswith(".") for child in folder.iterdir())


def class_files(folder: Path, extensions: Sequence[str]) -> dict[str, list[Path]]:
    """Class -> the files of these extensions anywhere below its folder, both in alphabetical order; no hidden ones."""
    classes = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    return {child.name: sorted(_shown(child, extensions)) for child in classes}


def _shown(folder: Path, extensions: Sequence[str]) -> Iterator[Path]:
    for file in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.suffix.lower() in extensions and not hidden and file.is_file():
            yield file


def _opened(file: Path) -> Image.Image:
    try:
        return Image.open(file)
    except Exception as error:  # decoders raise whatever they like
        raise DataError(f"{file}: cannot be read: {type(error).__name__}: {error}") from error
