"""What answers in place of frozen teachers and targets: rows of a cache, read with a batch, handed over in the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kdx.cache import Field, Store
from kdx.calls import Key, ModelCall, NodeCall, Values, settings_of
from kdx.errors import DataError, KdxError
from kdx.taps import Tapped
from kdx.types import Batch, Shape

INPUTS = "inputs"
"""The part of a target's cache that says of what it was made."""


@dataclass(frozen=True)
class Stored:
    """The fields of a complete cache that a run reads. `lookup` is the row of each index, None where they are equal.

    With several views, those of view v begin at row v times the samples.
    """

    store: Store
    fields: tuple[str, ...]
    lookup: Tensor | None = None

    @cached_property
    def streams(self) -> dict[str, str]:
        """File -> the name of its rows in a batch, which no stream of data has."""
        names = (file for field in self.fields for file in self.store.meta.fields[field].files(field))
        return {file: f"{self.store.folder}:{file}" for file in names}

    def field(self, name: str) -> Field:
        return self.store.meta.fields[name]

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shape of each field of one sample."""
        return {name: self.field(name).shape for name in self.fields}

    @cached_property
    def keys(self) -> dict[str, Key]:
        """File -> the key of its rows among the values of a batch."""
        return {file: f"batch.{name}" for file, name in self.streams.items()}

    @property
    def inputs(self) -> dict[Key, Shape]:
        """The shapes of all that a target was made of, directly or through others, by key. `DataError` without them."""
        try:
            return {str(key): tuple(map(int, shape)) for key, shape in self.store.meta.parts[INPUTS].items()}
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise DataError(f"{self.store.folder} does not say what its target was made of; fill it anew") from error

    def among(self, values: Values) -> bool:
        """Whether the rows of a batch came with it."""
        return all(key in values for key in self.keys.values())

    def answers(self, values: Values) -> dict[str, Tensor]:
        """Field -> what is stored for the samples of a batch, whose rows are among the values."""
        rows = {file: values[key] for file, key in self.keys.items()}
        return {field: self.field(field).decode(field, rows) for field in self.fields}

    def rows(self, index: Tensor, view: int) -> Batch:
        """The rows of samples (int64 [B], on the CPU) as streams of their batch, without a copy to the device."""
        meta, streams = self.store.meta, self.streams
        chosen = index if self.lookup is None else self.lookup[index]
        if meta.views > 1:
            chosen = chosen + view % meta.views * meta.samples
        found = self.store.rows(chosen, tuple(streams))
        return {streams[file]: rows for file, rows in found.items()}


class Recall:
    """All that is stored for the training batches of a run, or of runs side by side."""

    def __init__(self, stored: Iterable[Stored] = ()) -> None:
        self._stored: dict[tuple[str, tuple[str, ...]], Stored] = {}
        self.add(stored)

    def add(self, stored: Iterable[Stored]) -> None:
        """Read these as well from now on."""
        self._stored |= {(str(one.store.folder), one.fields): one for one in stored}

    @property
    def stored(self) -> tuple[Stored, ...]:
        return tuple(self._stored.values())

    def rows(self, index: Tensor, view: int) -> Batch:
        """What is stored for samples (int64 [B], on the CPU) in a view; nothing where there are no caches."""
        found: Batch = {}
        for one in self._stored.values():
            found |= one.rows(index, view)
        return found

    def fixed(self, index: Tensor) -> Batch:
        """As `rows`, of caches alone that hold what is the same in every view, and without any augmentation."""
        found: Batch = {}
        for one in self._stored.values():
            if one.store.meta.parts.get("augmentation") is None:
                found |= one.rows(index, 0)
        return found


class Recalled(Tapped):
    """Stands for a network that no training batch needs. It holds no weights and is never run."""

    def __init__(self, wanted: tuple[str, ...]) -> None:
        torch.nn.Module.__init__(self)
        self.wanted = wanted
        self.stages_meant: dict[str, str] = {}

    @property
    def is_hooked(self) -> bool:
        """True, so that nobody takes it for a network that could be run in another way."""
        return True

    @property
    def stops_early(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class IdleCall(ModelCall):
    """A frozen teacher that no training batch needs, for targets that are stored are all that reads it. Its network is
    made (`live`) when it is first asked about another batch; None where the teacher has no net.
    """

    live: Callable[[], ModelCall] | None

    @property
    def at_hand(self) -> bool:
        return self.live is not None

    def run(self, values: Values) -> None:
        self._network().run(values)

    def protect(self, values: Values) -> None:
        """Nothing that is stored can be changed in place."""

    def answer(self, batch: Batch) -> Tensor:
        return self._network().answer(batch)

    def _network(self) -> ModelCall:
        if self.live is None:
            raise KdxError(
                f"{self.where}: it answers from a cache alone, which holds no answers for samples that are not of "
                "training, or not augmented as there; give the teacher a model, a `run` or a checkpoint"
            )
        return self.live()


@dataclass(frozen=True, kw_only=True)
class RecallCall(IdleCall):
    """Gives what is stored for a training batch. Any other batch goes to the network."""

    stored: Stored

    def run(self, values: Values) -> None:
        if not self.stored.among(values):
            self._network().run(values)
            return
        for field, answer in self.stored.answers(values).items():
            values[f"{self.name}.{field}"] = answer


@dataclass(frozen=True, kw_only=True)
class RecallTarget(NodeCall):
    """Gives what is stored for a training batch. For any other batch the target is computed of what it reads."""

    stored: Stored

    def run(self, values: Values) -> None:
        if not self.stored.among(values):
            super().run(values)
            return
        for field, answer in self.stored.answers(values).items():
            values[f"{self.name}.{field}"] = answer

    def knobs(self) -> dict[str, Key]:
        """None: what is stored moves no more."""
        return {}


def recalled(call: NodeCall, stored: Stored) -> RecallTarget:
    """The target with its stored answers in place of what it would compute."""
    gives = tuple(f"{call.name}.{field}" for field in stored.fields)
    return RecallTarget(**{**settings_of(call), "gives": gives}, stored=stored)


def stored_of(calls: Iterable[object]) -> tuple[Stored, ...]:
    """What is stored for the calls of a plan."""
    return tuple(call.stored for call in calls if isinstance(call, (RecallCall, RecallTarget)))
