"""Units of a study as tasks of a Ray cluster whose machines share the folder of runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from kdx.errors import KdxError
from kdx.executors import Finding, Found, Unit, carry_out_unit
from kdx.runs import Stopped

TRIES = 2
PATIENCE = 1.0
"""Seconds between two looks at whether the study is to stop."""


class Ray:
    """Carries out units on the cluster that the environment names (`RAY_ADDRESS`), or on a local one.

    A unit takes `cpus` and `gpus` of a machine. A unit whose worker dies is begun once more, where its runs go on.
    """

    def __init__(self, cpus: float = 1.0, gpus: float = 0.0) -> None:
        try:
            self._ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise KdxError("--executor ray: Ray is not installed; pip install 'kdx[ray]'") from error
        self._cpus = cpus
        self._gpus = gpus

    def __call__(self, units: Sequence[Unit], found: Found, stop: Callable[[], bool]) -> None:
        ray = self._ray
        if not ray.is_initialized():
            ray.init(logging_level="ERROR", log_to_driver=False)
        task = ray.remote(num_cpus=self._cpus, num_gpus=self._gpus, max_retries=TRIES - 1)(_findings)
        waiting = {task.remote(unit, self._cpus): unit for unit in units}
        while waiting:
            ready, _ = ray.wait([*waiting], timeout=PATIENCE)
            for one in ready:
                self._tell(one, waiting.pop(one), found)
            if stop():
                for one in waiting:
                    ray.cancel(one)
                raise Stopped("the study was stopped; start it again to go on")

    def _tell(self, one: Any, unit: Unit, found: Found) -> None:
        try:
            findings: list[Finding] = self._ray.get(one)
        except self._ray.exceptions.RayError as error:
            reason = f"its worker died {TRIES} times: {type(error).__name__}"
            findings = [Finding(place, "", reason) for place in unit.configs]
        for finding in findings:
            found(finding)


def _findings(unit: Unit, cpus: float) -> list[Finding]:
    """What a worker does."""
    import torch

    torch.set_num_threads(max(1, int(cpus)))
    findings: list[Finding] = []
    carry_out_unit(unit, lambda: False, findings.append)
    return findings
