"""A plugin that kills its own process at a moment named in `kill.txt`: `NAME EVENT STEP`, as in `wide step 5`.

EVENT is `step` (an update has ended), `eval` (an evaluation has ended, the state is not saved yet), or `end` (training
has ended, the result is not written yet). The order is carried out once.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import kdx

ORDER = Path("kill.txt")
runs: list[kdx.RunInfo] = []


def obey(event: str, step: int) -> None:
    if ORDER.exists() and ORDER.read_text() == f"{runs[-1].name} {event} {step}":
        ORDER.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


@kdx.hookimpl
def kdx_run_start(run: kdx.RunInfo) -> None:
    runs.append(run)


@kdx.hookimpl
def kdx_step_end(report: kdx.StepReport) -> None:
    obey("step", report.clock.step)


@kdx.hookimpl
def kdx_eval_end(report: kdx.EvalReport) -> None:
    obey("eval", report.clock.step)


@kdx.hookimpl
def kdx_run_end(run: kdx.RunInfo) -> None:
    obey("end", run.steps)
