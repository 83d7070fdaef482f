"""A long run of a small student: whether memory or open files grow with the number of updates.

    python benchmarks/endurance.py [--updates 10000]

A whole run with a frozen teacher, a target, an average, a validation and a checkpoint every tenth of the updates, on
data in memory. Prints what the process holds after a tenth of the updates and at the end. Memory is what the process
does not share (USS). Of the tensors, those of the updates since the last look for nan and inf, at most 50 of them, come
and go.
"""

from __future__ import annotations

import argparse
import gc
import io
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from rich.console import Console
from torch import nn

from kdx.builtin.tensor_data import TensorDataset
from kdx.config import load_mapping
from kdx.runs import Options, prepare, steps_of

SIDE, CLASSES, SAMPLES, BATCH = 4, 4, 512, 32
START = 10
"""The first measurement is after this part of the updates."""


@dataclass(frozen=True)
class Held:
    """What the process holds at one moment."""

    updates: int
    memory: int
    files: int
    tensors: int

    def __str__(self) -> str:
        memory = f"{self.memory / 1e6:8.2f} MB"
        return f"{self.updates:>7,} updates  {memory}  {self.files:3} open files  {self.tensors:6} tensors"


def held(updates: int) -> Held:
    """Measure this process."""
    gc.collect()
    process = psutil.Process()
    tensors = sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())
    return Held(updates, process.memory_full_info().uss, process.num_fds(), tensors)


def mlp(width: int) -> nn.Module:
    """A student or a teacher of a few thousand weights."""
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, width), nn.ReLU(), nn.Linear(width, CLASSES))


def data() -> TensorDataset:
    """Random images with labels that a line tells apart."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(SAMPLES, 1, SIDE, SIDE, generator=generator)
    labels = (images.flatten(1) @ torch.randn(SIDE * SIDE, CLASSES, generator=generator)).argmax(1)
    return TensorDataset.from_tensors({"image": images, "label": labels}, classes=list("abcd"))


def config(updates: int, out: str) -> dict[str, Any]:
    """All that a run keeps from update to update: an average, schedules, two losses, what reports show."""
    return {
        "name": "endurance",
        "out": out,
        "baseline": False,
        "on_nonfinite": "skip",
        "data": {"use": "tensors", "validation": 64},
        "student": {},
        "teachers": {"wide": {}},
        "targets": {"tau": {"use": "entropy_temperature", "inputs": {"logits": "wide.logits"}}},
        "losses": {
            "ce": {"use": "cross_entropy"},
            "kd": {"use": "kd", "inputs": {"teacher": "wide.logits"}, "temperature": "tau"},
        },
        "train": {
            "updates": updates,
            "steps_per_epoch": max(updates // 10, 1),
            "batch": BATCH,
            "lr": {"use": "cosine", "peak": 0.05},
            "ema": 0.99,
        },
        "runtime": {"device": "cpu", "precision": "fp32"},
    }


def measure(updates: int, out: str) -> list[Held]:
    """Train, and measure after a tenth of the updates and at the end, before the result is made."""
    options = Options(
        quiet=True,
        console=Console(file=io.StringIO()),
        data=data(),
        networks={"student": mlp(32), "wide": mlp(64)},
    )
    moments = {updates // START, updates - 1}
    found = []
    for done, _ in enumerate(steps_of(prepare(load_mapping(config(updates, out)), options), options)):
        if done in moments:
            found.append(held(done))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--updates", type=int, default=10_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        first, last = measure(options.updates, out)
    print(first)
    print(last)
    grown = last.memory - first.memory
    print(f"grown by {grown / 1e6:.2f} MB, {grown / (last.updates - first.updates):.1f} bytes for an update; "
          f"{last.files - first.files} files, {last.tensors - first.tensors} tensors; "
          f"{time.perf_counter() - began:.0f} s")  # fmt: skip


if __name__ == "__main__":
    main()
