"""The lock of a run's folder: one run at a time works in it, with all of its processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import filelock
from rich.console import Console

from kdx.distributed import the_group
from kdx.errors import KdxError
from kdx.stopping import Stopped

PATIENCE = 0.5
"""Seconds after which one that waits looks whether it was asked to stop."""


@contextmanager
def locked(folder: Path, console: Console, stop: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Hold the lock of a run's folder; it is let go when the process ends, however it ends.

    Of several processes the first holds it for all. Raises `Stopped` when it is asked to stop while it waits.
    """
    group = the_group()
    with ExitStack() as held:
        with group.in_turn():
            if group.leads:
                held.callback(_acquire(folder, console, stop).release)
        yield


def wait_for(lock: filelock.BaseFileLock, stop: Callable[[], bool], stopped: str) -> None:
    """Acquire a lock that another process holds. Raises `Stopped` with a message when it is asked to stop meanwhile."""
    while not lock.is_locked:
        if stop():
            raise Stopped(stopped)
        with suppress(filelock.Timeout):
            lock.acquire(timeout=PATIENCE)


def _acquire(folder: Path, console: Console, stop: Callable[[], bool]) -> filelock.BaseFileLock:
    lock = filelock.FileLock(folder.parent / f".{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        console.print(f"{folder.name}: another process works on it; waiting", markup=False, highlight=False)
        wait_for(lock, stop, f"{folder.name}: stopped while another process works on it")
    except OSError as error:
        raise KdxError(f"out: nothing can be written into {folder.parent}: {error.strerror or error}") from error
    return lock
