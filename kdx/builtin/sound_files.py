"""Reads sound files into waveforms of one sample rate and one length."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdx.errors import ConfigError, DataError

SOUND_EXTENSIONS = (".aif", ".aiff", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".wav")


@dataclass(frozen=True)
class Clip:
    """A sound file, and what its header says: samples per second, and the number of them."""

    file: Path
    rate: int
    count: int

    def samples(self, rate: int) -> int:
        """The length at another sample rate."""
        return -(-self.count * rate // self.rate)


@dataclass(frozen=True)
class SoundReader:
    """Gives clips at `rate`, in one channel and `samples` long."""

    rate: int
    samples: int

    def read(self, clip: Clip) -> tuple[Tensor, Tensor]:
        """A waveform in `-1..1` and whether it has sound there, float and bool `[samples]`.

        Channels are averaged. Of a longer clip this is the middle; a shorter one is followed by silence.
        """
        content, _ = _library("soundfile").read(clip.file, dtype="float32", always_2d=True)
        wave = torch.from_numpy(content).mean(1)
        if not wave.isfinite().all():
            raise ValueError("it holds numbers that are not finite")
        if clip.rate != self.rate:
            wave = _resampler(clip.rate, self.rate)(wave)
        first = max(0, (len(wave) - self.samples) // 2)
        wave = wave[first : first + self.samples]
        found = torch.zeros(self.samples)
        found[: len(wave)] = wave
        return found, torch.arange(self.samples) < len(wave)

    def silence(self) -> tuple[Tensor, Tensor]:
        """What stands for a clip that a sample does not have."""
        return torch.zeros(self.samples), torch.zeros(self.samples, dtype=torch.bool)


def look(file: Path, where: str, rate: int, resample: bool) -> Clip:
    """What the header of a sound file says. `where` names it in errors.

    Raises `DataError` for a file that is missing, unreadable or empty, or whose rate is not `rate` where it must be.
    """
    if not file.is_file():
        raise DataError(f"{where}: there is no such file")
    soundfile = _library("soundfile")
    try:
        header = soundfile.info(str(file))
    except (soundfile.SoundFileError, OSError) as error:
        raise DataError(f"{where}: cannot be read as sound: {error}") from error
    if header.frames < 1:
        raise DataError(f"{where}: the clip is empty; expected at least one sample")
    if header.samplerate != rate:
        if not resample:
            raise DataError(
                f"{where}: found a sample rate of {header.samplerate} Hz, expected {rate} Hz as data.rate says; "
                "set `data.resample: true`, or store the clip at this rate"
            )
        _library("torchaudio")
    return Clip(file, header.samplerate, header.frames)


def read_length(seconds: float | None, rate: int, clips: Iterable[Clip]) -> int:
    """The number of samples that `data.length` means; without it, that of the longest clip."""
    if seconds is None:
        return max(clip.samples(rate) for clip in clips)
    if not seconds * rate >= 1:
        raise ConfigError(f"data.length: found {seconds:g}, expected seconds, at least one sample of {rate} Hz")
    return round(seconds * rate)


@functools.cache
def _resampler(found: int, wanted: int) -> Callable[[Tensor], Tensor]:
    """A low-pass filter of windowed sincs; it is made once for each pair of rates."""
    made: Callable[[Tensor], Tensor] = _library("torchaudio").transforms.Resample(found, wanted)
    return made


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError where the system library below soundfile is absent
        raise ConfigError(
            f"data: sound files need {name}, which cannot be imported ({error}): pip install 'kdx[audio]'"
        ) from error
