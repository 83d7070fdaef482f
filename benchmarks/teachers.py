"""Time of an update and peak memory with 1, 2, 4 and 8 teachers of one architecture: called one after another, and as
one batched call.

    python benchmarks/teachers.py [--device cuda] [--channels 16,32,64,128] [--batch 64] [--rounds 7]

Both ways train the same session of random images [B, 1, 28, 28], turn by turn, with a fixed number of threads; the
table gives medians of whole updates. Memory is the peak above that of the process before the teachers are made: each
number comes from a process of its own, and is that of the device on a GPU and of the process elsewhere.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from kdx.builtin.tensor_data import TensorDataset
from kdx.config import load_mapping
from kdx.loop import Session, make_session, step
from kdx.runs import Options, build_plan, prepare
from kdx.runtime import Runtime
from kdx.ways import decide

COUNTS = (1, 2, 4, 8)
WAYS = {"never": "one after another", "always": "one call"}
WARM_UP = 2


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


def update(session: Session) -> float:
    """One update on the first batch; gives its seconds."""
    batch = session.feed.at(0)
    session.runtime.wait()
    began = time.perf_counter()
    step(session, batch, session.knobs.at(session.clock))
    session.runtime.wait()
    return time.perf_counter() - began


def times(options: argparse.Namespace, count: int) -> dict[str, float]:
    """The median seconds of an update in each way; the ways take turns."""
    sessions = {way: session_of(options, count, way) for way in (WAYS if count > 1 else ("never",))}
    found: dict[str, list[float]] = {way: [] for way in sessions}
    for turn in range(WARM_UP + options.rounds):
        for way, session in sessions.items():
            seconds = update(session)
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
    parser.add_argument("--channels", default="16,32,64,128", help="widths of the four stages of a teacher")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    print(f"{options.device}, batch {options.batch}, {options.threads} thread(s), channels {options.channels}")
    print(f"{'teachers':>8}  {'way':<18}  {'update':>10}  {'speed-up':>8}  {'peak memory':>12}")
    for count in COUNTS:
        found = times(options, count)
        for way, seconds in found.items():
            memory = peak(options, count, way)
            gain = found["never"] / seconds
            print(f"{count:>8}  {WAYS[way]:<18}  {1000 * seconds:>7.1f} ms  {gain:>7.2f}x  {memory:>9.1f} MB")


if __name__ == "__main__":
    main()
