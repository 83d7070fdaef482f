"""Several live teachers: their calls in every way for four of each net of `nets.py`, as a part of four calls by hand,
and then the time of an update and peak memory with 1, 2, 4 and 8 of them, one after another and as one batched call.

    python benchmarks/teachers.py [--device cuda] [--nets mlp,convnet,resnet] [--counts 1,2,4,8] [--skip compile]
        [--channels 16,32,64,128] [--batch 64] [--rounds 7] [--clock processor]

All ways take turns, with a fixed number of threads; the tables give medians. By hand the four nets are modules of
PyTorch that are called one after another, without gradient. A graph is of one teacher (so there are four) or of all.
Updates are of sessions with random images [B, 1, 28, 28]. Memory is the peak above that of the process before the
teachers are made: each number comes from a process of its own, and is that of the device on a GPU and of the process
elsewhere. `--clock processor` counts the time of this process alone, for a machine on which others compute as well.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from nets import NETS
from step import other

from kdx.backends import WAYS as BACKENDS
from kdx.backends import make_backend, problem_of
from kdx.batched import BATCHED, Together
from kdx.builtin.tensor_data import TensorDataset
from kdx.calls import ModelCall, Values, execute
from kdx.components import Network
from kdx.config import load_mapping
from kdx.errors import PlanError
from kdx.loop import Session, make_session, step
from kdx.runs import Options, build_plan, prepare
from kdx.runtime import Runtime
from kdx.taps import Tapped
from kdx.timing import start
from kdx.ways import decide

FOUR = 4
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
WAYS = {"never": "one after another", "always": "one call"}
WARM_UP = 2


@torch.no_grad()
def four(name: str, options: argparse.Namespace) -> None:
    """The rows of four teachers of one net, which differ in their weights."""
    net, device = NETS[name], torch.device(options.device)
    nets = [other(net.teacher(), number).requires_grad_(False).eval().to(device) for number in range(FOUR)]
    batch = {"image": torch.rand(net.batch, *net.shape, device=device)}
    calls = []
    for number, one in enumerate(nets):
        who = f"{name}_{number}"
        tapped = Tapped(Network(one), ("logits",), {}, who)
        calls.append(ModelCall(who, who, tapped, {"image": "batch.image"}, (f"{who}.logits",)))
    ways: dict[str, Callable[[Values], object]] = {
        "by hand": lambda values: [one(values["batch.image"]) for one in nets],
        "kdx, eager": lambda values: execute(calls, values),
        f"kdx, {BATCHED}": Together(calls).run,
    }
    for way in BACKENDS:
        if way in options.skip or problem_of(way, calls[0], device) is not None:
            continue
        try:
            singles = [make_backend(way, [call], batch) for call in calls]
            ways[f"kdx, {FOUR} graphs, {way}"] = lambda values, singles=singles: [one.run(values) for one in singles]
            ways[f"kdx, one graph, {way}"] = make_backend(way, calls, batch).run
        except PlanError as error:
            print(f"{name:<8}  {way} is not possible: {error}")
    found: dict[str, list[float]] = {way: [] for way in ways}
    clock = CLOCKS[options.clock]
    for turn in range(WARM_UP + options.rounds * net.burst):
        for way, run in ways.items():
            values = start(batch)
            wait(device)
            began = clock()
            run(values)
            wait(device)
            if turn >= WARM_UP:
                found[way].append(clock() - began)
    times = {way: statistics.median(seconds) for way, seconds in found.items()}
    for way, seconds in times.items():
        print(f"{name:<8}  {way:<28}  {1000 * seconds:>9.2f} ms  {seconds / times['by hand']:>6.2f}")
    for title, kinds in {"each by its best way": ("eager", "graphs"), "the best graph of all": ("one graph",)}.items():
        best = min((time for way, time in times.items() if any(kind in way for kind in kinds)), default=None)
        if best is not None:
            print(f"{name:<8}  {title:<28}  {1000 * best:>9.2f} ms  {best / times['by hand']:>6.2f}", flush=True)


def wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def session_of(options: argparse.Namespace, count: int, way: str) -> Session:
    """A session with `count` teachers, which are called in one of the `WAYS`."""
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4 * options.batch, 1, 28, 28, generator=generator)
    labels = torch.arange(len(images)) % 10
    channels = [int(width) for width in options.channels.split(",")]
    net = {"use": "timm", "model": "resnet18", "args": {"layers": [1, 1, 1, 1], "channels": channels}}
    config: dict[str, Any] = {
        "name": "teachers",
        "data": {"use": "tensors", "validation": 0},
        "student": {**net, "args": {**net["args"], "channels": [8, 16, 24, 32]}},
        "teachers": {f"teacher_{number}": net for number in range(1, count + 1)},
        "targets": {"committee": {"use": "mean"}},
        "losses": {"kd": {"use": "kd", "inputs": {"teacher": "committee.logits"}}},
        "train": {"updates": 1, "batch": options.batch},
        "runtime": {
            "device": options.device,
            "threads": options.threads,
            "teacher_batching": way if count > 1 else "never",
        },
        "baseline": False,
    }
    data = TensorDataset.from_tensors({"image": images, "label": labels})
    how = Options(quiet=True, data=data)
    prepared = prepare(load_mapping(config), how)
    runtime = Runtime(prepared.spec.runtime)
    plan = build_plan(prepared, how, trained=True, device=runtime.device)
    session = make_session(prepared.spec, plan, prepared.dataset, prepared.splits, runtime)
    decide(session, None)
    return session


def update(session: Session, clock: Callable[[], float] = time.perf_counter) -> float:
    """One update on the first batch; gives its seconds."""
    batch = session.feed.at(0)
    session.runtime.wait()
    began = clock()
    step(session, batch, session.knobs.at(session.clock))
    session.runtime.wait()
    return clock() - began


def times(options: argparse.Namespace, count: int) -> dict[str, float]:
    """The median seconds of an update in each way; the ways take turns."""
    sessions = {way: session_of(options, count, way) for way in (WAYS if count > 1 else ("never",))}
    found: dict[str, list[float]] = {way: [] for way in sessions}
    for turn in range(WARM_UP + options.rounds):
        for way, session in sessions.items():
            seconds = update(session, CLOCKS[options.clock])
            if turn >= WARM_UP:
                found[way].append(seconds)
    return {way: statistics.median(seconds) for way, seconds in found.items()}


def peak(options: argparse.Namespace, count: int, way: str) -> float:
    """The peak memory of a process that trains in one way, in MB above what it had before."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return float(pool.apply(_peak, (options, count, way)))


