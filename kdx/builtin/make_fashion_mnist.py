"""Makes the shipped part of Fashion-MNIST from its four official files; the same files give the same bytes.

    python -m kdx.builtin.make_fashion_mnist [FOLDER] [OUT]

FOLDER holds `train-images-idx3-ubyte.gz` and the other three, as Debian's package dataset-fashion-mnist installs them.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import lzma
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kdx.builtin.images import FILE

CLASSES = 10
PER_CLASS = {"train": 800, "t10k": 200}
FOLDER = Path("/usr/share/datasets/fashion-mnist")


# Pixels profit from a long literal context and have no alignment, unlike what the presets are made for.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}]

Array = npt.NDArray[np.uint8]


def make(folder: Path, out: Path, per_class: Mapping[str, int] = PER_CLASS) -> None:
    """Write four `.npy` arrays behind one another into one xz stream: images and labels of train, then of test."""
    content = io.BytesIO()
    for part, count in per_class.items():
        images, labels = read_idx(folder, part)
        chosen = choose(labels, count)
        np.save(content, images[chosen], allow_pickle=False)
        np.save(content, labels[chosen], allow_pickle=False)
    out.write_bytes(lzma.compress(content.getvalue(), check=lzma.CHECK_SHA256, filters=FILTERS))


def read_idx(folder: Path, part: str) -> tuple[Array, Array]:
    """Images `[N, 28, 28]` and labels `[N]` of `train` or `t10k`."""
    images = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    return np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8, offset=8)


def choose(labels: Array, count: int) -> npt.NDArray[np.int64]:
    """`count` positions of each class, the classes in turn: those whose number has the lowest SHA-256."""
    lots = np.array([hashlib.sha256(str(position).encode()).hexdigest() for position in range(len(labels))])
    order = np.argsort(lots)
    return np.stack([order[labels[order] == label][:count] for label in range(CLASSES)], 1).reshape(-1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kdx.builtin.make_fashion_mnist", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("out", type=Path, nargs="?", default=FILE)
    given = parser.parse_args()
    make(given.folder, given.out)


if __name__ == "__main__":
    main()
