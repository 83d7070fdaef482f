"""Log-mel spectrograms, cepstral coefficients, and augmentations of sound."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchaudio.functional
import torchaudio.transforms
from torch import Tensor

from kdx.builtin.audio_augment import SOUND_AUGMENTATIONS, Delay, Gain, Noise, SpecAugment
from kdx.builtin.augment import read_augment
from kdx.builtin.spectra import LogMel, MelOptions, Mfcc, MfccOptions
from kdx.errors import ConfigError
from kdx.randomness import Randomness


def noise(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def tone(hertz: float, rate: int = 16000, samples: int = 4000) -> Tensor:
    return torch.sin(2 * torch.pi * hertz * torch.arange(samples) / rate)


def randomness(*index: int, view: int = 1) -> Randomness:
    return Randomness(0, view, torch.tensor(index))


# ---- spectrograms


def reference(options: MelOptions, rate: int, size: int) -> torchaudio.transforms.MelSpectrogram:
    width, hop = round(options.window * rate), round(options.hop * rate)
    return torchaudio.transforms.MelSpectrogram(
        rate,
        n_fft=size,
        win_length=width,
        hop_length=hop,
        n_mels=options.bins,
        f_min=options.low,
        f_max=options.high,
        pad_mode="constant",
    )


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        (MelOptions(), 16000),
        (MelOptions(), 8000),
        (MelOptions(bins=64, window=0.064, hop=0.016, low=50, high=7000), 22050),
    ],
)
def test_log_mel_spectrograms_are_those_of_torchaudio(options: MelOptions, rate: int) -> None:
    front, waves = LogMel(options, rate), noise(3, 5000)
    expected = (reference(options, rate, front.size)(waves) + options.floor).log()
    torch.testing.assert_close(front(waves), expected[:, None], atol=2e-4, rtol=0)
    assert front.shape(5000) == tuple(front(waves).shape[1:])


def test_mfccs_are_those_of_torchaudio() -> None:
    options, waves = MfccOptions(coefficients=20), noise(2, 4000)
    front = Mfcc(options, 16000)
    spectra = (reference(options, 16000, front.size)(waves) + options.floor).log()
    expected = torchaudio.functional.create_dct(20, 40, "ortho").T @ spectra
    torch.testing.assert_close(front(waves)[:, 0], expected, atol=1e-3, rtol=0)
    assert front.shape(4000) == (1, 20, 26)


def test_a_tone_is_loudest_in_the_bin_around_its_frequency() -> None:
    front = LogMel(MelOptions(bins=40), 16000)
    loudest = [int(front(tone(hertz)[None])[0, 0].mean(1).argmax()) for hertz in (300, 1000, 4000)]
    mels = [2595 * torch.log10(torch.tensor(1 + hertz / 700)).item() for hertz in (300, 1000, 4000)]
    step = 2595 * torch.log10(torch.tensor(1 + 8000 / 700)).item() / 41
    for found, mel in zip(loudest, mels, strict=True):
        assert abs((found + 1) * step - mel) <= step


def test_silence_is_the_logarithm_of_the_floor() -> None:
    found = LogMel(MelOptions(floor=1e-4), 8000)(torch.zeros(1, 800))
    torch.testing.assert_close(found, torch.full_like(found, torch.tensor(1e-4).log().item()))


def test_a_frame_has_sound_where_its_centre_has() -> None:
    front = LogMel(MelOptions(hop=0.01), 8000)
    mask = torch.arange(240)[None] < 161
    assert front.frames(mask).tolist() == [[True, True, True, False]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (MelOptions(high=9000), "high: found 9000 Hz, expected more than `low`.* at most 8000 Hz"),
        (MelOptions(low=500, high=400), "high: found 400 Hz"),
        (MelOptions(bins=200), "bins: .* of 200 bins lie between"),
        (MelOptions(window=1e-5), "window: .* shorter than the samples"),
    ],
)
def test_what_no_spectrogram_can_be_made_of_is_refused(options: MelOptions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogMel(options, 16000)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"bins": 0}, "bins: found 0"), ({"hop": -1.0}, "hop: found -1"), ({"low": -1.0}, "low: found -1")],
)
def test_wrong_options_of_spectrograms_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MelOptions(**options)


def test_more_coefficients_than_bins_are_refused() -> None:
    with pytest.raises(ValueError, match="coefficients: found 41, expected 1 to 40"):
        MfccOptions(coefficients=41)


# ---- augmentations


def test_what_happens_to_a_clip_depends_on_its_index_alone() -> None:
    waves, spectra = noise(3, 400), noise(3, 1, 20, 30)
    steps = (Gain(), Delay(), Noise(), SpecAugment())
    for step, batch in zip(steps, (waves, waves, waves, spectra), strict=True):
        alone = step(batch[2:], randomness(7))
        together = step(batch, randomness(5, 6, 7))
        assert torch.equal(alone[0], together[2])
        assert not torch.equal(step(batch, randomness(5, 6, 7, view=2)), together)


def test_a_gain_stays_within_its_decibels() -> None:
    waves = torch.ones(200, 4)
    found = Gain(decibels=6)(waves, randomness(*range(200)))
    decibels = 20 * found[:, 0].log10()
    assert -6 <= decibels.min() < -5
    assert 5 < decibels.max() <= 6
    assert torch.equal(found, found[:, :1].expand_as(found))


def test_a_delay_moves_a_clip_and_lets_silence_in() -> None:
    waves = torch.zeros(100, 50)
    waves[:, 25] = 1
    found = Delay(share=0.2)(waves, randomness(*range(100)))
    assert found.sum(1).tolist() == [1.0] * 100
    assert sorted(set(found.argmax(1).tolist())) == list(range(15, 36))


def test_noise_has_the_power_that_it_is_given() -> None:
    waves = tone(440, samples=8000).expand(4, -1) * 0.5
    added = Noise(least=20, most=20)(waves, randomness(0, 1, 2, 3)) - waves
    below = 10 * (waves.square().mean(1) / added.square().mean(1)).log10()
    torch.testing.assert_close(below, torch.full((4,), 20.0), atol=0.3, rtol=0)
    assert added.mean().abs() < 0.002


def test_a_silent_clip_stays_silent() -> None:
    silence = torch.zeros(2, 100)
    for step in (Gain(), Delay(), Noise()):
        assert torch.equal(step(silence, randomness(0, 1)), silence)


def test_spec_augment_covers_whole_bands_and_stretches_with_the_mean() -> None:
    spectra = noise(64, 1, 20, 30)
    found = SpecAugment(bands=1, bins=5, stretches=2, frames=4)(spectra, randomness(*range(64)))
    covered = (found != spectra)[:, 0]
    rows, columns = covered.all(2).sum(1), covered.all(1).sum(1)
    assert torch.equal(covered, covered.all(2)[:, :, None] | covered.all(1)[:, None])
    assert rows.max() == 5
    assert rows.min() == 0
    assert 4 < columns.max() <= 8
    means = spectra.mean((2, 3), keepdim=True).expand_as(found)
    torch.testing.assert_close(found[:, 0][covered], means[:, 0][covered])


def test_spec_augment_with_nothing_to_cover_changes_nothing() -> None:
    spectra = noise(4, 1, 20, 30)
    assert torch.equal(SpecAugment(bands=0, stretches=0)(spectra, randomness(0, 1, 2, 3)), spectra)


def test_a_band_is_never_wider_than_the_spectrogram() -> None:
    spectra = noise(50, 1, 3, 4)
    found = SpecAugment(bins=100, frames=100)(spectra, randomness(*range(50)))
    assert found.shape == spectra.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gain": {"decibels": -1.0}}, "data.augment.gain: decibels: found -1, expected 0 to 60"),
        ({"delay": {"share": 2.0}}, "data.augment.delay: share: found 2"),
        ({"noise": {"least": 30.0, "most": 20.0}}, "data.augment.noise: most: found 20, expected 30 to 120"),
        ({"spec_augment": {"bands": -1}}, "data.augment.spec_augment: bands: found -1"),
        ({"gian": {}}, "data.augment.gian: unknown augmentation; did you mean 'gain'"),
    ],
)
def test_wrong_options_of_augmentations_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_augment(options, SOUND_AUGMENTATIONS)
