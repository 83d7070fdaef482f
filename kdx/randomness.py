"""Random numbers that depend on (seed, view, sample index) and on nothing else: not on worker, rank or order."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts; equal parts give equal seeds on every machine."""
    digest = hashlib.blake2b("\x1f".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seeded(*parts: object) -> torch.Generator:
    """A generator on the CPU, seeded by `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


class Randomness:
    """Counter-based random numbers for a batch of samples.

    `index` is int64 `[B]`. Two batches that share a sample get the same numbers for it under the same `name`,
    whatever else is in the batch. Each use needs a `name` of its own. The numbers are made of whole-number
    arithmetic alone, so every device gives the same ones.
    """

    def __init__(self, seed: int, view: int, index: Tensor) -> None:
        self._seed = seed
        self._view = view
        self._index = index

    def uniform(self, name: str, *shape: int) -> Tensor:
        """Floats in `[0, 1)`, `[B, *shape]`."""
        return self._bits(name, shape).to(torch.float32) * (1.0 / (1 << 24))

    def integers(self, name: str, low: int, high: int, *shape: int) -> Tensor:
        """Integers in `[low, high)`, int64 `[B, *shape]`; `high - low` is from 1 to 2**24."""
        if not 1 <= high - low <= 1 << 24:
            raise ValueError(f"{name}: no whole numbers can be drawn from [{low}, {high})")
        return low + (self._bits(name, shape) * (high - low) >> 24)

    def _bits(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """24 random bits for each sample and each place of `shape`."""
        key = derive_seed(self._seed, self._view, name)
        rows = _mix((self._index & _MASK) ^ (key & _MASK))
        rows = _mix(rows ^ (self._index >> 32) ^ (key >> 32))[:, None]
        # Places are hashed before they meet the rows: with plain counters, two samples whose row numbers lie close
        # together would share whole stretches of their numbers.
        places = _mix(torch.arange(1, math.prod(shape) + 1, device=self._index.device))
        bits = _mix((_mix(rows ^ places) + rows) & _MASK)
        return (bits >> 8).reshape(len(self._index), *shape)


def _mix(x: Tensor) -> Tensor:
    """A bijective 32-bit hash with low bias (Wellons' `lowbias32`), on int64 tensors that hold 32-bit values."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x046CA68B + ((x & 1) << 31)) & _MASK  # times 0x846CA68B, whose product would not fit into int64
    return x ^ (x >> 16)


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Torch's global random numbers, which dropout draws, follow the run's seed; the caller's go on undisturbed."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(derive_seed(seed, "training"))
        yield


def random_state() -> tuple[Any, ...]:
    """The state of all global random generators, comparable with `same_random_state`."""
    return torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=True)


def same_random_state(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    numbers = [np.array_equal(a, b) for a, b in zip(before[2], after[2], strict=True)]
    return torch.equal(before[0], after[0]) and before[1] == after[1] and all(numbers)
