"""Augmentations of images that run on the device for a whole batch, and draw from `Randomness` alone.

Each is called with float images `[B, C, H, W]` in `0..1` and gives the same shape. What happens to an image depends
on the seed, the pass over the data and the image's index only, except where `mixes` says that other images of the batch
come into it. None of them waits for the device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kdx.errors import ConfigError, did_you_mean
from kdx.options import read_options
from kdx.randomness import Randomness


class Augmentation(ABC):
    """One step of `data.augment`; its options are the fields of the dataclass.

    One that `mixes` gives images that their labels no longer describe, so it may stand in a view alone; it names the
    random numbers that say how much of each is whose. `acts_on` is the kind of stream that it is for: `image`, `audio`
    or `mel`.
    """

    acts_on: ClassVar[str] = "image"
    mixes: ClassVar[str] = ""

    @abstractmethod
    def __call__(self, images: Tensor, randomness: Randomness) -> Tensor: ...

    def shares(self, randomness: Randomness, size: tuple[int, int]) -> Tensor:
        """How much of each result is the sample itself, [B], for images of this height and width."""
        raise AssertionError(f"{type(self).__name__} mixes nothing")


@dataclass(frozen=True)
class Flip(Augmentation):
    """Mirrors left and right with this probability."""

    probability: float = 0.5

    def __post_init__(self) -> None:
        _within("probability", self.probability, 0, 1)

    def __call__(self, images: Tensor, randomness: Randomness) -> Tensor:
        return torch.where(_chance("flip", self.probability, randomness), images.flip(-1), images)


@dataclass(frozen=True)
class Shift(Augmentation):
    """Moves by up to `pixels` whole pixels along each axis; what comes in from outside is 0."""

    pixels: int = 2

    def __post_init__(self) -> None:
        _within("pixels", self.pixels, 1, 1024)

    def __call__(self, images: Tensor, randomness: Randomness) -> Tensor:
        B, C, H, W = images.shape
        offsets = randomness.integers("shift", 0, 2 * self.pixels + 1, 2)
        padded = F.pad(images, (self.pixels,) * 4)
        rows = offsets[:, 0, None] + torch.arange(H, device=images.device)
        columns = offsets[:, 1, None] + torch.arange(W, device=images.device)
        samples = torch.arange(B, device=images.device)[:, None, None, None]
        channels = torch.arange(C, device=images.device)[None, :, None, None]
        return padded[samples, channels, rows[:, None, :, None], columns[:, None, None, :]]


@dataclass(frozen=True)
class Crop(Augmentation):
    """Cuts out a part of `least_area` to all of the area and scales it back to the full size.

    The part's width divided by its height, relative to the image's, is between `1 / stretch` and `stretch`.
    """

    least_area: float = 0.5
    stretch: float = 4 / 3

    def __post_init__(self) -> None:
        _within("least_area", self.least_area, 0.01, 1)
        _within("stretch", self.stretch, 1, 4)

    def __call__(self, images: Tensor, randomness: Randomness) -> Tensor:
        draw = randomness.uniform("crop", 4)
        area = self.least_area + draw[:, 0] * (1 - self.least_area)
        ratio = torch.exp((2 * draw[:, 1] - 1) * math.log(self.stretch))
        width = (area * ratio).sqrt().clamp(max=1)
        height = (area / ratio).sqrt().clamp(max=1)
        nothing = torch.zeros_like(width)
        # On grid_sample's scale an image reaches from -1 to 1, so the centre of a part moves by up to 1 - its extent.
        across = torch.stack([width, nothing, (2 * draw[:, 2] - 1) * (1 - width)], 1)
        down = torch.stack([nothing, height, (2 * draw[:, 3] - 1) * (1 - height)], 1)
        grid = F.affine_grid(torch.stack([across, down], 1).to(images), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class Erase(Augmentation):
    """Covers a rectangle with the image's own mean colour, with this probability.

    Each side of the rectangle is up to `side` of the image's.
    """

    probability: float = 0.5
    side: float = 0.5

    def __post_init__(self) -> None:
        _within("probability", self.probability, 0, 1)
        _within("side", self.side, 0.01, 1)

    def __call__(self, images: Tensor, randomness: Randomness) -> Tensor:
        H, W = images.shape[-2:]
        draw = randomness.uniform("erase rectangle", 4)
        rows = _inside(draw[:, 0] * self.side, draw[:, 1], H)[:, None, :, None]
        columns = _inside(draw[:, 2] * self.side, draw[:, 3], W)[:, None, None, :]
        covered = rows & columns & _chance("erase", self.probability, randomness)
        return torch.where(covered, images.mean((-2, -1), keepdim=True), images)


@dataclass(frozen=True)
class BrightnessContrast(Augmentation):
    """Scales the distance from the image's mean by up to `contrast` more or less, then all by up to `brightness`."""

    brightness: float = 0.2
    contrast: float = 0.2

    def __post_init__(self) -> None:
        _within("brightness", self.brightness, 0, 1)
        _within("contrast", self.contrast, 0, 1)

    def __call__(self, images: Tensor, randomness: Randomness) -> Tensor:
        draw = 2 * randomness.uniform("brightness_contrast", 2, 1, 1, 1) - 1
        mean = images.mean((-3, -2, -1), keepdim=True)
        images = mean + (images - mean) * (1 + self.contrast * draw[:, 0])
        return (images * (1 + self.brightness * draw[:, 1])).clamp(0, 1)


