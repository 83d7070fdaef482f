"""What the processes of a run do in common, as it is for one process that is alone.

It does nothing and gives what it is given, so that nobody has to ask how many processes there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from kdx.types import Batch, Losses

T = TypeVar("T")


class Group:
    """One process that is alone."""

    rank = 0
    size = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def own(self, indices: list[int], parts: int) -> list[int]:
        """The samples of a batch, worked off in `parts`, that are for this process."""
        return indices

    def expect(self, batch: int, parts: int) -> None:
        """Be told the size of all batches to come. Raises `ConfigError` where processes would have no sample."""

    def parts(self, batch: Batch, count: int) -> Iterator[tuple[Batch, float, bool]]:
        """The micro-batches of this process, the share of each in the batch, and whether it is the last."""
        size = len(batch["index"])
        chunks = [batch] if count == 1 else split(batch, count)
        for place, part in enumerate(chunks, 1):
            yield part, len(part["index"]) / size, place == len(chunks)

    def samples(self, batch: Batch) -> int:
        """How many samples the batch has over all processes."""
        return len(batch["index"])

    def begin(self, seed: int, step: int) -> None:
        """Make the random numbers of this process its own for one update."""

    def gather(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """As `kdx.gather`; `sizes` are the rows of each process where they are not those of the present batch."""
        return x

    def slice(self, x: Tensor) -> Tensor:
        """The rows of this process of a tensor for the present batch."""
        return x

    def over_all(self, losses: Losses) -> Losses:
        """The losses with values over all processes, while each keeps the graph of its own part."""
        return losses

    def seen(self, part: Batch, values: Mapping[T, Tensor]) -> tuple[Batch, Mapping[T, Tensor]]:
        """Labels and positions of a part of a batch and some values for it, of all processes."""
        return part, values

    def stop(self, asked: Callable[[], bool]) -> Callable[[], bool]:
        """A wish to stop that all processes follow at the same update."""
        return asked

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Set tensors to their mean over the processes."""

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Which of the flags is up on any process. Told by the hosts to each other, no device waits."""
        return list(flags)

    def agreed(self, value: T) -> T:
        """What the first process found."""
        return value

    def wait(self) -> None:
        """Wait for all processes."""

    def spread(self, module: nn.Module) -> None:
        """Give all processes the parameters and buffers of the first."""

    @property
    def is_apart(self) -> bool:
        """Whether each process works by itself at this moment, as it does but for the batches of `parts` and `over`."""
        return True

    def draws_alone(self, name: str, generator: torch.Generator) -> None:
        """Let a generator give other numbers on each process."""

    @contextmanager
    def common(self) -> Iterator[None]:
        """Within the block torch's global random numbers are the same on all processes."""
        yield

    def share(self, indices: list[int]) -> list[int]:
        """The samples of a batch of an evaluation that are for this process."""
        return indices

    def over(self, batches: Iterable[Batch], count: int, size: int) -> Iterator[Batch]:
        """Go through batches of an evaluation of `count` samples, which hold `size` over all processes."""
        yield from batches

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process goes through the block before the others do; if it raises `Stopped`, so do they."""
        yield


def split(batch: Batch, count: int) -> list[Batch]:
    """A batch in `count` parts of nearly equal size."""
    chunks = {name: value.chunk(count) for name, value in batch.items()}
    return [{name: part[i] for name, part in chunks.items()} for i in range(len(chunks["index"]))]
