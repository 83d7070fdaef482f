"""Nets for sound."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchaudio.models
from kdx_plugins.audio_nets import Conformer, PrepareSound, SpeechEncoder, WaveCnn, over_sound
from torch import Tensor

import kdx
from kdx.builtin.models import Timm
from kdx.taps import Tapped, read_taps
from kdx.testing import check_model

STREAMS = {
    "audio": kdx.StreamFacts("audio", (1600,), (0.1,), (0.2,), rate=16000),
    "audio_mask": kdx.StreamFacts("mask", (1600,)),
    "mel": kdx.StreamFacts("image", (1, 20, 30), (-5.0,), (2.0,)),
    "mel_mask": kdx.StreamFacts("mask", (30,)),
}
FACTS = kdx.DataFacts(STREAMS, classes=("a", "b", "c"), size=8)
TINY: dict[str, Any] = {
    "extractor_mode": "group_norm",
    "extractor_conv_layer_config": [[16, 10, 5], [16, 8, 4]],
    "extractor_conv_bias": False,
    "encoder_embed_dim": 16,
    "encoder_projection_dropout": 0.0,
    "encoder_pos_conv_kernel": 4,
    "encoder_pos_conv_groups": 2,
    "encoder_num_layers": 2,
    "encoder_num_heads": 2,
    "encoder_attention_dropout": 0.0,
    "encoder_ff_interm_features": 16,
    "encoder_ff_interm_dropout": 0.0,
    "encoder_dropout": 0.0,
    "encoder_layer_norm_first": False,
}


def sound(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def build(model: type[kdx.Model], /, *streams: str, facts: kdx.DataFacts = FACTS, **options: Any) -> kdx.Network:
    torch.manual_seed(0)
    return model(model.Config(**options), facts, streams).build().eval()


@pytest.mark.parametrize("streams", [("audio",), ("audio", "audio_mask")])
def test_wave_cnn_keeps_the_contract(streams: tuple[str, ...]) -> None:
    check_model(WaveCnn, facts=FACTS, streams=streams, channels=[4, 8], strides=[8, 4], kernel=5)


def test_speech_encoder_keeps_the_contract() -> None:
    check_model(SpeechEncoder, facts=FACTS, streams=("audio",), model="wav2vec2_model", args=TINY)


def test_conformer_keeps_the_contract() -> None:
    check_model(Conformer, facts=FACTS, streams=("mel",), layers=2, width=8, heads=2, ffn=8, kernel=5)


@pytest.mark.parametrize(
    ("model", "options", "taps", "shapes"),
    [
        (WaveCnn, {"channels": [4, 8], "strides": [8, 4]}, {"mid": 0}, {"mid": (4, 1, 200), "features": (8, 1, 50)}),
        (
            SpeechEncoder,
            {"model": "wav2vec2_model", "args": TINY},
            {"mid": "speech.encoder.transformer.layers.0"},
            {"mid": (78, 16), "features": (78, 16)},
        ),
        (Conformer, {"layers": 2, "width": 8, "heads": 2}, {"mid": "layers.0"}, {"mid": (30, 8), "features": (30, 8)}),
    ],
)
def test_inner_tensors_are_maps_and_sequences(
    model: type[kdx.Model], options: dict[str, Any], taps: dict[str, Any], shapes: dict[str, Any]
) -> None:
    stream = "mel" if model is Conformer else "audio"
    wanted = ("logits", "embedding", "features", "mid")
    tapped = Tapped(build(model, stream, **options), wanted, read_taps(taps, "taps"), "student")
    found = tapped({stream: sound(2, *STREAMS[stream].shape)})
    assert {name: tuple(found[name].shape[1:]) for name in shapes} == shapes
    assert found["logits"].shape == (2, 3)
    assert found["embedding"].ndim == 2


def test_stages_of_a_wave_cnn_have_depths() -> None:
    network = build(WaveCnn, "audio", channels=[4, 8, 8, 8], strides=[4, 4, 2, 2])
    tapped = Tapped(network, ("depth_50",), {}, "student")
    assert tapped({"audio": sound(2, 1600)})["depth_50"].shape == (2, 8, 1, 100)
    assert network.net.feature_info[1] == {"num_chs": 8, "reduction": 16, "module": "stages.1"}  # type: ignore[index]


def test_frames_without_sound_do_not_count() -> None:
    sequence = torch.arange(12.0).reshape(1, 4, 3)
    mask = torch.tensor([[True] * 5 + [False] * 3])
    torch.testing.assert_close(over_sound(sequence, mask).mean(1), sequence[:, :3].mean(1))
    assert torch.equal(over_sound(sequence, torch.zeros(1, 8, dtype=torch.bool)), sequence)
    maps = sequence.transpose(1, 2)[:, :, None]
    torch.testing.assert_close(over_sound(maps, mask).mean((2, 3)), maps[..., :3].mean((2, 3)))


def test_a_net_with_a_mask_ignores_what_follows_the_sound() -> None:
    network = build(WaveCnn, "audio", "audio_mask", channels=[4, 8], strides=[8, 4], kernel=5)
    waves, mask = sound(1, 1600), torch.arange(1600)[None] < 640
    longer = waves.clone()
    longer[:, 900:] = 0
    torch.testing.assert_close(network(waves, mask), network(longer, mask))
    assert not torch.allclose(network(waves, mask), network(waves, mask.logical_not()))
    tapped = Tapped(network, ("logits", "features", "depth_50"), {}, "student")
    torch.testing.assert_close(tapped({"audio": waves, "audio_mask": mask})["logits"], network(waves, mask))


def test_sound_is_normalised_by_the_data_or_clip_by_clip() -> None:
    waves = sound(2, 1600)
    torch.testing.assert_close(PrepareSound(STREAMS["audio"])(waves), (waves - 0.1) / 0.2)
    own = PrepareSound(STREAMS["audio"], per_clip=True)(waves)
    torch.testing.assert_close(own.mean(1), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(own.std(1, correction=0), torch.ones(2), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("mode", "per_clip"), [("group_norm", False), ("layer_norm", True)])
def test_encoders_with_layer_norm_get_normalised_clips(mode: str, per_clip: bool) -> None:
    network = build(SpeechEncoder, "audio", model="wav2vec2_model", args={**TINY, "extractor_mode": mode})
    assert network.prepare.per_clip is per_clip


def test_weights_of_a_file_are_those_of_the_encoder(tmp_path: Path) -> None:
    torch.manual_seed(7)
    given = torchaudio.models.wav2vec2_model(**TINY, encoder_layer_drop=0.0, aux_num_out=5)
    torch.save(given.state_dict(), tmp_path / "w.pt")
    options = {"model": "wav2vec2_model", "args": TINY, "path": str(tmp_path / "w.pt")}
    network = build(SpeechEncoder, "audio", **options)
    waves = sound(2, 1600)
    expected = given.eval().extract_features(network.prepare(waves))[0][-1]
    features = network.net.forward_features(network.prepare(waves))
    torch.testing.assert_close(features, given.encoder.transformer.layer_norm(expected))


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    options = {"model": "wav2vec2_model", "args": TINY}
    (tmp_path / "w.pt").write_bytes(b"words")
    for path in (tmp_path / "w.pt", tmp_path / "nowhere.pt"):
        with pytest.raises(kdx.ConfigError, match=r"path: .*\.pt holds no weights of this encoder"):
            build(SpeechEncoder, "audio", **options, path=str(path))
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(kdx.ConfigError, match=r"it has no feature_extractor.* and it has a, the first of"):
        build(SpeechEncoder, "audio", **options, path=str(tmp_path / "w.pt"))


def test_published_weights_want_their_own_rate() -> None:
    facts = kdx.DataFacts({"audio": kdx.StreamFacts("audio", (1600,), rate=8000)}, classes=("a", "b"))
    with pytest.raises(kdx.ConfigError, match="path: the weights are for sound at 16000 Hz, but the data has 8000 Hz"):
        build(SpeechEncoder, "audio", facts=facts, model="wav2vec2_base", path="w.pt")


@pytest.mark.parametrize(
    ("model", "streams", "options", "error", "message"),
    [
        (WaveCnn, ("mel",), {}, kdx.PlanError, r"input: wave_cnn reads waveforms \[T\], but found mel, \[1, 20, 30\]"),
        (WaveCnn, ("sound",), {}, kdx.PlanError, "but found sound, which the data lacks"),
        (WaveCnn, ("audio", "mel"), {}, kdx.PlanError, "input: found audio, mel, expected one stream of sound"),
        (Conformer, ("audio",), {}, kdx.PlanError, r"input: conformer reads spectrograms \[1, F, T\], but found audio"),
        (WaveCnn, ("audio",), {"strides": [1]}, kdx.ConfigError, r"strides: found \[1\] for 4 stages"),
        (WaveCnn, ("audio",), {"kernel": 4}, kdx.ConfigError, "kernel: found 4, expected an odd number of samples"),
        (Conformer, ("mel",), {"heads": 5}, kdx.ConfigError, "heads: 5 heads cannot share a width of 96 evenly"),
        (Conformer, ("mel",), {"kernel": 2}, kdx.ConfigError, "kernel: found 2, expected an odd number of frames"),
        (Conformer, ("mel",), {"layers": 0}, kdx.ConfigError, "layers: found 0, expected 1 or more"),
        (SpeechEncoder, ("audio",), {"model": "hubert_bass"}, kdx.ConfigError, "did you mean hubert_base"),
        (
            SpeechEncoder,
            ("audio",),
            {"model": "wav2vec2_base", "args": {"depth": 3}},
            kdx.ConfigError,
            "args: wav2vec2_base refuses .*depth",
        ),
    ],
)
def test_what_no_net_can_be_built_for_is_refused(
    model: type[kdx.Model], streams: tuple[str, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build(model, *streams, **options)


def test_data_without_classes_are_refused() -> None:
    with pytest.raises(kdx.PlanError, match="wave_cnn tells classes apart, but the data has none"):
        build(WaveCnn, "audio", facts=kdx.DataFacts(STREAMS))


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchaudio.models", None)
    with pytest.raises(kdx.ConfigError, match=r"this net needs torchaudio .*pip install 'kdx\[audio\]'"):
        build(Conformer, "mel")


def test_a_transformer_of_timm_reads_patches_of_spectrograms() -> None:
    args = {"img_size": [20, 30], "patch_size": 10, "embed_dim": 24, "depth": 2, "num_heads": 2}
    network = build(Timm, "mel", model="vit_tiny_patch16_224", args=args)
    tapped = Tapped(network, ("logits", "mid"), read_taps({"mid": 0}, "taps"), "student")
    found = tapped({"mel": sound(2, 1, 20, 30)})
    assert found["mid"].shape == (2, 24, 2, 3)
    assert found["logits"].shape == (2, 3)
