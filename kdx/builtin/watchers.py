"""Watchers of a run: `metrics.jsonl`, TensorBoard events, and the progress line.

The numbers of an update stay on the device and are read in one transfer every `EVERY` updates, at an evaluation and at
the end, so watching makes the host wait rarely.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from rich import progress as bars
from rich.console import Console
from torch import Tensor

from kdx.components import hookimpl
from kdx.errors import CheckpointError
from kdx.formats import number, percent
from kdx.history import FILE, EvalLine, StepLine, cut, to_line
from kdx.types import Clock, EvalReport, RunInfo, StepReport

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

EVERY = 50
REFRESH_SECONDS = 0.5


class JsonLines:
    """Writes `metrics.jsonl` into the folder of the run."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._buffer = _Buffer()
        self._file: BinaryIO | None = None
        self._sum = hashlib.sha256()
        self._expected: str | None = None

    def take_up(self, checksum: str) -> None:
        """Before the start of a run that goes on: what `flush` gave when its state was saved."""
        self._expected = checksum

    @hookimpl
    def kdx_run_start(self, run: RunInfo) -> None:
        if run.resumed_at and self.path.exists():
            cut(self.path, run.resumed_at)
            self._sum.update(self.path.read_bytes())
            if self._expected not in (None, self._sum.hexdigest()):
                raise CheckpointError(
                    f"{self.path} is altered: the lines up to update {run.resumed_at} are not those that were saved "
                    f"with it; delete this file to go on without its history, or start the run afresh"
                )
        self._file = self.path.open("ab" if run.resumed_at else "wb")

    @hookimpl
    def kdx_step_end(self, report: StepReport) -> None:
        self._buffer.add(report)
        if self._buffer.full:
            self._write(*self._buffer.drain())

    @hookimpl
    def kdx_eval_end(self, report: EvalReport) -> None:
        line = EvalLine(
            report.clock.step, _epoch(report.clock), report.split, report.who, dict(report.metrics), report.best
        )
        self._write(*self._buffer.drain(), line)

    @hookimpl
    def kdx_run_end(self, run: RunInfo) -> None:
        if self._file is not None:
            self.flush()
            self._file.close()
            self._file = None

    def flush(self) -> str:
        """Bring every line so far onto the disk, and give their checksum. A checkpoint saved after this can be resumed
        without a gap.
        """
        if self._file is not None:
            self._write(*self._buffer.drain())
            with self._given_up():
                self._file.flush()
                os.fsync(self._file.fileno())
        return self._sum.hexdigest()

    def _write(self, *lines: StepLine | EvalLine) -> None:
        if self._file is None:
            raise RuntimeError(f"{self.path}: written to before kdx_run_start or after kdx_run_end")
        text = "".join(map(to_line, lines)).encode()
        with self._given_up():
            self._file.write(text)
        self._sum.update(text)

    @contextmanager
    def _given_up(self) -> Iterator[None]:
        """Close the file where it cannot be written: to write what is left in its buffer would fail again."""
        try:
            yield
        except OSError:
            if self._file is not None:
                with suppress(OSError):
                    self._file.close()
                self._file = None
            raise


