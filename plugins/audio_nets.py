"""Nets for sound: convolutions over waveforms, and the speech encoders of torchaudio.

Nets of images read spectrograms as they are: `use: timm, input: mel` is a 2-D convolutional net or a transformer on
spectrogram patches. What is here reads what these cannot. Maps over time are [C, 1, T], sequences [T, D], so aligners
take them to the maps and tokens of any other net.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
import operator
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdx

ENCODERS = (
    "wav2vec2_base",
    "wav2vec2_large",
    "wav2vec2_large_lv60k",
    "wav2vec2_xlsr_300m",
    "wav2vec2_xlsr_1b",
    "wav2vec2_xlsr_2b",
    "wav2vec2_model",
    "hubert_base",
    "hubert_large",
    "hubert_xlarge",
    "wavlm_base",
    "wavlm_large",
    "wavlm_model",
)
PUBLISHED_RATE = 16000
"""The sample rate in Hz that all published weights of these encoders were trained at."""


class PooledNet(nn.Module):
    """A net whose features are averaged over time and classified.

    It speaks timm's protocol for what comes after the features: `forward_features`, `forward_head`, `get_classifier`.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(width, classes)

    @abstractmethod
    def encode(self, sound: Tensor) -> Tensor:
        """What is averaged: a map [B, C, 1, T], or a sequence [B, T, D]."""

    def forward(self, sound: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits [B, K]. Only frames where `mask` [B, T] holds count, where there is one."""
        return self.forward_head(self.forward_features(sound, mask))

    def forward_features(self, sound: Tensor, mask: Tensor | None = None) -> Tensor:
        """The map or the sequence before it is averaged, where the mask has been heeded."""
        return over_sound(self.encode(sound), mask)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits [B, K] of the features; with `pre_logits` the embedding [B, D]."""
        embedding = features.mean((2, 3)) if features.ndim == 4 else features.mean(1)
        return embedding if pre_logits else self.classifier(embedding)

    def get_classifier(self) -> nn.Module:
        return self.classifier


def over_sound(features: Tensor, mask: Tensor | None) -> Tensor:
    """Features whose plain mean over time is that over the frames with sound: the others are 0, these scaled up.

    Frames of a map [B, C, 1, T] or a sequence [B, T, D] have sound where one of their samples of the mask [B, S] has.
    A clip without any sound stays as it is.
    """
    if mask is None:
        return features
    is_map = features.ndim == 4
    frames = F.adaptive_max_pool1d(mask.to(features)[:, None], features.shape[3 if is_map else 1])[:, 0]
    frames = torch.where(frames.sum(1, keepdim=True) > 0, frames, 1.0)
    frames = frames / frames.mean(1, keepdim=True)
    return features * (frames[:, None, None] if is_map else frames[:, :, None])


class WaveNet(PooledNet):
    """Stages of strided 1-D convolutions over a waveform, written as maps of height 1 [B, C, 1, T].

    It speaks timm's protocol for stages: `feature_info`, `forward_intermediates`.
    """

    def __init__(self, channels: Sequence[int], kernel: int, strides: Sequence[int], classes: int) -> None:
        super().__init__(channels[-1], classes)
        pairs = zip([1, *channels], channels, strides, strict=False)
        self.stages = nn.ModuleList(_stage(before, after, kernel, stride) for before, after, stride in pairs)
        reductions = list(itertools.accumulate(strides, operator.mul))
        self.feature_info = [
            {"num_chs": after, "reduction": reduction, "module": f"stages.{i}"}
            for i, (after, reduction) in enumerate(zip(channels, reductions, strict=True))
        ]

    def encode(self, sound: Tensor) -> Tensor:
        x = sound[:, None, None]
        for stage in self.stages:
            x = stage(x)
        return x

    def forward_intermediates(
        self,
        sound: Tensor,
        mask: Tensor | None = None,
        *,
        indices: Sequence[int] | None = None,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps [B, C, 1, T] of the stages `indices` in the order of the net, with the last map before them.

        `intermediates_only` leaves the last map out; `stop_early` then ends at the last stage that is asked for.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: found {output_fmt!r}, expected NCHW")
        x, maps = kdx.through_stages(
            sound[:, None, None], self.stages, indices, stop_early=stop_early and intermediates_only
        )
        return maps if intermediates_only else (over_sound(x, mask), maps)


class SpeechNet(PooledNet):
    """An encoder of torchaudio over waveforms [B, T]: `speech` gives a sequence [B, frames, D]."""

    def __init__(self, speech: nn.Module, width: int, classes: int) -> None:
        super().__init__(width, classes)
        self.speech = speech

    def encode(self, sound: Tensor) -> Tensor:
        features: Tensor = self.speech(sound)[0]
        return features


class BatchFirst(nn.Module):
    """A layer of torchaudio's Conformer, which has time first, on sequences [B, T, D]."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.transpose(0, 1), None)
        return out.transpose(0, 1)


class ConformerNet(PooledNet):
    """Frames of a spectrogram [B, 1, F, T], each made a token, and Conformer layers over these [B, T, D]."""

    def __init__(self, bins: int, width: int, layers: Sequence[nn.Module], classes: int) -> None:
        super().__init__(width, classes)
        self.frames = nn.Linear(bins, width)
        self.layers = nn.ModuleList(BatchFirst(layer) for layer in layers)

    def encode(self, sound: Tensor) -> Tensor:
        x: Tensor = self.frames(sound[:, 0].transpose(1, 2))
        for layer in self.layers:
            x = layer(x)
        return x


class PrepareSound(nn.Module):
    """Sound less its mean and divided by its deviation: those of the data, or of each clip. Masks stay as they are."""

    def __init__(self, stream: kdx.StreamFacts, per_clip: bool = False) -> None:
        super().__init__()
        self.mean, self.std = (stream.mean or (0.0,))[0], (stream.std or (1.0,))[0]
        self.per_clip = per_clip

    def forward(self, sound: Tensor) -> Tensor:
        if sound.dtype == torch.bool:
            return sound
        if self.per_clip:
            return F.layer_norm(sound, sound.shape[-1:])
        return (sound - self.mean) / self.std


class WaveCnn(kdx.Model):
    """Strided 1-D convolutions over waveforms [T], batch norm and ReLU, mean over time, linear classifier.

    channels, strides: one of each for every stage; together the strides say how many samples become one frame.
    kernel: the length of all filters, which is odd.

    `input` is `audio`, or `[audio, audio_mask]`, where frames without sound do not count. Taps: `stages.1`, or its
    number. (After Dai et al., ICASSP 2017, which have filters of 80 samples first and pool between the stages.)
    """

    name = "wave_cnn"
    offers = ("logits", "embedding", "features")

    @dataclass(frozen=True)
    class Config:
        channels: list[int] = field(default_factory=lambda: [16, 32, 64, 64])
        strides: list[int] = field(default_factory=lambda: [8, 4, 4, 2])
        kernel: int = 15

    config: Config

    def build(self) -> kdx.Network:
        config = self.config
        if not config.channels or len(config.channels) != len(config.strides) or min(config.strides) < 1:
            raise kdx.ConfigError(
                f"strides: found {config.strides} for {len(config.channels)} stages; expected a stride of 1 or more "
                "for each of `channels`"
            )
        if config.kernel < 1 or config.kernel % 2 == 0:
            raise kdx.ConfigError(f"kernel: found {config.kernel}, expected an odd number of samples")
        sound, classes = _sound(self, "waveforms [T]", 1)
        return kdx.Network(
            WaveNet(config.channels, config.kernel, config.strides, classes), self.streams, PrepareSound(sound)
        )


class SpeechEncoder(kdx.Model):
    """wav2vec 2.0, HuBERT or WavLM as torchaudio builds them, mean over time, and a linear classifier of its own.

    model: wav2vec2_base, _large, _large_lv60k, _xlsr_300m, _xlsr_1b, _xlsr_2b, hubert_base, _large, _xlarge,
        wavlm_base, _large; or wav2vec2_model and wavlm_model, which are of any size that `args` say.
    path: a file with a state dict of that encoder, as torchaudio's `state_dict()` names its entries, at 16 kHz.
        Entries of an output layer `aux` are left out.
    args: handed to torchaudio's function; no layer is dropped unless they say so, for a tap needs its layer.

    `input` is `audio` or `[audio, audio_mask]`; the mask acts on the mean alone. A tap such as
    `speech.encoder.transformer.layers.3` gives [T, D]. Variants with layer norm in all their convolutions get each clip
    normalised, as they were published, the others get it as it is.
    (Baevski et al., NeurIPS 2020; Hsu et al., TASLP 2021; Chen et al., JSTSP 2022.) Needs `kdx[audio]`.
    """

    name = "speech_encoder"
    offers = ("logits", "embedding", "features")

    @dataclass(frozen=True)
    class Config:
        model: str
        path: str | None = None
        args: dict[str, Any] = field(default_factory=dict)

    config: Config

    def build(self) -> kdx.Network:
        network = self.skeleton()
        if self.config.path is not None:
            _load(network.net.get_submodule("speech"), Path(self.config.path))
        return network

    def skeleton(self) -> kdx.Network:
        config = self.config
        if config.model not in ENCODERS:
            near = " or ".join(difflib.get_close_matches(config.model, ENCODERS)) or "another encoder"
            raise kdx.ConfigError(f"model: found {config.model!r}; did you mean {near}? (known: {', '.join(ENCODERS)})")
        sound, classes = _sound(self, "waveforms [T]", 1)
        if config.path is not None and sound.rate not in (0, PUBLISHED_RATE):
            raise kdx.ConfigError(
                f"path: the weights are for sound at {PUBLISHED_RATE} Hz, but the data has {sound.rate} Hz; "
                f"set `data.rate: {PUBLISHED_RATE}` where the data can be resampled"
            )
        make: Callable[..., Any] = getattr(_torchaudio_models(), config.model)
        known = inspect.signature(make).parameters
        usual = {"encoder_layer_drop": 0.0, "aux_num_out": None}
        arguments = {**{name: value for name, value in usual.items() if name in known}, **config.args}
        try:
            speech = make(**arguments)
        except (TypeError, ValueError, AssertionError) as error:
            raise kdx.ConfigError(f"args: {config.model} refuses {config.args}: {error}") from error
        width = speech.encoder.transformer.layer_norm.normalized_shape[0]
        per_clip = speech.feature_extractor.conv_layers[-1].layer_norm is not None
        return kdx.Network(SpeechNet(speech, width, classes), self.streams, PrepareSound(sound, per_clip))


class Conformer(kdx.Model):
    """torchaudio's Conformer layers over the frames of a spectrogram, mean over time, linear classifier.

    width, ffn: features of a token, and inside of its feed-forward parts. kernel: frames of the convolutions, odd.

    `input` is `mel` or `mfcc`, or `[mel, mel_mask]`. Taps: `layers.2` gives [T, D]. (Gulati et al., Interspeech 2020,
    without sub-sampling and relative positions, which torchaudio leaves out.) Needs `kdx[audio]`.
    """

    name = "conformer"
    offers = ("logits", "embedding", "features")

    @dataclass(frozen=True)
    class Config:
        layers: int = 4
        width: int = 96
        heads: int = 4
        ffn: int = 192
        kernel: int = 15
        dropout: float = 0.0

    config: Config

    def build(self) -> kdx.Network:
        config = self.config
        for option in ("layers", "width", "heads", "ffn", "kernel"):
            if getattr(config, option) < 1:
                raise kdx.ConfigError(f"{option}: found {getattr(config, option)}, expected 1 or more")
        if config.width % config.heads:
            raise kdx.ConfigError(f"heads: {config.heads} heads cannot share a width of {config.width} evenly")
        if config.kernel % 2 == 0:
            raise kdx.ConfigError(f"kernel: found {config.kernel}, expected an odd number of frames")
        sound, classes = _sound(self, "spectrograms [1, F, T]", 3)
        made = _torchaudio_models().Conformer(
            config.width, config.heads, config.ffn, config.layers, config.kernel, config.dropout
        )
        net = ConformerNet(sound.shape[1], config.width, list(made.conformer_layers), classes)
        return kdx.Network(net, self.streams, PrepareSound(sound))


@kdx.hookimpl
def kdx_models() -> list[type[kdx.Model]]:
    return [WaveCnn, SpeechEncoder, Conformer]


def _stage(before: int, after: int, kernel: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, (1, kernel), (1, stride), padding=(0, kernel // 2), bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU())


def _sound(model: kdx.Model, what: str, rank: int) -> tuple[kdx.StreamFacts, int]:
    """The facts of the first stream, once it is sure that the streams suit the net, and the number of classes."""
    streams = [model.facts.streams.get(name) for name in model.streams]
    first = streams[0]
    if first is None or len(first.shape) != rank or (rank == 3 and first.shape[0] != 1):
        found = "which the data lacks" if first is None else f"{list(first.shape)} for one sample"
        raise kdx.PlanError(f"input: {model.name} reads {what}, but found {model.streams[0]}, {found}")
    if len(streams) > 2 or (len(streams) == 2 and (streams[1] is None or streams[1].kind != "mask")):
        raise kdx.PlanError(
            f"input: found {', '.join(model.streams)}, expected one stream of sound, or that and its mask"
        )
    if not model.facts.classes:
        raise kdx.PlanError(f"{model.name} tells classes apart, but the data has none")
    return first, len(model.facts.classes)


def _load(speech: nn.Module, path: Path) -> None:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        kept = {name: tensor for name, tensor in state.items() if not name.startswith("aux.")}
        missing, unexpected = speech.load_state_dict(kept, strict=False)
    except Exception as error:  # torch raises many classes for files that are no weights
        raise kdx.ConfigError(f"path: {path} holds no weights of this encoder: {error}") from error
    if missing or unexpected:
        found = [f"it has no {name}" for name in missing[:1]] + [f"it has {name}" for name in unexpected[:1]]
        raise kdx.ConfigError(
            f"path: {path} holds no weights of this encoder: {' and '.join(found)}, the first of {len(missing)} "
            f"entries that are missing and {len(unexpected)} that are unknown"
        )


def _torchaudio_models() -> Any:
    try:
        import torchaudio.models as models
    except (ImportError, OSError) as error:  # OSError where the library was built for another torch
        raise kdx.ConfigError(f"this net needs torchaudio ({error}): pip install 'kdx[audio]'") from error
    return models
