"""The shipped pairs of handwritten and spoken digits."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdx.builtin import spoken_digits
from kdx.builtin.make_spoken_digits import (
    IMAGES,
    make,
    pack,
    pair,
    split_images,
    split_voices,
    trim,
)
from kdx.builtin.spoken_digits import CLASSES, FILE, RATE, SAMPLES, SpokenDigits, unpack
from kdx.components import Split
from kdx.errors import ConfigError
from kdx.randomness import Randomness


def digits(**options: Any) -> SpokenDigits:
    return SpokenDigits(SpokenDigits.Config(**options))


def whole(split: Split | None) -> dict[str, Tensor]:
    assert split is not None
    return split.fetch(range(len(split)))


def test_the_shipped_pairs_are_balanced() -> None:
    data = digits()
    for split, count in zip((data.train(), data.val(), data.test()), IMAGES, strict=True):
        batch = whole(split)
        assert batch["image"].shape == (10 * count, 1, 28, 28)
        assert batch["audio"].shape == (10 * count, SAMPLES)
        assert batch["audio"].dtype == torch.int16
        assert batch["label"].bincount().tolist() == [count] * 10
    assert data.classes()[3] == "three"


def test_the_shipped_file_is_small_quick_and_of_known_content() -> None:
    spoken_digits._read.cache_clear()
    started = time.process_time()
    data = digits()
    data.train()
    assert time.process_time() - started < 3
    assert FILE.stat().st_size < 3e6
    assert data.fingerprint() == "dcc5020f7623a43b413d1f4ec8758d7db9d71a61c78bd3384ef060f261ef87d2"


def test_no_image_and_no_clip_is_in_two_splits() -> None:
    data = digits()
    for stream in ("image", "audio"):
        seen = [{one.numpy().tobytes() for one in whole(split)[stream]} for split in data.splits.values()]
        assert len(set().union(*seen)) == sum(len(part) for part in seen)


def test_a_pair_agrees_on_its_class() -> None:
    """Clips are told apart by class: none is paired with images of two classes."""
    for split in digits().splits.values():
        owners = torch.full((len(split.audio),), -1)
        owners[split.pairs] = split.labels
        assert torch.equal(owners[split.pairs], split.labels)
        assert split.pairs.bincount().min() > 0


def test_streams_say_what_they_are() -> None:
    streams = digits(mel={"hop": 0.016}, mfcc={}).facts().streams
    assert (streams["audio"].kind, streams["audio"].shape, streams["audio"].rate) == ("audio", (SAMPLES,), RATE)
    assert (streams["mel"].kind, streams["mel"].shape) == ("image", (1, 40, 41))
    assert streams["mfcc"].shape == (1, 13, 65)
    assert (streams["image"].kind, streams["image"].rate) == ("image", 0)
    assert list(streams) == ["image", "audio", "mel", "mfcc", "label"]


def test_statistics_are_those_of_what_a_network_reads() -> None:
    data = digits(mel={})
    about = data.facts().streams
    batch = data.on_device(whole(data.train()), None)
    for stream in ("audio", "mel"):
        assert about[stream].mean == pytest.approx((batch[stream].mean().item(),), abs=0.02)
        assert about[stream].std == pytest.approx((batch[stream].std().item(),), rel=0.02)
    assert batch["audio"].abs().max() <= 1


def test_training_batches_vary_and_others_do_not() -> None:
    data = digits(mel={}, augment={"shift": {}, "gain": {}, "spec_augment": {}})
    batch = {**data.train().fetch([0, 1]), "index": torch.tensor([0, 1])}
    plain = data.on_device(batch, None)
    first, again, later = (data.on_device(batch, Randomness(0, view, batch["index"])) for view in (1, 1, 2))
    for stream in ("image", "audio", "mel"):
        assert not torch.equal(first[stream], plain[stream])
        assert torch.equal(first[stream], again[stream])
        assert not torch.equal(first[stream], later[stream])
    assert torch.equal(plain["audio"], batch["audio"].float() / 32768)


def test_spectrograms_are_of_the_augmented_sound() -> None:
    data = digits(mel={"floor": 1e-12}, augment={"gain": {"decibels": 20.0}})
    batch = {**data.train().fetch([0]), "index": torch.tensor([0])}
    plain, varied = data.on_device(batch, None), data.on_device(batch, Randomness(0, 1, batch["index"]))
    gain = varied["audio"].abs().max() / plain["audio"].abs().max()
    assert gain != 1
    rise = (varied["mel"] - plain["mel"]).flatten()[plain["mel"].argmax()]
    assert rise.item() == pytest.approx(2 * gain.log().item(), abs=0.05)


def test_steps_of_a_stream_that_is_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.augment.spec_augment: it changes the stream mel; ask for that with"):
        digits(augment={"spec_augment": {}})
    data = digits()
    with pytest.raises(ConfigError, match="spec_augment"):
        data.view(SpokenDigits.Config(augment={"spec_augment": {}}))


def test_wrong_options_of_streams_name_their_place() -> None:
    with pytest.raises(ConfigError, match=r"data.mel.high: found 5000 Hz"):
        digits(mel={"high": 5000.0})
    with pytest.raises(ConfigError, match=r"data.mfcc.bin: unknown option; did you mean 'bins'"):
        digits(mfcc={"bin": 3})


# ---- how the file is made


def test_voices_of_one_family_are_in_one_split() -> None:
    voices = [f"{name}{i}" for name in "abcdegh" for i in range(1, 5)] + ["f1", "f2", "anika", "anikaRobot", "steph"]
    splits = split_voices([*voices, *(f"voice{chr(97 + i)}" for i in range(30)), "steph2", "steph3"])
    assert len({splits[name] for name in ("steph", "steph2", "steph3")}) == 1
    assert splits["anika"] == splits["anikaRobot"]
    assert len({splits[f"a{i}"] for i in range(1, 5)}) == 1
    counts = [list(splits.values()).count(split) for split in range(3)]
    assert counts[1] >= 12
    assert counts[2] >= 20


def test_images_are_split_evenly_and_paired_within_their_split() -> None:
    labels = np.arange(5000) % 10
    splits = split_images(labels)
    assert [int(((splits == 1) & (labels == label)).sum()) for label in range(10)] == [50] * 10
    clip_label, clip_split = np.arange(60) % 10, np.arange(60) // 10 % 3
    found = pair(labels, splits, clip_label, clip_split)
    assert (clip_label[found] == labels).all()
    assert (clip_split[found] == splits).all()
    assert np.bincount(found[splits == 0], minlength=60).max() == 175


def test_packed_clips_come_back_within_the_error_of_their_codes() -> None:
    wave = np.sin(np.linspace(0, 60, 1000)).astype(np.float32) * np.linspace(0, 0.9, 1000, dtype=np.float32)
    clips = unpack(torch.from_numpy(pack(wave)), torch.tensor([1000]))
    middle = clips[0, (SAMPLES - 1000) // 2 :][:1000].double() / 32767
    noise = (middle - torch.from_numpy(wave)).square().mean() / torch.from_numpy(wave).square().mean()
    assert -10 * noise.log10() > 35
    assert clips[0].count_nonzero() <= 1000


def test_quiet_ends_are_cut_off() -> None:
    wave = np.zeros(4000, np.float32)
    wave[1000:2000] = 0.3
    found = trim(wave)
    assert len(found) == 1000 - 1 + 2 * RATE // 100
    assert found.max() == pytest.approx(0.9)


def say(word: str, voice: str, _words_a_minute: int) -> Any:
    """A tone of its own for each word and voice."""
    hertz = 200 + 60 * CLASSES.index(word) + 2 * (ord(voice[0]) - ord("a")) + (voice[1] == "y")
    return np.sin(np.arange(2000) * hertz * 2 * np.pi / RATE).astype(np.float32)


def test_the_file_is_made_the_same_each_time(tmp_path: Path) -> None:
    images = np.arange(20 * 784).reshape(20, 28, 28).astype(np.uint8)
    voices = [f"{chr(97 + i)}x" for i in range(26)] + [f"{chr(97 + i)}y" for i in range(14)]
    for name in "ab":
        make(images, np.arange(20) % 10, voices, say, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_one_voice_under_two_names_is_refused(tmp_path: Path) -> None:
    images = np.zeros((10, 28, 28), np.uint8)
    voices = [f"{chr(97 + i)}x" for i in range(26)] + [f"{chr(97 + i)}y" for i in range(14)]
    with pytest.raises(ValueError, match="one and the same clip would be in two splits"):
        make(images, np.arange(10), voices, lambda word, *_: say(word, "ax", 170), tmp_path / "x")


def test_the_licence_of_the_shipped_pairs_lies_beside_them() -> None:
    text = (FILE.parent / "SPOKEN_DIGITS_LICENSE.txt").read_text(encoding="utf-8")
    assert "Creative Commons Attribution-ShareAlike 3.0" in text
    assert "eSpeak NG" in text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sound_is_made_ready_on_the_gpu_as_on_the_cpu() -> None:
    data = digits(mel={}, mfcc={}, augment={"gain": {}, "delay": {}, "noise": {}, "spec_augment": {}})
    batch = {**data.train().fetch(range(64)), "index": torch.arange(64)}
    there = {name: tensor.cuda() for name, tensor in batch.items()}
    found = data.on_device(there, Randomness(0, 1, there["index"]))
    for name, expected in data.on_device(batch, Randomness(0, 1, batch["index"])).items():
        torch.testing.assert_close(found[name].cpu(), expected, rtol=1e-3, atol=1e-3)
