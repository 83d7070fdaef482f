"""What a study of eight variants costs side by side, against the same variants one after another.

    python benchmarks/fanout.py

Prints, for a study in which the teacher is most of the work and for one in which the student is, the seconds of one
update of all variants either way, and their ratio beside the bound `(T + 8 S) / (8 (T + S))` for a teacher pass of T
seconds and a student's update of S. Both ways are measured in turns within one process; what is shown are medians with
quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from kdx.config import load_mapping
from kdx.fanout import Shared
from kdx.loop import Session, Watchers, make_session, training
from kdx.runs import Options, build_plan, prepare
from kdx.runtime import Runtime

VARIANTS = 8
LARGE = {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 112], "stem_width": 8, "output_stride": 8}
SMALL = {"layers": [1, 1, 1, 1], "channels": [4, 6, 8, 8], "stem_width": 4, "output_stride": 16}
CASES = {"teacher-heavy": (LARGE, SMALL), "student-heavy": (SMALL, LARGE)}


def session(teacher: dict[str, Any], student: dict[str, Any], temperature: float, folder: Path, steps: int) -> Session:
    """A run that is ready to train."""
    config = {
        "name": "variant",
        "out": str(folder),
        "baseline": False,
        "data": {"use": "fashion_mnist", "augment": {"flip": {}, "shift": {"pixels": 1}}},
        "student": {"use": "timm", "model": "resnet10t", "args": student},
        "teachers": {"cnn": {"use": "timm", "model": "resnet10t", "args": teacher}},
        "losses": {"ce": {"use": "cross_entropy"}, "kd": {"use": "kd", "temperature": temperature}},
        "train": {"updates": steps, "batch": 128, "lr": 0.01, "optimizer": {"use": "adamw"}},
    }
    prepared = prepare(load_mapping(config), Options(quiet=True))
    runtime = Runtime(prepared.spec.runtime)
    plan = build_plan(prepared, Options(quiet=True), trained=False, device=runtime.device)
    return make_session(prepared.spec, plan, prepared.dataset, prepared.splits, runtime)


def ready(sessions: list[Session]) -> list[Iterator[None]]:
    """The sessions at the pause before their first update."""

    def ignore(_: Any) -> None:
        pass

    found = [training(one, Watchers(ignore, ignore, ignore, ignore)) for one in sessions]
    for steps in found:
        next(steps)
    return found


def seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(teacher: dict[str, Any], student: dict[str, Any], rounds: int, folder: Path) -> dict[str, list[float]]:
    """Seconds of an update of all variants `apart` and `together`, of a teacher's pass and of a whole single update."""
    steps = rounds + 4
    temperatures = [1.0 + i for i in range(VARIANTS)]
    apart = [session(teacher, student, tau, folder, steps) for tau in temperatures]
    together = [session(teacher, student, tau, folder, steps) for tau in temperatures]
    single = session(teacher, student, 4.0, folder, steps)
    shared = Shared()
    for one in together:
        shared.join(one)
    ways = {"apart": ready(apart), "together": ready(together), "single": ready([single])}
    found: dict[str, list[float]] = {name: [] for name in (*ways, "teacher")}

    def update(runs: list[Iterator[None]]) -> None:
        for steps in runs:
            next(steps)

    def teach() -> None:
        batch = single.feed.at(single.step)
        with single.runtime.autocast():
            single.teachers(batch, single.knobs.at(single.clock))

    for turn in range(rounds + 2):
        taken = {name: seconds(lambda runs=runs: update(runs)) for name, runs in ways.items()}  # type: ignore[misc]
        taken["teacher"] = seconds(teach)
        if turn >= 2:  # the first ones warm up
            for name, value in taken.items():
                found[name].append(value)
    return found


def spread(values: list[float], scale: float = 1e3, digits: int = 1) -> str:
    low, middle, high = (f"{scale * value:.{digits}f}" for value in statistics.quantiles(values, n=4))
    return f"{middle} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="measured updates of each way")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = Table(title=f"{VARIANTS} variants, {options.threads} threads, torch {torch.__version__}, ms per update")
    for head in ("case", "apart", "together", "ratio", "bound"):
        table.add_column(head, justify="left" if head == "case" else "right")
    with tempfile.TemporaryDirectory() as folder:
        for name, (teacher, student) in CASES.items():
            found = measure(teacher, student, options.rounds, Path(folder))
            whole, taught = (statistics.median(found[key]) for key in ("single", "teacher"))
            learnt = whole - taught
            bound = (taught + VARIANTS * learnt) / (VARIANTS * whole)
            ratios = [a / b for a, b in zip(found["together"], found["apart"], strict=True)]
            table.add_row(
                name, spread(found["apart"]), spread(found["together"]), spread(ratios, 1, 2),
                f"{bound:.2f}",
            )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
