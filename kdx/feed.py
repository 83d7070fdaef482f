"""The training batches of a run, by update."""

from __future__ import annotations

from collections.abc import Iterator

from kdx.components import Dataset
from kdx.data import Loader
from kdx.randomness import Randomness
from kdx.runtime import Runtime
from kdx.types import Batch


class Feed:
    """Gives the batch of any update, on the device and augmented; updates in their order are read ahead of use.

    The batch depends on `seed` and the update alone. Each pass over the samples is a view of its own.
    """

    def __init__(self, loader: Loader, dataset: Dataset, runtime: Runtime, seed: int) -> None:
        self._loader = loader
        self._dataset = dataset
        self._runtime = runtime
        self._seed = seed
        self._next = -1
        self._source: Iterator[Batch] = iter(())

    def at(self, step: int) -> Batch:
        """The batch of the update that comes after `step` finished ones."""
        with self._runtime.stopwatch.phase("data"):
            if step != self._next:
                self._source = self._from(step)
            self._next = step + 1
            return next(self._source)

    def _from(self, step: int) -> Iterator[Batch]:
        view, start = divmod(step, self._loader.steps_per_epoch)
        while True:
            for batch in self._loader.epoch(view + 1, start):
                batch = self._runtime.move(batch)
                yield self._dataset.on_device(batch, Randomness(self._seed, view, batch["index"]))
            view, start = view + 1, 0
