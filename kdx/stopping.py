"""The wish to stop, as a person or a cluster utters it, and what comes of it."""

from __future__ import annotations

import signal
from types import FrameType

from rich.console import Console

from kdx.errors import KdxError


class Stopped(KdxError):  # noqa: N818  (it is no failure)
    """A run was asked to stop; it has saved its state and goes on when it is started again."""


class Stopper:
    """Turns the first SIGINT or SIGTERM within its block into a wish to stop; a second one ends the process."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._asked = False

    def __call__(self) -> bool:
        return self._asked

    def __enter__(self) -> Stopper:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        text = "stopping after this update, or this batch of a cache; once more stops at once"
        self._console.print(text, style="yellow")
