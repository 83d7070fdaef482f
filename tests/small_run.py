"""Whole runs in a second: configs made of `small_plugin.py`, and processes that can be stopped and killed."""

from __future__ import annotations

import functools
import io
import json
import multiprocessing
import os
import sys
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kdx.api import RunResult, run
from kdx.config import load_mapping, overlay, to_yaml
from kdx.loop import Session, Watchers, make_session, train
from kdx.plugins import Registry, discover
from kdx.runs import Options, Prepared, build_plan, prepare
from kdx.runtime import Runtime
from kdx.types import EvalReport, StepReport

PLUGIN = Path(__file__).parent / "small_plugin.py"
PLAIN: dict[str, Any] = {
    "name": "small",
    "plugins": [str(PLUGIN)],
    "data": {"use": "halves", "validation": 12},
    "student": {"use": "small", "taps": {"mid": "second"}},
    "losses": {"ce": {"use": "cross_entropy"}},
    "train": {"updates": 6, "batch": 12, "lr": 0.05},
    "runtime": {"device": "cpu", "precision": "fp32"},
    "baseline": False,
}
"""A student that learns from labels, three updates an epoch."""
DISTIL = overlay(
    PLAIN,
    {
        "name": "distilled",
        "teachers": {"wide": {"use": "small", "width": 8, "taps": {"mid": "second"}}},
        "align": {"mid": {"use": "conv1x1", "source": "student.mid", "like": "wide.mid"}},
        "losses": {
            "kd": {"use": "kd", "temperature": 2.0, "weight": {"use": "linear", "start": 1.0, "end": 0.0}},
            "hint": {"use": "mse", "inputs": {"student": "mid", "teacher": "wide.mid"}, "weight": 0.5},
        },
    },
)
"""The same student with a teacher that has its first weights, an aligner and a schedule."""
TEACHER = overlay(PLAIN, {"name": "wide", "student": {"width": 8}, "train": {"updates": 3}})
CASCADE = overlay(
    overlay(DISTIL, {"teachers": None}),
    {"teachers": {"wide": {"run": TEACHER, "taps": {"mid": "second"}}}, "baseline": True},
)
"""The same student of a teacher that is a run, and a plain student."""
STATEFUL = overlay(
    DISTIL,
    {
        "name": "stateful",
        "student": {"dropout": 0.2},
        "losses": {"own": {"use": "stateful", "noise": {"use": "cosine", "peak": 0.3}}},
        "train": {"accumulate": 2, "ema": 0.9, "lr": {"use": "cosine", "peak": 0.1, "warmup": 1}},
    },
)
"""Everything that a checkpoint must hold: dropout, accumulation, an average, schedules, a loss with state."""


def dying(mark: Path, always: bool = False) -> dict[str, Any]:
    """A layer that gives a config the loss of `dying_plugin.py`, which ends its process."""
    loss = {"use": "dying", "mark": str(mark), "always": always}
    return {"plugins": [*PLAIN["plugins"], str(PLUGIN.with_name("dying_plugin.py"))], "losses": {"die": loss}}


@functools.cache
def registry() -> Registry:
    return discover([str(PLUGIN)])


def config_of(*layers: Mapping[str, Any]) -> dict[str, Any]:
    return functools.reduce(overlay, layers)


def prepared(*layers: Mapping[str, Any], options: Options | None = None) -> Prepared:
    return prepare(load_mapping(config_of(*layers)), options or quiet(), registry=registry())


def quiet(**options: Any) -> Options:
    return Options(quiet=True, console=Console(file=io.StringIO()), **options)


def session_of(*layers: Mapping[str, Any]) -> Session:
    """A session that is ready to train, without a folder."""
    found = prepared(*layers)
    plan = build_plan(found, quiet(), trained=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make_session(found.spec, plan, found.dataset, found.splits, Runtime(found.spec.runtime))


class Seen:
    """Trains a session and keeps what its watchers were told."""

    def __init__(self, session: Session) -> None:
        self.steps: list[StepReport] = []
        self.evals: list[EvalReport] = []
        self.improved: list[int] = []
        self.saved: list[int] = []
        watchers = Watchers(
            self.steps.append,
            self.evals.append,
            lambda session: self.improved.append(session.step),
            lambda session: self.saved.append(session.step),
        )
        train(session, watchers)


def run_in(folder: Path, *layers: Mapping[str, Any], **arguments: Any) -> RunResult:
    """The result of a config in a folder of runs."""
    return run(config_of(*layers, {"out": str(folder)}), quiet=True, **arguments)


def write_config(path: Path, *layers: Mapping[str, Any]) -> Path:
    path.write_text(to_yaml(config_of(*layers)))
    return path


def weights_of(run_folder: Path) -> dict[str, torch.Tensor]:
    from kdx.checkpoint import read_weights

    return read_weights(run_folder / "student.safetensors")


def lines_of(run_folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def folders(runs: Path) -> list[str]:
    """The run folders, without their hashes."""
    return sorted(path.name.rpartition("-")[0] for path in runs.iterdir() if path.is_dir()) if runs.exists() else []


class Command:
    """`kdx` in a process of its own, which starts at once because a server has imported everything."""

    def __init__(self, *arguments: str, folder: Path) -> None:
        self.output = folder / "output.txt"
        self.process: BaseProcess = server().Process(target=_command, args=(arguments, str(folder)))
        self.process.start()

    def wait(self, seconds: float = 60) -> int | None:
        self.process.join(seconds)
        return self.process.exitcode


@functools.cache
def server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["small_run", "timm", "torchmetrics.classification", "matplotlib.pyplot", "kdx.cli"])
    return context


def _command(arguments: tuple[str, ...], folder: str) -> None:
    from kdx.cli import main

    torch.set_num_threads(1)
    os.chdir(folder)
    with open("output.txt", "w", buffering=1) as file:
        sys.stdout = sys.stderr = file
        sys.exit(main(arguments))
