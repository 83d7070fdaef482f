"""How long several ways of computing the same take: timed in turn, and several times at once where they are short."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from kdx.calls import Values
from kdx.streams import Runs, in_turn
from kdx.types import Batch

ROUNDS = 5
"""How often each way is timed, in turn."""
GAIN = 0.95
"""What is taken in place of another way must need less than this part of its time."""
AT_ONCE, MOST = 0.02, 20
"""What takes less than so many seconds is timed several times at once, at most so many."""
SIDE = 256
"""Rows and columns of a product that keeps all threads of torch busy for some tenths of a millisecond."""


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
    """The median milliseconds of each contender, timed in turn.

    Of several threads on a CPU, those of torch have just worked when a call begins, as in an update: they look for more
    work for a while, and what computes in threads of its own must share the cores with them.
    """
    busy = torch.get_num_threads() > 1 and all(tensor.device.type == "cpu" for tensor in batch.values())
    matrix = torch.ones(SIDE, SIDE)

    def seconds(contender: Runs, count: int) -> float:
        several = [start(batch) for _ in range(count)]
        if busy:
            return sum(seconds_after_work(contender, values) for values in several) / count
        wait()
        began = clock()
        for values in several:
            contender.run(values)
        wait()
        return (clock() - began) / count

    def seconds_after_work(contender: Runs, values: Values) -> float:
        matrix @ matrix
        began = clock()
        contender.run(values)
        return clock() - began

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
