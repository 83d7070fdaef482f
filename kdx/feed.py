"""The training batches of a run, by update."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kdx.calls import ModelCall
from kdx.components import Dataset
from kdx.loader import Loader
from kdx.plan import Plan
from kdx.randomness import Randomness
from kdx.recall import Recall, RecallCall, RecallTarget, Stored
from kdx.runtime import Runtime
from kdx.types import Batch


class Feed:
    """Gives the batch of any update, on the device and augmented; updates in their order are read ahead of use.

    The batch depends on `seed` and the update alone. Each pass over the samples is a view of its own, or with `views`
    one of so many, in turn. Answers of teachers that are stored come with the batch. Streams that are not among
    `streams` may be left out; those that a stored teacher reads are made for batches that are `plain` alone.
    """

    def __init__(
        self,
        loader: Loader,
        dataset: Dataset,
        runtime: Runtime,
        seed: int,
        views: int | None = None,
        stored: Iterable[Stored] = (),
        streams: Iterable[str] = (),
    ) -> None:
        self._loader = loader
        self._whole = dataset
        self.streams: frozenset[str] = frozenset()
        self.read_also(streams)
        self._runtime = runtime
        self._seed = seed
        self._views = views
        self.recall = Recall(stored)
        self._next = -1
        self._source: Iterator[Batch] = iter(())

    def read_also(self, streams: Iterable[str]) -> None:
        """Make sure that batches hold these streams, beside those that they hold already."""
        self.streams |= set(streams)
        self._dataset = self._whole.reading(self.streams)

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
            now = view if self._views is None else view % self._views
            for batch in self._loader.epoch(view + 1, start):
                rows = self._runtime.move(self.recall.rows(batch["index"], now))
                batch = self._runtime.move(batch)
                yield {**self._dataset.on_device(batch, Randomness(self._seed, now, batch["index"])), **rows}
            view, start = view + 1, 0

    def plain(self, batch: Batch) -> Batch:
        """A batch of the loader on the device and not augmented, with what is stored for it as it is."""
        rows = self._runtime.move(self.recall.fixed(batch["index"]))
        return {**self._whole.on_device(self._runtime.move(batch), None), **rows}


def streams_read(plan: Plan, *, training: bool = False) -> frozenset[str]:
    """The streams of the batch that a run reads: its models on whatever view, its nodes and its metrics.

    In `training` a teacher or target that is stored reads none, nor does what it alone reads.
    """
    calls = [
        call for call in plan.calls
        if not (training and (isinstance(call, (RecallCall, RecallTarget)) or call.name in plan.idle))
    ]  # fmt: skip
    keys = [key for call in calls for key in call.reads]
    keys += [key for part in plan.spec.metrics for key in part.entry.component.inputs.values()]
    plain = {stream for call in calls if isinstance(call, ModelCall) for stream in call.streams}
    return frozenset(key.removeprefix("batch.") for key in keys if key.startswith("batch.")) | plain
