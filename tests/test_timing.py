"""Facts of `kdx/timing.py`: ways of computing the same are timed as they run in an update."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdx.calls import Values
from kdx.timing import ROUNDS, medians

BATCH = {"x": torch.ones(2)}


@dataclass
class Way:
    """Takes a time that a clock tells."""

    clock: Clock
    takes: float
    ran: int = 0

    def run(self, values: Values) -> None:
        self.ran += 1
        self.clock.now += self.takes


@dataclass
class Clock:
    """Goes on while a way runs, and for a second with each product of matrices."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Products(TorchDispatchMode):
    """Counts products of matrices."""

    clock: Clock
    seen: int = field(default=0)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            self.seen += 1
            self.clock.now += 1.0
        return func(*args, **(kwargs or {}))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", [1, 2])
def test_with_several_threads_those_of_torch_have_just_worked(count: int) -> None:
    torch.set_num_threads(count)
    clock = Clock()
    ways = {"quick": Way(clock, 0.002), "slow": Way(clock, 0.005)}
    with Products(clock) as products:
        found = medians(ways, BATCH, lambda: None, clock=clock)
    assert found == pytest.approx({"quick": 2.0, "slow": 5.0})  # without what was computed between the calls
    runs = sum(way.ran for way in ways.values())
    assert runs == 2 + 2 * 10 * ROUNDS
    assert products.seen == (runs if count > 1 else 0)
