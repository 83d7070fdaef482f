"""What an update costs with stored answers of teachers, against the same update of the student that learns from labels.

    python benchmarks/cache.py [--net mlp convnet resnet] [--rounds 60] [--batches 64] [--threads 1] [--compile] [--cpu]

For each net of `nets.py`: an update of kdx with the stored logits of one teacher, with one stored feature map too, with
four stored teachers whose mean is taken in each update, with the mean of four that is stored itself, and with the live
teacher, as parts of an update of the student alone, in the same engine; the stored mean of four as a part of one stored
teacher; and the time of filling a cache with logits, for each batch, as a part of an update with the live teacher. The
column with a map holds the aligner and the loss on the map, too, which the student alone does not have; so it is shown
as a part of `given` as well, the same losses on the same logits and maps that are streams of data in memory. All take
turns within one process, with a fixed number of threads; shown are medians of the ratios of each turn, with quartiles.
With `--compile` all updates are compiled steps. `--cpu` takes the processor's time in place of the wall clock's, for a
machine that others use as well.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from nets import NETS, Net
from step import LR, TEMPERATURE, Task, Update, in_turns, machine, make_task, other, tap

from kdx.builtin.tensor_data import TensorDataset
from kdx.config import load_mapping
from kdx.loop import Watchers, make_session, training
from kdx.runs import Options, Prepared, build_plan, fill_caches, prepare
from kdx.runtime import Runtime

CASES = ("alone", "one", "map", "given", "four", "fused", "live")
SHOWN = (
    ("one", "alone"), ("map", "alone"), ("map", "given"), ("four", "alone"), ("fused", "alone"), ("live", "alone"),
    ("fused", "one"),
)  # fmt: skip
"""The ratios of updates that are shown."""


def config_of(net: Net, case: str, folder: Path, compiled: bool) -> dict[str, Any]:
    """The config of a case."""
    names = ["a", "b", "c", "d"] if case in ("four", "fused") else [] if case in ("alone", "given") else ["a"]
    cache = {"cache": {"where": str(folder / "caches")}}
    teacher = {"use": "module", **(cache if case in ("one", "map", "four") else {})}
    losses: dict[str, Any] = {"ce": {"use": "cross_entropy"}}
    config: dict[str, Any] = {
        "student": {"use": "module", "input": "image"},
        "teachers": {name: {**teacher, "input": "image"} for name in names},
    }
    if case != "alone":
        losses["kd"] = {"use": "kd", "temperature": TEMPERATURE}
    if len(names) > 1:
        config["targets"] = {"all": {"use": "mean", "temperature": TEMPERATURE, **(cache if case == "fused" else {})}}
        losses["kd"]["inputs"] = {"teacher": "all.logits"}
    if case in ("map", "given"):
        theirs = "a.mid" if case == "map" else "batch.mid"
        for one in (config["student"], *config["teachers"].values()):
            one["taps"] = {"mid": net.tap}
        config["align"] = {"mid": {"use": net.aligner, "source": "student.mid", "like": theirs}}
        losses["hint"] = {"use": "mse", "inputs": {"student": "mid", "teacher": theirs}}
    if case == "given":
        losses["kd"]["inputs"] = {"teacher": "batch.logits"}
    return {
        "name": case, "out": str(folder), "baseline": False, "data": {"use": "tensors", "validation": 0}, **config,
        "losses": losses,
        "train": {"updates": 10**6, "batch": net.batch, "lr": LR, "optimizer": {"use": "sgd", "momentum": 0.9}},
        "runtime": {
            "device": "cpu", "threads": torch.get_num_threads(), "teacher_batching": "never", "compile": compiled,
        },
    }  # fmt: skip


def prepared(task: Task, case: str, folder: Path, *, compiled: bool = False) -> tuple[Prepared, Options]:
    """A case with its data and networks; teachers differ in their weights."""
    config = config_of(task.net, case, folder, compiled)
    nets = {"student": task.net.student()}
    for number, name in enumerate(config["teachers"]):
        nets[name] = other(task.net.teacher(), number)
    tensors = {"image": task.images, "label": task.labels}
    if case == "given":
        kept = tap(teacher := task.net.teacher().eval(), task.net.tap)
        with torch.no_grad():
            answers = [(teacher(part), kept[0]) for part in task.images.split(task.net.batch)]
        tensors |= {
            name: torch.cat(found) for name, found in zip(("logits", "mid"), zip(*answers, strict=True), strict=True)
        }
    options = Options(quiet=True, data=TensorDataset.from_tensors(tensors), networks=nets)
    return prepare(load_mapping(config), options), options


def update_of(task: Task, case: str, folder: Path, *, compiled: bool) -> Update:
    """One update of a case, its caches filled."""
    found, options = prepared(task, case, folder, compiled=compiled)
    runtime = Runtime(found.spec.runtime)
    fill_caches(found, options, runtime)
    plan = build_plan(found, options, trained=True, device=runtime.device)

    def ignore(_: Any) -> None:
        pass

    session = make_session(found.spec, plan, found.dataset, found.splits, runtime)
    steps = training(session, Watchers(ignore, ignore, ignore, ignore))
    next(steps)
    return lambda: next(steps)


def filling(task: Task, folder: Path, clock: Callable[[], float]) -> float:
    """Seconds that filling a cache of logits takes for each batch."""
    found, options = prepared(task, "one", folder)
    runtime = Runtime(found.spec.runtime)
    shutil.rmtree(folder / "caches", ignore_errors=True)
    began = clock()
    fill_caches(found, options, runtime)
    return (clock() - began) * task.net.batch / len(found.splits.train)


def shown(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", nargs="+", choices=[*NETS], default=[*NETS])
    parser.add_argument("--rounds", type=int, default=60, help="measured turns of each case")
    parser.add_argument("--batches", type=int, default=64, help="batches of samples")
    parser.add_argument("--fills", type=int, default=5, help="measured fillings")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--compile", action="store_true", help="compiled steps")
    parser.add_argument("--cpu", action="store_true", help="measure processor time")
    options = parser.parse_args()
    clock = time.process_time if options.cpu else time.perf_counter
    torch.set_num_threads(options.threads)
    print(f"parts of the other's {'processor time' if options.cpu else 'wall clock'}, median (quartiles); {machine()}")
    heads = [f"{above} / {below}" for above, below in SHOWN]
    print(f"{'net':<8} {'alone, ms':>10}", *(f"{head:>21}" for head in (*heads, "fill / live")))
    for name in options.net:
        task = make_task(NETS[name], "logits", options.batches)
        with tempfile.TemporaryDirectory() as folder:
            updates = {case: update_of(task, case, Path(folder) / case, compiled=options.compile) for case in CASES}
            found = in_turns(updates, options.rounds, clock, burst=task.net.burst)
            fills = [filling(task, Path(folder) / "filling", clock) for _ in range(options.fills + 1)][1:]
        ratios = [[a / b for a, b in zip(found[above], found[below], strict=True)] for above, below in SHOWN]
        live = statistics.median(found["live"])
        cells = (f"{shown(values):>21}" for values in (*ratios, [fill / live for fill in fills]))
        print(f"{name:<8} {1e3 * statistics.median(found['alone']):>10.2f}", *cells, flush=True)


if __name__ == "__main__":
    main()
