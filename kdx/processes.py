"""Units of a study in several processes of one machine, each with its share of the CPU and a GPU of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import StringIO, TextIOBase
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import IO, TYPE_CHECKING, cast

import torch
from rich.console import Console

from kdx.errors import ConfigError, KdxError
from kdx.executors import Finding, Found, Unit, carry_out_unit
from kdx.runs import Stopped
from kdx.stopping import Stopper

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext

TRIES = 2
"""How often a unit is begun when its process dies."""
PATIENCE = 0.5
"""Seconds between two looks at whether the study is to stop."""


@dataclass(frozen=True)
class Share:
    """What one of several processes has of the machine: threads of the CPU, and a GPU as CUDA is to see it."""

    threads: int
    gpu: str | None

    def take(self) -> None:
        """Make it the share of this process, which must not have touched CUDA yet."""
        if self.gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpu
        torch.set_num_threads(self.threads)


def shares(jobs: int) -> list[Share]:
    """The shares of `jobs` processes; they take the GPUs in turn. Raises `ConfigError` for no jobs."""
    if jobs < 1:
        raise ConfigError(f"--jobs: found {jobs}, expected 1 or more")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    count = torch.cuda.device_count()
    gpus = visible[:count] if len(visible) >= count and visible[0] else [*map(str, range(count))]
    return [Share(max(1, cores // jobs), gpus[place % count] if count else None) for place in range(jobs)]


def fresh_processes() -> SpawnContext | ForkServerContext:
    """What makes processes that share nothing with this one, CUDA above all. Where the system can, they are copies of
    one that has imported everything, so that a short trial does not wait for that.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "timm", "torchmetrics.classification", "matplotlib.pyplot"])
    return context


@contextmanager
def spared() -> Iterator[None]:
    """Processes that are started within the block never see a Ctrl-C, which a terminal sends to all of them: theirs is
    the SIGTERM that whoever started them sends, and two signals would end them before they have saved.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def orphaned() -> bool:
    """Whether the process that started this one is gone."""
    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()


@dataclass
class _Work:
    """A unit in a process; `left` are the places that it has not told of yet."""

    unit: Unit
    tries: int
    process: BaseProcess
    line: Connection
    slot: int
    left: set[int] = field(default_factory=set)


class Processes:
    """Carries out units in up to `jobs` processes at once.

    What a dead process leaves of its unit is begun once more, each trial by itself: the one that killed it must not
    take the others along. `say` gets the lines that the processes write, with the number of the process before each.
    """

    def __init__(self, jobs: int, say: Callable[[str], None] | None = None) -> None:
        self._shares = shares(jobs)
        self._say = say
        self._context = fresh_processes()

    def __call__(self, units: Sequence[Unit], found: Found, stop: Callable[[], bool]) -> None:
        waiting = [(unit, 1) for unit in reversed(units)]
        slots = [*range(len(self._shares))]
        at_work: list[_Work] = []
        stopped = False
        try:
            while at_work or (waiting and not stopped):
                while waiting and slots and not stopped:
                    at_work.append(self._begin(*waiting.pop(), slots.pop(0)))
                if stop() and not stopped:
                    stopped = True
                    for work in at_work:
                        work.process.terminate()
                for ready in wait([work.line for work in at_work], PATIENCE):
                    work = next(one for one in at_work if one.line is ready)
                    if self._hear(work, found):
                        continue
                    at_work.remove(work)
                    slots.append(work.slot)
                    if not stopped:
                        self._after(work, found, waiting)
        finally:
            for work in at_work:
                work.process.kill()
        if stopped:
            raise Stopped("the study was stopped; start it again to go on")

    def _begin(self, unit: Unit, tries: int, slot: int) -> _Work:
        mine, theirs = self._context.Pipe(duplex=False)
        arguments = (unit, theirs, self._shares[slot], self._say is None)
        process = self._context.Process(target=_work, args=arguments)  # no daemon, which could have no data workers
        with spared():
            process.start()
        theirs.close()  # so that the line ends when the process does
        return _Work(unit, tries, process, mine, slot, set(unit.configs))

    def _hear(self, work: _Work, found: Found) -> bool:
        """Whether the line of a process goes on."""
        try:
            finding: Finding | str = work.line.recv()
        except (EOFError, OSError):
            work.process.join()
            work.line.close()
            return False
        if isinstance(finding, str):
            if self._say is not None:
                self._say(f"[{work.slot + 1}] {finding}")
            return True
        work.left.discard(finding.place)
        found(finding)
        return True

    def _after(self, work: _Work, found: Found, waiting: list[tuple[Unit, int]]) -> None:
        """Begin what a dead process left once more, or tell that it failed."""
        if not work.left:
            return
        rest = {place: config for place, config in work.unit.configs.items() if place in work.left}
        if work.tries < TRIES:
            again = [Unit({place: config}, work.unit.fresh, work.unit.command) for place, config in rest.items()]
            waiting += [(unit, work.tries + 1) for unit in reversed(again)]
            return
        for place in sorted(rest):
            code = work.process.exitcode
            found(Finding(place, "", f"its process died {work.tries} times, at last with exit code {code}"))


class _Lines(TextIOBase):
    """A file whose lines go down a pipe."""

    def __init__(self, line: Connection) -> None:
        self._line = line
        self._rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._line.send(line)
        return len(text)


def _work(unit: Unit, line: Connection, share: Share, quiet: bool) -> None:
    """What a worker does; the end of the process ends the line."""
    share.take()
    console = None if quiet else Console(file=cast("IO[str]", _Lines(line)), width=10_000)
    with Stopper(Console(file=StringIO())) as asked:
        try:
            carry_out_unit(unit, lambda: asked() or orphaned(), line.send, console)
        except Stopped:
            return
        except KdxError as error:
            for place in unit.configs:
                line.send(Finding(place, "", str(error)))