@dataclass(frozen=True)
class Rotate(Augmentation):
    """Turns every image by `degrees` against the clock, always; what comes in from outside is 0.

    Multiples of 90 move whole pixels of a square image.
    """

    degrees: float = 90.0

    def __post_init__(self) -> None:
        _within("degrees", self.degrees, -360, 360)

    def __call__(self, images: Tensor, randomness: Randomness) -> Tensor:
        B, _, H, W = images.shape
        quarters, rest = divmod(self.degrees, 90)
        if not rest and (H == W or quarters % 2 == 0):
            return torch.rot90(images, int(quarters), (-2, -1))
        cos, sin = math.cos(math.radians(self.degrees)), math.sin(math.radians(self.degrees))
        turn = images.new_tensor([[cos, -sin * H / W, 0], [sin * W / H, cos, 0]]).expand(B, 2, 3)
        grid = F.affine_grid(turn, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


@dataclass(frozen=True)
class Mixup(Augmentation):
    """Makes each image `r * image + (1 - r) * partner`, with `r` drawn evenly from `low` to `high` for each image.

    The partner is the image before it in the batch, as the steps before this one left it. The result thus depends on
    the seed, the pass over the data, and which samples share a batch, and that follows from the seed and the size of
    the batch; with several processes the partner is one of the same process. (Zhang et al., ICLR 2018, where `r` is
    from a beta distribution and the labels are mixed too; drawn evenly in Beyer et al., CVPR 2022.)

    In a view `mixed`, losses find `r` in `batch.mix_share@mixed`, and in `batch.mix_partner@mixed` the `batch.index` of
    the partner.
    """

    mixes: ClassVar[str] = "mixup"
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        _within("low", self.low, 0, 1)
        _within("high", self.high, self.low, 1)

    def __call__(self, images: Tensor, randomness: Randomness) -> Tensor:
        ratio = self.shares(randomness, _size(images)).reshape(-1, 1, 1, 1)
        return torch.lerp(images.roll(1, 0), images, ratio.to(images))

    def shares(self, randomness: Randomness, size: tuple[int, int]) -> Tensor:
        return self.low + randomness.uniform("mixup", 1).squeeze(1) * (self.high - self.low)


@dataclass(frozen=True)
class CutMix(Augmentation):
    """Puts a rectangle of a partner into each image, with this probability (Yun et al., ICCV 2019).

    A share `r` of the area is to stay, drawn evenly from `low` to `high` for each image. The rectangle has the sides
    of the image times `sqrt(1 - r)`, rounded down, around a pixel that is drawn evenly, and is cut off at the borders.
    The share that is then recorded is that of the pixels which did stay. Partners and records are those of `mixup`.
    """

    mixes: ClassVar[str] = "cutmix"
    low: float = 0.0
    high: float = 1.0
    probability: float = 1.0

    def __post_init__(self) -> None:
        _within("low", self.low, 0, 1)
        _within("high", self.high, self.low, 1)
        _within("probability", self.probability, 0, 1)

    def __call__(self, images: Tensor, randomness: Randomness) -> Tensor:
        H, W = _size(images)
        top, bottom, left, right = self.box(randomness, (H, W))[:, :, None]
        y, x = torch.arange(H, device=images.device), torch.arange(W, device=images.device)
        rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)
        return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], images.roll(1, 0), images)

    def shares(self, randomness: Randomness, size: tuple[int, int]) -> Tensor:
        top, bottom, left, right = self.box(randomness, size)
        cut: Tensor = (bottom - top) * (right - left) / (size[0] * size[1])
        return 1 - cut

    def box(self, randomness: Randomness, size: tuple[int, int]) -> Tensor:
        """The rectangle of each image, as `rectangles` gives it."""
        draw = randomness.uniform("cutmix", 4)
        kept = self.low + draw[:, 0] * (self.high - self.low)
        return rectangles(torch.where(draw[:, 3] < self.probability, kept, 1.0), draw[:, 1:3], size)


