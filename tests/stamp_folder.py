"""A small folder in the layout of Tux Paint's stamps, for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

RATE = 8000


def clip(path: Path, hertz: float, seconds: float = 0.1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE), RATE)
    return path


def stamp(root: Path, name: str, caption: str, *, shade: int, spoken: float | None = None) -> None:
    """A transparent picture of one colour, a caption with a French one, and that spoken as a tone of `spoken` Hz."""
    file = root / f"{name}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 6, 4), [shade, shade, shade, 255], np.uint8), "RGBA").save(file)
    file.with_suffix(".txt").write_text(f"{caption}\nfr.utf8=Le {caption}\n", encoding="utf-8")
    if spoken is not None:
        clip(root / f"{name}_desc_fr.wav", spoken)


def stamps(root: Path) -> Path:
    """Ten animals and ten foods of which the first two animals share a clip, and the last food has none."""
    for i in range(10):
        stamp(root, f"animals/pets/cat{i}", f"A cat of kind {i}.", shade=10 * i, spoken=300 + 10 * max(i, 1))
        stamp(root, f"food/cake{i}", f"Cake {i}.", shade=100 + 10 * i, spoken=None if i == 9 else 600 + 10 * i)
    return root
