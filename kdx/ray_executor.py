"""Units of a study as tasks of a Ray cluster whose machines share the folder of runs."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from io import StringIO
from typing import Any

from rich.console import Console

from kdx.errors import ConfigError, KdxError
from kdx.executors import Finding, Found, Unit, carry_out_unit
from kdx.runs import Stopped
from kdx.stopping import Stopper

TRIES = 2
"""How often a unit is begun when its worker dies."""
PATIENCE = 1.0
"""Seconds between two looks at whether the study is to stop."""


class Ray:
    """Carries out units on the cluster that the environment names (`RAY_ADDRESS`), or on a local one.

    A unit takes `cpus` and `gpus` of a machine. A unit whose worker dies is begun once more, where its runs go on.
    Relative paths are those of the folder that the command was started in, which all machines have to share.
    """

    def __init__(self, cpus: float = 1.0, gpus: float = 0.0) -> None:
        try:
            self._ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise KdxError("--executor ray: Ray is not installed; pip install 'kdx[ray]'") from error
        for flag, value in (("--cpus", cpus), ("--gpus", gpus)):
            if not value >= 0:
                raise ConfigError(f"{flag}: found {value}, expected 0 or more")
        self._cpus = cpus
        self._gpus = gpus

    def __call__(self, units: Sequence[Unit], found: Found, stop: Callable[[], bool]) -> None:
        ray = self._ray
        if not ray.is_initialized():
            ray.init(logging_level="ERROR", log_to_driver=False)
        self._check_resources()
        task = ray.remote(num_cpus=self._cpus, num_gpus=self._gpus, max_retries=TRIES - 1)(_findings)
        waiting = {task.remote(unit, self._cpus, os.getcwd()): unit for unit in units}
        stopped = False
        while waiting:
            ready, _ = ray.wait([*waiting], timeout=PATIENCE)
            for one in ready:
                self._tell(one, waiting.pop(one), found, stopped)
            if stop() and not stopped:
                stopped = True
                for one in waiting:
                    ray.cancel(one)  # which a worker takes as a wish to stop, and saves
        if stopped:
            raise Stopped("the study was stopped; start it again to go on")

    def _check_resources(self) -> None:
        """Refuse what no machine of the cluster has: Ray would wait for it for ever."""
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if not any(one.get("CPU", 0) >= self._cpus and one.get("GPU", 0) >= self._gpus for one in machines):
            has = "; ".join(f"{one.get('CPU', 0):g} CPUs and {one.get('GPU', 0):g} GPUs" for one in machines)
            raise ConfigError(f"--cpus {self._cpus:g} --gpus {self._gpus:g}: no machine has them (there are: {has})")

    def _tell(self, one: Any, unit: Unit, found: Found, stopped: bool) -> None:
        try:
            findings: list[Finding] = self._ray.get(one)
        except self._ray.exceptions.RayError as error:
            if stopped:
                return
            if isinstance(error, self._ray.exceptions.RayTaskError):
                reason = str(error.cause)
            else:
                reason = f"its worker died {TRIES} times: {type(error).__name__}"
            findings = [Finding(place, "", reason) for place in unit.configs]
        for finding in findings:
            found(finding)


def _findings(unit: Unit, cpus: float, folder: str) -> list[Finding]:
    """What a worker does; a unit that is stopped gives what it had found until then."""
    import torch

    try:
        os.chdir(folder)
    except OSError as error:
        raise KdxError(f"{folder}: a machine of the cluster does not see this folder ({error.strerror})") from error
    torch.set_num_threads(max(1, int(cpus)))
    findings: list[Finding] = []
    with Stopper(Console(file=StringIO())) as stop:
        try:
            carry_out_unit(unit, stop, findings.append)
        except Stopped:
            return findings
    return findings