def rectangles(kept: Tensor, centre: Tensor, size: tuple[int, int]) -> Tensor:
    """First row, row after the last, first column and column after the last of rectangles, int64 [4, B].

    They would leave a share `kept` [B] of an image of this height and width, did they not reach over its borders, and
    lie around `centre` [B, 2], which is from 0 to below 1 along each axis.
    """
    edges = []
    for extent, place in zip(size, centre.unbind(1), strict=True):
        length, middle = (extent * (1 - kept).sqrt()).long(), (extent * place).long()
        edges += [(middle - length // 2).clamp(0, extent), (middle + (length + 1) // 2).clamp(0, extent)]
    return torch.stack(edges)


AUGMENTATIONS: dict[str, type[Augmentation]] = {
    "flip": Flip,
    "shift": Shift,
    "crop": Crop,
    "erase": Erase,
    "brightness_contrast": BrightnessContrast,
    "rotate": Rotate,
    "mixup": Mixup,
    "cutmix": CutMix,
}


def read_augment(
    options: Mapping[str, Any], known: Mapping[str, type[Augmentation]] = AUGMENTATIONS
) -> tuple[Augmentation, ...]:
    """The augmentations that `data.augment` names, in its order."""
    steps = []
    for name, fields in options.items():
        if name not in known:
            raise ConfigError(f"data.augment.{name}: unknown augmentation; {did_you_mean(str(name), known)}")
        if fields is not None and not isinstance(fields, Mapping):
            raise ConfigError(f"data.augment.{name}: found {fields!r}, expected a mapping of options, as in {{}}")
        steps.append(read_options(known[name], fields or {}, f"data.augment.{name}"))
    return tuple(steps)


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]


def _within(name: str, found: float, least: float, most: float) -> None:
    if not least <= found <= most:
        raise ValueError(f"{name}: found {found:g}, expected {least:g} to {most:g}")


def _chance(name: str, probability: float, randomness: Randomness) -> Tensor:
    """Which images are meant, bool `[B, 1, 1, 1]`."""
    return randomness.uniform(name, 1, 1, 1) < probability


def _inside(extent: Tensor, place: Tensor, size: int) -> Tensor:
    """Which of `size` pixels lie in a stretch of this share of the whole, somewhere within it; bool `[B, size]`."""
    first = place * (1 - extent) * size
    centres = torch.arange(size, device=extent.device) + 0.5
    return (centres >= first[:, None]) & (centres < (first + extent * size)[:, None])
