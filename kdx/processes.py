"""Units of a study in several processes of one machine, each with its share of the CPU and a GPU of its own."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import StringIO
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch
from rich.console import Console

from kdx.errors import ConfigError, KdxError
from kdx.executors import Finding, Found, Unit, carry_out_unit
from kdx.runs import Stopped
from kdx.stopping import Stopper

TRIES = 2
"""How often a unit is begun when its process dies."""
PATIENCE = 0.5
"""Seconds between two looks at whether the study is to stop."""


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
    """Carries out units in up to `jobs` processes at once. A unit whose process dies is begun once more."""

    def __init__(self, jobs: int) -> None:
        if jobs < 1:
            raise ConfigError(f"--jobs: found {jobs}, expected 1 or more")
        self._jobs = jobs
        self._threads = max(1, (os.cpu_count() or 1) // jobs)
        self._gpus = torch.cuda.device_count()
        self._context = multiprocessing.get_context("spawn")

    def __call__(self, units: Sequence[Unit], found: Found, stop: Callable[[], bool]) -> None:
        waiting = [(unit, 1) for unit in reversed(units)]
        slots = [*range(self._jobs)]
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
        gpu = slot % self._gpus if self._gpus else None
        process = self._context.Process(target=_work, args=(unit, theirs, self._threads, gpu), daemon=True)
        process.start()
        theirs.close()  # so that the line ends when the process does
        return _Work(unit, tries, process, mine, slot, set(unit.configs))

    def _hear(self, work: _Work, found: Found) -> bool:
        """Whether the line of a process goes on."""
        try:
            finding: Finding = work.line.recv()
        except EOFError:
            work.process.join()
            work.line.close()
            return False
        work.left.discard(finding.place)
        found(finding)
        return True

    def _after(self, work: _Work, found: Found, waiting: list[tuple[Unit, int]]) -> None:
        """Begin what a dead process left once more, or tell that it failed."""
        if not work.left:
            return
        rest = {place: config for place, config in work.unit.configs.items() if place in work.left}
        if work.tries < TRIES:
            waiting.append((Unit(rest, work.unit.fresh, work.unit.trained), work.tries + 1))
            return
        for place in sorted(rest):
            code = work.process.exitcode
            found(Finding(place, "", f"its process died {work.tries} times, at last with exit code {code}"))


def _work(unit: Unit, line: Connection, threads: int, gpu: int | None) -> None:
    """What a worker does; the end of the process ends the line."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    torch.set_num_threads(threads)
    with Stopper(Console(file=StringIO())) as stop:
        try:
            carry_out_unit(unit, stop, line.send)
        except Stopped:
            return
        except KdxError as error:
            for place in unit.configs:
                line.send(Finding(place, "", str(error)))
