"""What an update costs with stored answers of a teacher, against the same update of the student alone.

    python benchmarks/cache.py

Prints, for three students, the seconds of an update with cached logits, with one cached feature map too, with four
cached teachers, and with the live teacher, each divided by that of the student alone, which has a loss of the same cost
in place of the teacher's; and the seconds that filling a cache takes for each batch divided by those of an update with
the live teacher. All are measured in turns within one process; what is shown are medians with quartiles.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from kdx.config import load_mapping
from kdx.loop import Session, Watchers, make_session, training
from kdx.runs import Options, Prepared, build_plan, fill_caches, prepare
from kdx.runtime import Runtime

ARGS = {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 112], "stem_width": 8, "output_stride": 8}
TEACHER = {"use": "timm", "model": "resnet10t", "args": ARGS}
STUDENTS: dict[str, dict[str, Any]] = {
    "resnet": {
        "use": "timm",
        "model": "resnet18",
        "args": {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 24], "stem_type": "deep", "stem_width": 4,
                 "output_stride": 16},
    },
    "convnet": {
        "use": "timm",
        "model": "resnet10t",
        "args": {"layers": [1, 1, 1, 1], "channels": [4, 6, 8, 8], "stem_width": 4, "output_stride": 16},
    },
    "MLP": {
        "use": "timm",
        "model": "mlp_mixer.MlpMixer",
        "args": {"img_size": 28, "patch_size": 14, "num_blocks": 1, "embed_dim": 32},
    },
}  # fmt: skip
CASES = ("alone", "logits", "map", "four", "live")


def config_of(student: dict[str, Any], case: str, folder: Path, steps: int) -> dict[str, Any]:
    """The config of a case. Alone, the student's logits stand in for the teacher's, which cost nothing to have."""
    names = ("a", "b", "c", "d") if case == "four" else ("a",)
    cache = {} if case == "live" else {"cache": {"where": str(folder / "caches")}}
    teachers = {name: {**TEACHER, **cache} for name in names}
    losses: dict[str, Any] = {"ce": {"use": "cross_entropy"}, "kd": {"use": "kd", "temperature": 2.0}}
    config: dict[str, Any] = {"targets": {}, "teachers": teachers}
    if case == "alone":
        config = {}
        losses["kd"]["inputs"] = {"teacher": "student.logits"}
    if case == "four":
        config["targets"] = {"all": {"use": "mean"}}
        losses["kd"]["inputs"] = {"teacher": "all.logits"}
    if case == "map":
        taps = {"mid": 1}
        config["teachers"]["a"] |= {"taps": taps}
        losses["hint"] = {"use": "mse", "inputs": {"student": "mid", "teacher": "a.mid"}}
        config["align"] = {"mid": {"source": "student.features", "like": "a.mid"}}
    return {
        "name": case, "out": str(folder), "baseline": False, "data": {"use": "fashion_mnist"}, "student": student,
        **config, "losses": losses, "train": {"updates": steps, "batch": 128, "lr": 0.01},
    }  # fmt: skip


def prepared(student: dict[str, Any], case: str, folder: Path, steps: int) -> Prepared:
    return prepare(load_mapping(config_of(student, case, folder, steps)), Options(quiet=True))


def session(found: Prepared) -> Session:
    """A run that is ready to train, its caches filled."""
    runtime = Runtime(found.spec.runtime)
    fill_caches(found, Options(quiet=True), runtime)
    plan = build_plan(found, Options(quiet=True), trained=True, device=runtime.device)
    return make_session(found.spec, plan, found.dataset, found.splits, runtime)


def updates(one: Session) -> Iterator[None]:
    def ignore(_: Any) -> None:
        pass

    steps = training(one, Watchers(ignore, ignore, ignore, ignore))
    next(steps)
    return steps


def seconds_of(steps: Iterator[None], count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        next(steps)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / count


def filling(student: dict[str, Any], folder: Path, steps: int) -> float:
    """Seconds that filling a cache of logits takes for each batch."""
    found = prepared(student, "logits", folder, steps)
    runtime = Runtime(found.spec.runtime)
    shutil.rmtree(folder / "caches", ignore_errors=True)
    began = time.perf_counter()
    fill_caches(found, Options(quiet=True), runtime)
    return (time.perf_counter() - began) / (len(found.splits.train) / found.spec.train.batch)


def measure(student: dict[str, Any], rounds: int, count: int, folder: Path) -> dict[str, list[float]]:
    """Seconds of an update, round by round, in each case, and of a batch of a filling."""
    steps = (rounds + 2) * count + 4
    ready = {case: updates(session(prepared(student, case, folder, steps))) for case in CASES}
    found: dict[str, list[float]] = {case: [] for case in (*CASES, "fill")}
    for turn in range(rounds + 1):
        taken = {case: seconds_of(run, count) for case, run in ready.items()}
        taken["fill"] = filling(student, folder / "filling", steps)
        if turn:  # the first one warms up
            for case, value in taken.items():
                found[case].append(value)
    return found


def ratio(found: dict[str, list[float]], case: str, to: str) -> str:
    values = [one / other for one, other in zip(found[case], found[to], strict=True)]
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="measured rounds of each case")
    parser.add_argument("--updates", type=int, default=10, help="updates in a round")
    parser.add_argument("--students", default=",".join(STUDENTS), help="which of resnet, convnet, MLP")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = Table(title=f"against the student alone, {options.threads} threads, torch {torch.__version__}")
    for head in ("student", "alone, ms", "logits", "logits and map", "four teachers", "live", "fill / live"):
        table.add_column(head, justify="left" if head == "student" else "right")
    for name in options.students.split(","):
        with tempfile.TemporaryDirectory() as folder:
            found = measure(STUDENTS[name], options.rounds, options.updates, Path(folder))
        alone = f"{1e3 * statistics.median(found['alone']):.1f}"
        cases = [ratio(found, case, "alone") for case in ("logits", "map", "four", "live")]
        table.add_row(name, alone, *cases, ratio(found, "fill", "live"))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
