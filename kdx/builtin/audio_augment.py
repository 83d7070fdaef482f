"""Augmentations of waveforms and of log-mel spectrograms, made like those of images: on the device, and stateless."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kdx.builtin.augment import Augmentation, Mixup
from kdx.randomness import Randomness


class SoundAugmentation(Augmentation):
    """A step on waveforms, float `[B, T]` in `-1..1`. One that `moves` sound is applied to its mask as well."""

    acts_on: ClassVar[str] = "audio"
    moves: ClassVar[bool] = False


@dataclass(frozen=True)
class Gain(SoundAugmentation):
    """Makes a clip louder or softer by up to this many decibels, drawn evenly; nothing is clipped."""

    decibels: float = 6.0

    def __post_init__(self) -> None:
        _within("decibels", self.decibels, 0, 60)

    def __call__(self, waves: Tensor, randomness: Randomness) -> Tensor:
        decibels = (2 * randomness.uniform("gain", 1) - 1) * self.decibels
        return waves * 10 ** (decibels / 20)


@dataclass(frozen=True)
class Delay(SoundAugmentation):
    """Moves a clip earlier or later by up to this share of its length; what comes in from outside is silence."""

    moves: ClassVar[bool] = True
    share: float = 0.1

    def __post_init__(self) -> None:
        _within("share", self.share, 0, 1)

    def __call__(self, waves: Tensor, randomness: Randomness) -> Tensor:
        T = waves.shape[1]
        most = int(self.share * T)
        places = torch.arange(T, device=waves.device) - randomness.integers("delay", -most, most + 1, 1)
        inside = (places >= 0) & (places < T)
        return torch.where(inside, waves.gather(1, places.clamp(0, T - 1)), 0)


@dataclass(frozen=True)
class Noise(SoundAugmentation):
    """Adds evenly distributed white noise, `least` to `most` decibels below the clip; a silent clip stays silent."""

    least: float = 15.0
    most: float = 40.0

    def __post_init__(self) -> None:
        _within("least", self.least, -20, 120)
        _within("most", self.most, self.least, 120)

    def __call__(self, waves: Tensor, randomness: Randomness) -> Tensor:
        below = self.least + randomness.uniform("noise level", 1) * (self.most - self.least)
        # Numbers drawn evenly from -1 to 1 have a mean square of a third.
        power = 3 * waves.square().mean(1, keepdim=True) * 10 ** (-below / 10)
        return waves + (2 * randomness.uniform("noise", waves.shape[1]) - 1) * power.sqrt()


@dataclass(frozen=True)
class SpecAugment(Augmentation):
    """Covers bands of frequencies and stretches of time of a log-mel spectrogram `[B, 1, F, T]` with its own mean.

    Each of `bands` is 0 to `bins` bins wide and each of `stretches` 0 to `frames` frames long, never more than there
    are. (Park et al., Interspeech 2019, without time warping, which gained them least.)
    """

    acts_on: ClassVar[str] = "mel"
    bands: int = 1
    bins: int = 8
    stretches: int = 1
    frames: int = 8

    def __post_init__(self) -> None:
        for name in ("bands", "bins", "stretches", "frames"):
            _within(name, getattr(self, name), 0, 1024)

    def __call__(self, spectra: Tensor, randomness: Randomness) -> Tensor:
        F, T = spectra.shape[-2:]
        rows = _covered("bands", self.bands, self.bins, F, randomness)[:, None, :, None]
        columns = _covered("stretches", self.stretches, self.frames, T, randomness)[:, None, None, :]
        return torch.where(rows | columns, spectra.mean((-2, -1), keepdim=True), spectra)


@dataclass(frozen=True)
class MelMixup(Mixup):
    """Mixes log-mel spectrograms as `mixup` does images, with the same shares."""

    acts_on: ClassVar[str] = "mel"


SOUND_AUGMENTATIONS: dict[str, type[Augmentation]] = {
    "gain": Gain,
    "delay": Delay,
    "noise": Noise,
    "spec_augment": SpecAugment,
    "mixup_mel": MelMixup,
}


def _covered(name: str, count: int, width: int, size: int, randomness: Randomness) -> Tensor:
    """Which of `size` places lie in one of `count` stretches of up to `width` places; bool `[B, size]`."""
    draw = randomness.uniform(f"spec_augment {name}", 2, max(count, 1))
    lengths = (draw[:, 0] * (min(width, size) + 1)).long() * (count > 0)
    first = (draw[:, 1] * (size - lengths + 1)).long()
    places = torch.arange(size, device=draw.device)[None, None]
    return ((places >= first[:, :, None]) & (places < (first + lengths)[:, :, None])).any(1)


def _within(name: str, found: float, least: float, most: float) -> None:
    if not least <= found <= most:
        raise ValueError(f"{name}: found {found:g}, expected {least:g} to {most:g}")
