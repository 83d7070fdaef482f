"""Time of a frozen teacher by each backend, side by side: a ResNet-18 and a vision transformer for small images, each
asked for its logits and an inner map, and for the map alone. Then the time of an update with and without channels-last.

    python benchmarks/backends.py [--batch 32] [--size 32] [--threads 1] [--rounds 9] [--skip compile] [--nets resnet18]
        [--clock processor]

All ways take turns; the table gives medians, as a part of eager calls as well, the largest difference from eager calls
as a part of a field's largest value, and the time that the backend took to make. On a GPU (`--device cuda`) only those
of PyTorch are possible, and `compile` needs a C++ compiler. `--clock processor` counts the time of this process alone,
for a machine on which others compute as well.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import timm
import torch

from kdx.backends import WAYS, compare, make_backend, problem_of
from kdx.builtin.tensor_data import TensorDataset
from kdx.calls import ModelCall, StandIn
from kdx.components import Network
from kdx.config import load_mapping
from kdx.errors import PlanError
from kdx.loop import Session, make_session, step
from kdx.runs import Options, build_plan, prepare
from kdx.runtime import Runtime
from kdx.taps import Tap, Tapped
from kdx.timing import medians, start

NETS: dict[str, tuple[dict[str, Any], str]] = {
    "resnet18": ({}, "layer3"),
    "vit_tiny_patch16_224": ({"patch_size": 4}, "blocks.5"),
}
"""Nets of timm with their options and the module that is tapped."""
FIELDS = (("logits", "mid"), ("mid",))
WARM_UP = 3
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def call_of(
    name: str, wanted: tuple[str, ...], options: argparse.Namespace
) -> tuple[ModelCall, dict[str, torch.Tensor]]:
    """A teacher with random weights, and a batch of random images."""
    torch.manual_seed(0)
    args, path = NETS[name]
    size = {"img_size": options.size} if name.startswith("vit") else {}
    net = timm.create_model(name, num_classes=100, **args, **size)
    tapped = Tapped(Network(net), wanted, {"mid": Tap(path)}, name).requires_grad_(False).eval().to(options.device)
    batch = {"image": torch.rand(options.batch, 3, options.size, options.size, device=options.device)}
    tapped.protect(batch)
    gives = tuple(f"{name}.{field}" for field in wanted)
    return ModelCall(name, name, tapped, {"image": "batch.image"}, gives), batch


def wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize(torch.device(device))


@torch.no_grad()
def teacher(name: str, wanted: tuple[str, ...], options: argparse.Namespace) -> None:
    """The rows of one net."""
    call, batch = call_of(name, wanted, options)
    contenders: dict[str, StandIn | ModelCall] = {"eager": call}
    notes = {"eager": ""}
    for way in WAYS:
        if way in options.skip or problem_of(way, call, torch.device(options.device)) is not None:
            continue
        began = time.perf_counter()
        try:
            contenders[way] = backend = make_backend(way, [call], batch)
        except PlanError as error:
            print(f"{name:<22} {'+'.join(wanted):<11} {way:<12} not possible: {error}", flush=True)
            continue
        took = time.perf_counter() - began
        values = start(batch)
        backend.run(values)
        notes[way] = f"{compare([call], values, batch):>9.1e}  {took:>6.1f} s"
    medians(contenders, batch, lambda: wait(options.device), WARM_UP)
    found = medians(contenders, batch, lambda: wait(options.device), options.rounds, CLOCKS[options.clock])
    for way, ms in found.items():
        part = ms / found["eager"]
        print(f"{name:<22} {'+'.join(wanted):<11} {way:<12} {ms:>8.2f} ms  {part:>5.2f}  {notes[way]}", flush=True)


def session_of(options: argparse.Namespace, channels_last: bool) -> Session:
    """A student that learns from labels and from a teacher."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4 * options.batch, 3, options.size, options.size, generator=generator)
    config: dict[str, Any] = {
        "name": "layout",
        "data": {"use": "tensors", "validation": 0},
        "student": {"use": "timm", "model": "resnet10t"},
        "teachers": {"big": {"use": "timm", "model": "resnet18"}},
        "losses": {"ce": {"use": "cross_entropy"}, "kd": {"use": "kd"}},
        "train": {"updates": 1, "batch": options.batch},
        "runtime": {
            "device": options.device, "threads": options.threads, "precision": "fp32", "channels_last": channels_last,
        },
        "baseline": False,
    }  # fmt: skip
    data = TensorDataset.from_tensors({"image": images, "label": torch.arange(len(images)) % 10})
    how = Options(quiet=True, data=data)
    prepared = prepare(load_mapping(config), how)
    runtime = Runtime(prepared.spec.runtime)
    plan = build_plan(prepared, how, trained=True, device=runtime.device)
    return make_session(prepared.spec, plan, prepared.dataset, prepared.splits, runtime)


def layouts(options: argparse.Namespace) -> None:
    """The rows of a whole update."""
    sessions = {layout: session_of(options, layout) for layout in (False, True)}
    times: dict[bool, list[float]] = {layout: [] for layout in sessions}
    clock = CLOCKS[options.clock]
    for turn in range(WARM_UP + options.rounds):
        for layout, session in sessions.items():
            batch = session.feed.at(0)
            session.runtime.wait()
            began = clock()
            step(session, batch, session.knobs.at(session.clock))
            session.runtime.wait()
            if turn >= WARM_UP:
                times[layout].append(1000 * (clock() - began))
    found = {layout: statistics.median(values) for layout, values in times.items()}
    for layout, ms in found.items():
        print(f"update, resnet10t of resnet18, channels_last: {layout!s:<5}  {ms:>8.2f} ms  {ms / found[False]:>5.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--skip", nargs="*", default=[], choices=WAYS)
    parser.add_argument("--nets", nargs="*", default=[*NETS], choices=NETS)
    parser.add_argument("--clock", default="wall", choices=CLOCKS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = f"{options.batch} images of {options.size} pixels, {options.threads} thread(s), {options.clock} time"
    print(f"{options.device}, {about}")
    print(f"{'net':<22} {'fields':<11} {'backend':<12} {'a call':>11}  {'part':>5}  {'gap':>9}  {'to make':>8}")
    for name in options.nets:
        for wanted in FIELDS:
            teacher(name, wanted, options)
    layouts(options)


if __name__ == "__main__":
    main()
