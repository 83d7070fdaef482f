"""How long several ways of computing the same take: timed in turn, and several times at once where they are short."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kdx.calls import Values
from kdx.streams import Runs, in_turn
from kdx.types import Batch

ROUNDS = 5
"""How often each way is timed, in turn."""
GAIN = 0.95
"""What is taken in place of another way must need less than this part of its time."""
AT_ONCE, MOST = 0.02, 20
"""What takes less than so many seconds is timed several times at once, at most so many."""


@dataclass(frozen=True)
class InTurn:
    """Several ways, one after another."""

    ways: Sequence[Runs]

    def run(self, values: Values) -> None:
        in_turn(self.ways, values)


def start(batch: Batch) -> Values:
    """The values of a step before anything has run."""
    return {f"batch.{name}": tensor for name, tensor in batch.items()}


def medians(
    contenders: Mapping[str, Runs],
    batch: Batch,
    wait: Callable[[], None],
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """The median milliseconds of each contender, timed in turn."""

    def seconds(contender: Runs, count: int) -> float:
        several = [start(batch) for _ in range(count)]
        wait()
        began = clock()
        for values in several:
            contender.run(values)
        wait()
        return (clock() - began) / count

    count = at_once(min(seconds(contender, 1) for contender in contenders.values()))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            times[name].append(1000 * seconds(contender, count))
    return {name: statistics.median(found) for name, found in times.items()}


def at_once(seconds: float) -> int:
    """How often something that takes so long is timed at once.

    In a training it comes again and again. A short call among others would find the caches of the processor full of
    what is theirs.
    """
    return max(1, min(MOST, round(AT_ONCE / max(seconds, 1e-9))))
