"""Spectrograms of waveforms: log-mel and MFCC, computed for a whole batch on its device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdx.types import Shape


@dataclass(frozen=True)
class MelOptions:
    """`data.mel`: a stream `mel` of log-mel spectrograms `[1, bins, frames]`.

    window, hop: length and distance of the frames in seconds. The transform is as long as the next power of two.
    low, high: the frequencies in Hz that the bins cover; `high` is half of the sample rate where it is left out.
    floor: added to the power before the natural logarithm, for waveforms in `-1..1`.
    """

    bins: int = 40
    window: float = 0.025
    hop: float = 0.01
    low: float = 0.0
    high: float | None = None
    floor: float = 1e-6

    def __post_init__(self) -> None:
        _above_0("bins", self.bins)
        _above_0("window", self.window)
        _above_0("hop", self.hop)
        _above_0("floor", self.floor)
        if self.low < 0:
            raise ValueError(f"low: found {self.low:g}, expected a frequency in Hz, 0 or more")


@dataclass(frozen=True)
class MfccOptions(MelOptions):
    """`data.mfcc`: a stream `mfcc` of cepstral coefficients `[1, coefficients, frames]`; else as `data.mel`."""

    coefficients: int = 13

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.coefficients <= self.bins:
            raise ValueError(
                f"coefficients: found {self.coefficients}, expected 1 to {self.bins}, the number of mel bins"
            )


class LogMel(nn.Module):
    """Log-mel spectrograms `[B, 1, bins, T // hop + 1]` of waveforms `[B, T]`: frame t is centred on sample `t * hop`.

    A Hann window, power spectra, triangles that are even on the HTK mel scale (O'Shaughnessy, 1987), and the natural
    logarithm. Beyond its ends a clip is silent.
    """

    window: Tensor
    filters: Tensor

    def __init__(self, options: MelOptions, rate: int) -> None:
        super().__init__()
        width, self.hop = round(options.window * rate), round(options.hop * rate)
        if width < 2 or self.hop < 1:
            raise ValueError(
                f"window: {options.window:g} s with a hop of {options.hop:g} s is shorter than the samples of {rate} Hz"
            )
        high = rate / 2 if options.high is None else options.high
        if not options.low < high <= rate / 2:
            raise ValueError(
                f"high: found {high:g} Hz, expected more than `low` ({options.low:g} Hz) and at most {rate / 2:g} Hz, "
                f"half of the sample rate"
            )
        self.size = 1 << (width - 1).bit_length()
        self.floor = options.floor
        filters = mel_filters(self.size // 2 + 1, rate, options.bins, options.low, high)
        if (empty := int((filters.sum(0) == 0).sum())) > 0:
            raise ValueError(
                f"bins: {empty} of {options.bins} bins lie between the {self.size // 2 + 1} frequencies of a window of "
                f"{options.window:g} s and would be constant; expected fewer bins or a longer window"
            )
        self.register_buffer("window", torch.hann_window(width), persistent=False)
        self.register_buffer("filters", filters, persistent=False)

    def shape(self, samples: int) -> Shape:
        """The shape of one spectrogram of a clip of this many samples."""
        return (1, self.filters.shape[1], samples // self.hop + 1)

    def frames(self, mask: Tensor) -> Tensor:
        """Of a mask over samples `[B, T]`, that over frames `[B, T // hop + 1]`: what holds at a frame's centre."""
        places = torch.arange(mask.shape[1] // self.hop + 1, device=mask.device) * self.hop
        return mask[:, places.clamp(max=mask.shape[1] - 1)]

    def forward(self, waves: Tensor) -> Tensor:
        spectra = torch.stft(
            waves.float(),
            self.size,
            self.hop,
            len(self.window),
            self.window,
            center=True,
            pad_mode="constant",
            return_complex=True,
        )
        power = spectra.real.square() + spectra.imag.square()
        return ((power.transpose(1, 2) @ self.filters).transpose(1, 2) + self.floor).log()[:, None]


class Mfcc(LogMel):
    """Mel-frequency cepstral coefficients `[B, 1, coefficients, frames]` of waveforms `[B, T]`.

    The first coefficients of the orthonormal DCT-II over the bins of `LogMel`.
    """

    basis: Tensor

    def __init__(self, options: MfccOptions, rate: int) -> None:
        super().__init__(options, rate)
        bins, orders = torch.arange(options.bins) + 0.5, torch.arange(options.coefficients)
        basis = torch.cos(math.pi / options.bins * orders[:, None] * bins) * math.sqrt(2 / options.bins)
        basis[0] /= math.sqrt(2)
        self.register_buffer("basis", basis, persistent=False)

    def shape(self, samples: int) -> Shape:
        return (1, len(self.basis), samples // self.hop + 1)

    def forward(self, waves: Tensor) -> Tensor:
        return self.basis @ super().forward(waves)


def mel_filters(frequencies: int, rate: int, bins: int, low: float, high: float) -> Tensor:
    """Triangles `[frequencies, bins]` over frequencies that are spread evenly from 0 to half of the rate.

    Bin k rises from edge k to 1 at edge k + 1 and falls to edge k + 2; the edges are even on the mel scale.
    """
    edges = torch.linspace(_to_mel(low), _to_mel(high), bins + 2, dtype=torch.float64)
    edges = 700 * (10 ** (edges / 2595) - 1)
    places = torch.linspace(0, rate / 2, frequencies, dtype=torch.float64)[:, None]
    rising = (places - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - places) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0).float()


def _to_mel(frequency: float) -> float:
    return 2595 * math.log10(1 + frequency / 700)


def _above_0(name: str, found: float) -> None:
    if not found > 0:
        raise ValueError(f"{name}: found {found:g}, expected more than 0")