class TensorBoard:
    """Writes scalars for TensorBoard into `events/` in the folder of the run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "events"
        self._buffer = _Buffer()
        self._begun: RunInfo | None = None
        self._writer: SummaryWriter | None = None

    @hookimpl
    def kdx_run_start(self, run: RunInfo) -> None:
        self._begun = run

    @hookimpl
    def kdx_step_end(self, report: StepReport) -> None:
        self._buffer.add(report)
        if self._buffer.full:
            self._write_steps()

    @hookimpl
    def kdx_eval_end(self, report: EvalReport) -> None:
        self._write_steps()
        where = report.split if report.who == "student" else f"{report.split}/{report.who}"
        for name, value in report.metrics.items():
            self._scalar(f"{where}/{name}", value, report.clock.step)

    @hookimpl
    def kdx_run_end(self, run: RunInfo) -> None:
        if self._begun is not None:
            self._write_steps()
            self._begun = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write_steps(self) -> None:
        for line in self._buffer.drain():
            for name, value in line.terms.items():
                self._scalar(f"terms/{name}", value, line.step)
            for name, value in line.knobs.items():
                self._scalar(f"knobs/{name}", value, line.step)
            for name, value in line.shown.items():
                self._scalar(f"shown/{name}", value, line.step)
            self._scalar("train/lr", line.lr, line.step)

    def _scalar(self, tag: str, value: float, step: int) -> None:
        if self._begun is None:
            raise RuntimeError(f"{self.folder}: written to before kdx_run_start or after kdx_run_end")
        if self._writer is None:
            self._writer = _open_writer(self.folder, self._begun)
        self._writer.add_scalar(tag, value, step)


def _open_writer(folder: Path, run: RunInfo) -> SummaryWriter:
    """A writer that takes back what an earlier process wrote of updates that are made again."""
    from torch.utils.tensorboard import SummaryWriter  # only a run that has come to a number should pay its loading

    _spare_traceback_of_writer()
    return SummaryWriter(str(folder), purge_step=run.resumed_at + 1 if run.resumed_at else 0)


@functools.cache
def _spare_traceback_of_writer() -> None:
    """Print no traceback of the thread that writes events: its error comes up in the run, at the next number."""
    before = threading.excepthook

    def hook(error: threading.ExceptHookArgs) -> None:
        if not (isinstance(error.exc_value, OSError) and type(error.thread).__module__.startswith("tensorboard.")):
            before(error)

    threading.excepthook = hook


class Progress:
    """Shows how a run goes: a live line on a terminal, elsewhere one plain line per evaluation, nothing if quiet."""

    def __init__(self, console: Console, label: str, quiet: bool) -> None:
        self.console = console
        self.label = label
        self.quiet = quiet
        self._bar: bars.Progress | None = None
        self._task = bars.TaskID(0)
        self._total: Tensor | None = None
        self._totals = 0
        self._samples = 0
        self._loss = ""
        self._score = ""
        self._since = (0.0, 0)
        self._shown = 0.0
        self._loss_shown = 0.0

    @hookimpl
    def kdx_run_start(self, run: RunInfo) -> None:
        self._since = (time.perf_counter(), run.resumed_at)
        if self.quiet or not self.console.is_terminal:
            return
        self._bar = bars.Progress(
            bars.TextColumn("[bold]{task.description}"),
            bars.BarColumn(bar_width=None),
            bars.TextColumn("epoch {task.fields[epoch]}"),
            bars.TextColumn("{task.fields[rate]}", style="progress.data.speed"),
            bars.TimeRemainingColumn(),
            bars.TextColumn("{task.fields[loss]}"),
            bars.TextColumn("{task.fields[score]}", style="green"),
            console=self.console,
            expand=True,
        )
        clock = Clock(run.resumed_at, run.steps_per_epoch, run.steps)
        self._task = self._bar.add_task(
            self.label, total=run.steps, completed=run.resumed_at, epoch=_epoch_of(clock), rate="", loss="", score=""
        )
        self._bar.start()

    @hookimpl
    def kdx_step_end(self, report: StepReport) -> None:
        if self.quiet:
            return
        self._samples = report.samples
        if (total := report.terms.get("total")) is not None:
            # Added up on the device: only `_read_loss` makes the host wait.
            self._total = total.detach() if self._total is None else self._total + total.detach()
            self._totals += 1
        now = time.perf_counter()
        if report.clock.step % EVERY == 0 and now - self._loss_shown >= REFRESH_SECONDS:
            self._loss_shown = now
            self._read_loss()
        if self._bar is not None and (now - self._shown >= REFRESH_SECONDS or report.clock.step == report.clock.steps):
            self._shown = now
            self._show(report.clock, now)

    @hookimpl
    def kdx_eval_end(self, report: EvalReport) -> None:
        if self.quiet or report.split == "train":  # which is no score
            return
        self._read_loss()
        score = _score(report)
        if report.who == "student" and report.split == "val":
            self._score = score
        now = time.perf_counter()
        if self._bar is not None:
            self._show(report.clock, now)
        else:
            parts = [f"{self.label}: epoch {_epoch_of(report.clock)}", score, self._loss, "best" if report.best else ""]
            self.console.print(", ".join(filter(None, parts)), markup=False, highlight=False, soft_wrap=True)
        self._since = (now, report.clock.step)  # so that the time of an evaluation does not slow the updates per second

    @hookimpl
    def kdx_run_end(self, run: RunInfo) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _read_loss(self) -> None:
        if self._total is not None:
            self._loss = f"loss {number(float(self._total) / self._totals)}"
            self._total, self._totals = None, 0

    def _show(self, clock: Clock, now: float) -> None:
        assert self._bar is not None
        start, step = self._since
        fields = {"epoch": _epoch_of(clock), "loss": self._loss, "score": self._score}
        if clock.step > step and now > start:
            rate = (clock.step - step) / (now - start)
            wide = self.console.width >= 110
            fields["rate"] = f"{rate:.3g} updates/s" + (f" ({rate * self._samples:,.0f} samples/s)" if wide else "")
        self._bar.update(self._task, completed=clock.step, **fields)  # type: ignore[arg-type]


class _Buffer:
    """Updates whose numbers are still on the device."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Clock, float, tuple[tuple[str, ...], ...]]] = []
        self._values: list[Tensor] = []

    @property
    def full(self) -> bool:
        return len(self._waiting) >= EVERY

    def add(self, report: StepReport) -> None:
        groups = (report.terms, report.knobs, report.shown)
        self._waiting.append((report.clock, report.lr, tuple(map(tuple, groups))))
        values = [value for group in groups for value in group.values()]
        if values:
            # Copied now, without waiting: the next update may write into the same memory.
            self._values.append(torch.stack([value.detach().float().reshape(()) for value in values]))

    def drain(self) -> list[StepLine]:
        """The lines of all waiting updates, in one transfer from the device."""
        numbers = iter(torch.cat(self._values).tolist() if self._values else ())
        lines = [
            StepLine(clock.step, _epoch(clock), lr, *({name: next(numbers) for name in names} for names in groups))
            for clock, lr, groups in self._waiting
        ]
        self._waiting.clear()
        self._values.clear()
        return lines


def _epoch(clock: Clock) -> int:
    """The epoch of the last finished update, counted from 1; 0 before the first one."""
    return math.ceil(clock.step / clock.steps_per_epoch)


def _epoch_of(clock: Clock) -> str:
    return f"{_epoch(clock)}/{math.ceil(clock.epochs)}"


def _score(report: EvalReport) -> str:
    who = "" if report.who == "student" else f"{report.who} "
    name = "accuracy" if "accuracy" in report.metrics else next(iter(report.metrics), "")
    value = report.metrics.get(name)
    shown = percent(value) if name == "accuracy" else number(value)
    return f"{who}{report.split} {name} {shown}" if name else f"{who}{report.split}"
