"""Reads image files into uint8 tensors of one size and number of channels."""

from __future__ import annotations

import importlib
import io
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from kdx.data import SampleSplit
from kdx.errors import ConfigError, DataError
from kdx.types import Batch

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
CHANNELS = ("auto", "1", "3")
SEEN_FOR_CHANNELS = 64
"""How many images `channels: auto` looks at."""


class PictureSplit(SampleSplit):
    """Labelled pictures, each made `[channels, size, size]` when it is read."""

    def __init__(self, labels: Sequence[int], size: int, channels: int) -> None:
        self.labels: Tensor = torch.tensor(labels, dtype=torch.int64)
        self._size = size
        self._channels = channels

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def picture(self, i: int) -> Image.Image:
        """Picture `i` as it is stored."""

    def sample(self, i: int) -> Batch:
        with self.picture(i) as picture:
            return {"image": to_tensor(picture, self._size, self._channels), "label": self.labels[i]}


def open_picture(file: Path, size: int) -> Image.Image:
    """The picture in a file. A drawing (SVG) is rendered so wide that nothing of `[size, size]` is lost."""
    if file.suffix.lower() != ".svg":
        return Image.open(file)
    try:
        renderer: Any = importlib.import_module("resvg_py")
    except ImportError as error:
        raise ConfigError(f"data.svg: drawings need resvg_py ({error}): pip install 'kdx[svg]'") from error
    return Image.open(io.BytesIO(bytes(renderer.svg_to_bytes(svg_path=str(file), width=4 * size, dpi=96))))


def check_picture(file: Path, where: str) -> None:
    """Refuse a file whose header is not that of a picture; its pixels are decoded when they are needed.

    `where` names it in errors.
    """
    if not file.is_file():
        raise DataError(f"{where}: there is no such file")
    try:
        with open_picture(file, 8):
            pass
    except ConfigError:
        raise
    except Exception as error:  # decoders raise whatever they like
        raise DataError(f"{where}: cannot be read as an image: {type(error).__name__}: {error}") from error


def to_tensor(picture: Image.Image, size: int, channels: int) -> Tensor:
    """A picture as uint8 `[channels, size, size]`: turned as its EXIF tag says, on white where it is transparent,
    the middle cut to a square, scaled.
    """
    picture.draft(None, (size, size))  # lets JPEG decode at a fraction of its size, never below this one
    picture = ImageOps.exif_transpose(picture)
    picture = _plain(picture).convert("L" if channels == 1 else "RGB")
    if picture.size != (size, size):
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR)
    array = np.array(picture)
    return torch.from_numpy(array).reshape(size, size, channels).permute(2, 0, 1).contiguous()


def is_grey(picture: Image.Image) -> bool:
    """Whether a picture is stored without colour."""
    return picture.mode in ("1", "L", "LA", "F") or picture.mode.startswith("I")


def read_channels(found: str, pictures: Iterable[Image.Image]) -> int:
    """The number of channels that `data.channels` means; with `auto`, 1 where every picture is stored as grey.

    Pictures are looked at up to the first one with colour, and closed.
    """
    if found not in CHANNELS:
        raise ConfigError(f"data.channels: found {found!r}, expected one of {', '.join(CHANNELS)}")
    if found != "auto":
        return int(found)
    for picture in pictures:
        with picture:
            if not is_grey(picture):
                return 3
    return 1


def read_size(found: int) -> int:
    """The side of the square images that `data.size` means."""
    if found < 1:
        raise ConfigError(f"data.size: found {found}, expected a number of pixels, 1 or more")
    return found


def _plain(picture: Image.Image) -> Image.Image:
    """The picture in 8 bits and without transparency."""
    if picture.mode.startswith("I"):
        wide: Any = np.asarray(picture)
        return Image.fromarray((wide >> 8).clip(0, 255).astype(np.uint8))
    if picture.mode == "F":
        raise ValueError("pictures of 32-bit floats have no known range; store them in 8 or 16 bits")
    if picture.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture
