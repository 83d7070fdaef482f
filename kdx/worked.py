"""How long a run was worked on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Worked:
    """Seconds of work on a run, without its pauses; `before` are those of earlier processes."""

    def __init__(self) -> None:
        self.before = 0.0
        self._began = time.perf_counter()

    def seconds(self) -> float:
        return self.before + time.perf_counter() - self._began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the block."""
        left = time.perf_counter()
        yield
        self._began += time.perf_counter() - left
