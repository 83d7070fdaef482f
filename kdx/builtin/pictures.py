"""Reads image files into uint8 tensors of one size and number of channels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from kdx.data import SampleSplit
from kdx.errors import ConfigError
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
