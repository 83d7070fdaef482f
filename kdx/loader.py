"""From a split to batches: in which order, and by which processes they are read."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from kdx.components import Split
from kdx.data import View
from kdx.errors import KdxError
from kdx.randomness import seeded
from kdx.types import Batch

Own = Callable[[list[int]], list[int]]
"""Which samples of a batch are for this process."""


class Loader:
    """The training batches of a view, each epoch in an order that depends on `seed` and the epoch's number alone.

    The last samples of an order that do not fill a batch are left out, so an epoch has `steps_per_epoch` batches;
    a view that is smaller than one batch is one short batch. The batches are the same for any number of `workers`.
    """

    def __init__(self, view: Split, batch: int, seed: int, workers: int = 0, own: Own | None = None) -> None:
        self.steps_per_epoch = max(1, len(view) // batch)
        self.size = min(batch, len(view))
        self._samples = len(view)
        self._batch = batch
        self._seed = seed
        self._own = own
        self._reader = _Reader(view, workers)

    def epoch(self, number: int, start: int = 0, *, whole: bool = False) -> Iterator[Batch]:
        """The batches of epoch `number` (from 1) without the first `start`, which are not read either; of each batch
        what is this process's `own`, or the `whole`.

        With workers, an epoch ends where a later call begins to read: they share the worker processes.
        """
        order = torch.randperm(self._samples, generator=seeded("order", self._seed, number))
        own = None if whole else self._own
        return self._reader.read(_batches(order, self._batch, own)[start : self.steps_per_epoch])


def in_order(view: Split, batch: int, workers: int = 0, own: Own | None = None) -> Iterator[Batch]:
    """All samples of a view in their order, for evaluation, or what of each batch is `own`; the last may be short."""
    return _Reader(view, workers).read(_batches(torch.arange(len(view)), batch, own))


def _batches(order: Tensor, batch: int, own: Own | None) -> Sequence[Tensor]:
    batches: Sequence[Tensor] = torch.split(order, batch)
    return batches if own is None else [torch.tensor(own(one.tolist()), dtype=torch.int64) for one in batches]


class _Reader:
    """Fetches planned batches, in this process or in worker processes that live as long as the reader."""

    def __init__(self, split: Split, workers: int) -> None:
        self._split = split
        self._plan: list[list[int]] = []
        self._turn = 0
        self._loader: DataLoader[Any] | None = None
        if workers:
            self._loader = DataLoader(
                _Fetch(split),
                batch_sampler=self._plan,
                num_workers=workers,
                collate_fn=_as_it_is,
                persistent_workers=True,
                # A split may be of a class from a plugin file, which a fresh interpreter could not import.
                multiprocessing_context="fork" if sys.platform == "linux" else None,
                generator=torch.Generator(),  # or the loader would draw from torch's global one
            )

    def read(self, plan: Sequence[Tensor]) -> Iterator[Batch]:
        if self._loader is None:
            split = self._split
            yield from split.read(plan) if isinstance(split, View) else (split.fetch(one.tolist()) for one in plan)
            return
        self._turn += 1
        turn = self._turn
        self._plan[:] = [indices.tolist() for indices in plan]
        with warnings.catch_warnings():  # Python 3.12 warns of any fork beside threads; workers touch no lock of ours
            warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
            batches = iter(self._loader)
        for batch in batches:
            if isinstance(batch, KdxError):
                raise batch
            yield batch
            if turn != self._turn:
                raise RuntimeError("this epoch was cut off: a later one has begun to use the same workers")


class _Fetch(TorchDataset[Any]):
    """Hands errors that a person reads back as values: torch would wrap them into a worker's traceback."""

    def __init__(self, split: Split) -> None:
        self._split = split

    def __getitems__(self, indices: list[int]) -> Batch | KdxError:
        try:
            return self._split.fetch(indices)
        except KdxError as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch
