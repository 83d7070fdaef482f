"""What all data sets with sound share: waveforms become floats and spectrograms on the device, and vary there."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kdx.builtin.audio_augment import SOUND_AUGMENTATIONS, SoundAugmentation
from kdx.builtin.augment import AUGMENTATIONS
from kdx.builtin.image_data import STATISTICS_FROM, ImageDataset, stream_facts
from kdx.builtin.spectra import LogMel, MelOptions, Mfcc, MfccOptions
from kdx.data import TensorSplit
from kdx.errors import ConfigError
from kdx.options import read_options
from kdx.randomness import Randomness
from kdx.types import Batch, DataFacts, StreamFacts

FRONTS = ("mel", "mfcc")
"""The streams of spectrograms that are made from waveforms."""


class AudioDataset(ImageDataset):
    """A data set with a stream `audio`, int16 or float `[T]` for one sample, and perhaps one of images.

    `mel` and `mfcc` each add a stream of spectrograms, which any network of images can read. Masks that a split gives
    are kept: `audio_mask` `[T]` is True where a clip has sound, and gives `mel_mask` and `mfcc_mask` over the frames;
    `audio_present` and `image_present` say whether a sample has this modality at all, and are left out of statistics.
    """

    augmentations = {**AUGMENTATIONS, **SOUND_AUGMENTATIONS}

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if self.rate < 1:
            raise ConfigError(f"data.rate: found {self.rate}, expected samples per second, 1 or more")
        self._fronts = _read_fronts(config, self.rate)
        self._placed: dict[torch.device, Mapping[str, LogMel]] = {}
        self._check_steps()

    @property
    @abstractmethod
    def rate(self) -> int:
        """Samples of a waveform per second."""

    def view(self, config: Any) -> AudioDataset:
        other = super().view(config)
        assert isinstance(other, AudioDataset)
        other._check_steps()
        return other

    def _check_steps(self) -> None:
        """Refuse augmentations of a stream that there is not."""
        for name, step in zip(self.config.augment, self._augment, strict=True):
            if step.acts_on == "mel" and "mel" not in self._fronts:
                raise ConfigError(f"data.augment.{name}: it changes the stream mel; ask for that with `data.mel: {{}}`")

    def on_device(self, batch: Batch, randomness: Randomness | None) -> Batch:
        found = super().on_device(batch, randomness)
        if "audio" not in batch:
            return found
        waves, mask = to_wave(batch["audio"]), batch.get("audio_mask")
        if randomness is not None:
            waves, mask = self._varied(waves, mask, randomness)
        found["audio"] = waves
        if mask is not None:
            found["audio_mask"] = mask
        for name, front in self._at(waves.device).items():
            found[name] = front(waves)
            if randomness is not None:
                for step in self._augment:
                    found[name] = step(found[name], randomness) if step.acts_on == name else found[name]
            if mask is not None:
                found[f"{name}_mask"] = front.frames(mask)
        return found

    def reading(self, streams: Iterable[str]) -> AudioDataset:
        """The same data without the spectrograms that nothing reads."""
        names = {stream.removesuffix("_mask") for stream in streams}
        self.facts()  # which name all streams, and are shared
        other = copy.copy(self)
        other._fronts = {name: front for name, front in self._fronts.items() if name in names}
        other._placed = {}
        return other

    def varies(self, stream: str) -> bool:
        name = stream.removesuffix("_mask")
        if name == "audio" or name in self._fronts:
            return self._acts_on("audio", name)
        return super().varies(stream)

    def _sizes(self) -> dict[str, tuple[int, int]]:
        return {name: size for name, size in super()._sizes().items() if name not in FRONTS}

    def _varied(self, waves: Tensor, mask: Tensor | None, randomness: Randomness) -> tuple[Tensor, Tensor | None]:
        """Waveforms after augmentation, and their mask, which moves with them."""
        for step in self._augment:
            if isinstance(step, SoundAugmentation):
                waves = step(waves, randomness)
                if step.moves and mask is not None:
                    mask = step(mask.float(), randomness) > 0.5
        return waves, mask

    def may_lack(self, name: str) -> bool:
        """Whether training samples may lack a stream that has a mask."""
        return True

    @cached_property
    def _facts(self) -> DataFacts:
        source = self.train()
        count = min(len(source), STATISTICS_FROM)
        seen = source.fetch([i * len(source) // count for i in range(count)])
        return DataFacts(streams=self._stream_facts(seen), classes=self.classes(), size=len(source))

    def _stream_facts(self, seen: Batch) -> dict[str, StreamFacts]:
        """The facts of each stream, from the samples that have it."""
        streams: dict[str, StreamFacts] = {}
        for name, tensor in seen.items():
            present = seen.get(f"{name}_present")
            kept = tensor if present is None or not present.any() else tensor[present]
            if name == "audio":
                streams |= self._sound_facts(kept)
            elif tensor.dtype == torch.bool:
                streams[name] = StreamFacts("mask", tuple(tensor.shape[1:]))
            else:
                streams |= stream_facts(TensorSplit({name: kept}))
        if "audio_mask" in seen:
            frames = {f"{name}_mask": (streams[name].shape[-1],) for name in self._fronts}
            streams |= {name: StreamFacts("mask", shape) for name, shape in frames.items()}
        for name in [name for name in seen if f"{name}_present" in seen and self.may_lack(name)]:
            made = (name, *self._fronts) if name == "audio" else (name,)
            streams |= {one: replace(streams[one], present=f"{name}_present") for one in made}
        return streams

    def _sound_facts(self, audio: Tensor) -> dict[str, StreamFacts]:
        waves = to_wave(audio)
        streams = {"audio": StreamFacts("audio", tuple(waves.shape[1:]), *_moments(waves), rate=self.rate)}
        for name, front in self._fronts.items():
            streams[name] = StreamFacts("image", front.shape(waves.shape[1]), *_moments(front(waves)))
        return streams

    def _at(self, device: torch.device) -> Mapping[str, LogMel]:
        """The front ends on a device, each copied there once."""
        if device not in self._placed:
            self._placed[device] = {name: copy.deepcopy(front).to(device) for name, front in self._fronts.items()}
        return self._placed[device]


def to_wave(audio: Tensor) -> Tensor:
    """int16 waveforms as floats in `-1..1`; float ones as they are."""
    return audio.float() / 32768 if audio.dtype == torch.int16 else audio


def _read_fronts(config: Any, rate: int) -> dict[str, LogMel]:
    """Stream -> what makes it from waveforms, for the options `mel` and `mfcc`."""
    kinds: dict[str, tuple[Any, type[MelOptions], type[LogMel]]] = {
        "mel": (config.mel, MelOptions, LogMel),
        "mfcc": (config.mfcc, MfccOptions, Mfcc),
    }
    fronts: dict[str, LogMel] = {}
    for name, (options, schema, front) in kinds.items():
        if options is not None:
            read = read_options(schema, options, f"data.{name}")
            try:
                fronts[name] = front(read, rate)
            except ValueError as error:
                raise ConfigError(f"data.{name}.{error}") from error
    return fronts


def _moments(values: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation over everything; the latter is not 0, which would make an input infinite."""
    wide = values.double()
    return (float(wide.mean()),), (max(float(wide.std(correction=0)), 1e-4),)
