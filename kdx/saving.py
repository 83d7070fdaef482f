"""What a run keeps on the disk while it trains: its state, the best student so far, and the lines of its metrics.

last.pt, previous.pt          the state after the last save, and after the one before
best-STEP.safetensors         the student that was best, for each of the two states
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdx.builtin.watchers import JsonLines
from kdx.checkpoint import check_best, save_state, save_weights
from kdx.guard import EVERY
from kdx.loop import Session
from kdx.resume import training_state
from kdx.worked import Worked

BEST = "best-{step}.safetensors"


class Saver:
    """Saves a session in `folder`: when the loop says so, and `minutes` after the last time.

    `lines` are brought onto the disk before each state; a state remembers how far they went. No file that a state on
    the disk needs is ever written into.
    """

    def __init__(self, folder: Path, lines: JsonLines, worked: Worked, minutes: float | None) -> None:
        self.folder = folder
        self._lines = lines
        self._worked = worked
        self._seconds = None if minutes is None else 60 * minutes
        self._saved = time.monotonic()
        self._best: tuple[str, str] | None = None
        self._of_last: tuple[str, str] | None = None

    def take_up(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that was loaded. Raises `CheckpointError` where the lines before it are not there."""
        if state["best_file"] is not None:
            name, digest = state["best_file"]
            self._best = self._of_last = (name, digest)
        self._lines.take_up(state["lines"])

    def improved(self, session: Session) -> None:
        """Keep the student of a session as the best so far."""
        if session.runtime.group.leads:
            name = BEST.format(step=session.step)
            self._best = (name, save_weights(session.student.net, self.folder / name))

    def is_due(self, session: Session) -> bool:
        """Whether it is time to save within an epoch; the same on all processes."""
        group = session.runtime.group
        if self._seconds is None or (group.size > 1 and session.step % EVERY):
            return False
        return group.any([time.monotonic() - self._saved >= self._seconds])[0]

    def save(self, session: Session) -> None:
        """Save the state of a session, and remove the best students that no state on the disk is of."""
        state = training_state(session, self._worked.seconds())
        if session.runtime.group.leads:
            state["lines"] = self._lines.flush()
            state["best_file"] = None if self._best is None else [*self._best]
            save_state(self.folder, state)
            needed = {file[0] for file in (self._of_last, self._best) if file is not None}
            for path in self.folder.glob(BEST.format(step="*")):
                if path.name not in needed:
                    path.unlink()
            self._of_last = self._best
        self._saved = time.monotonic()

    def best(self, session: Session) -> Path:
        """The file of the best student. Raises `CheckpointError` unless it is as it was written."""
        assert session.best is not None
        name = BEST.format(step=session.best["step"])
        if self._best is not None and self._best[0] == name:  # another process may have written it
            check_best(self.folder, *self._best)
        return self.folder / name