def _peak(options: argparse.Namespace, count: int, way: str) -> float:
    update(session_of(options, 1, "never"))  # what every process needs, libraries included
    gc.collect()
    gpu = options.device.startswith("cuda")
    before = torch.cuda.memory_allocated() if gpu else psutil.Process().memory_info().rss
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak of the process starts anew; Linux only
    session = session_of(options, count, way)
    for _ in range(WARM_UP):
        update(session)
    after = torch.cuda.max_memory_allocated() if gpu else _peak_of_process()
    return (after - before) / 1e6


def _peak_of_process() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(peak.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--nets", default=",".join(NETS), help="nets of which four are called in every way")
    parser.add_argument("--counts", default="1,2,4,8", help="numbers of teachers of an update; nothing for none")
    parser.add_argument("--skip", nargs="*", default=[], choices=BACKENDS)
    parser.add_argument("--channels", default="16,32,64,128", help="widths of the four stages of a teacher")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", default="wall", choices=CLOCKS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.device}, {options.threads} thread(s), {options.clock} time")
    print(f"{'net':<8}  {'four teachers':<28}  {'all four':>12}  {'part':>6}")
    for name in filter(None, options.nets.split(",")):
        four(name, options)
    print(f"batch {options.batch}, channels {options.channels}")
    print(f"{'teachers':>8}  {'way':<18}  {'update':>10}  {'speed-up':>8}  {'peak memory':>12}")
    for count in map(int, filter(None, options.counts.split(","))):
        found = times(options, count)
        for way, seconds in found.items():
            memory = peak(options, count, way)
            gain = found["never"] / seconds
            print(f"{count:>8}  {WAYS[way]:<18}  {1000 * seconds:>7.1f} ms  {gain:>7.2f}x  {memory:>9.1f} MB")


if __name__ == "__main__":
    main()
