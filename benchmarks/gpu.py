"""Updates on one CUDA device: kdx beside loops by hand and `timm.task`, teachers on streams, and stored teachers.

    pip install "kdx[bench]"
    python benchmarks/gpu.py [--pairs resnet vit three] [--batch 128] [--precision bf16] [--graphs]
    python benchmarks/gpu.py --device cpu --small        # whether all of it works; these are no figures of a GPU

`resnet` is a resnet18 that learns from a resnet50, `vit` a vit_small from a vit_base, both at 224 pixels; `three` is
the resnet18 with a resnet34, a resnet50 and a vit_small. Images are random bytes in main memory, and each batch is
gathered by index.

`tuned` is the best loop that was found by hand: autocast, channels-last kernels and images, the fused optimizer, the
divergence as one cross-entropy with soft targets, pinned batches that are copied on a stream of their own, and no
number read. `resident` is the same loop with all images on the device from the start. `timm` hands the batches of
`tuned` to `LogitDistillationTask`. `kdx` computes as a config does; `streams` is kdx with each teacher on a stream of
its own; `stored` reads the teachers' answers from a cache on disk; `alone` is kdx with labels only. With `--graphs`
`recorded` and `compile` are kdx with the backends `cuda_graph` and `compile`, `whole` is kdx with compiled steps, and
`graphs` is `tuned` with teachers compiled by `mode="reduce-overhead"`.

cuDNN looks for its fastest kernels for all of them. All take turns of some updates each, after which the host waits for
the device; shown are medians of one update with quartiles, images in a second, the share of the speed of `alone`, and
the share of the rate at which the device multiplies large matrices in that precision. Operations are counted by torch,
once, in the loop by hand.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from step import machine, ratio, spread
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kdx.builtin.tensor_data import TensorDataset
from kdx.config import load_mapping
from kdx.devices import DTYPES
from kdx.loop import Session, Watchers, make_session, training
from kdx.runs import Options, build_plan, fill_caches, prepare
from kdx.runtime import Runtime
from kdx.streams import Streams
from kdx.ways import decide

TEMPERATURE, LR, CLASSES = 4.0, 0.01, 1000
WARM_UP = 2
"""Turns that are not counted."""
Update = Callable[[], object]
NOT_HERE = (
    "benchmarks/gpu.py: found no CUDA device, expected one; `--device cpu --small` tries whether the code works, and "
    "measures nothing of a GPU"
)
TINY_CNN = {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32]}
TINY_VIT = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}
PAIRS: dict[str, tuple[str, tuple[str, ...]]] = {
    "resnet": ("resnet18", ("resnet50",)),
    "vit": ("vit_small_patch16_224", ("vit_base_patch16_224",)),
    "three": ("resnet18", ("resnet34", "resnet50", "vit_small_patch16_224")),
}
BACKENDS = {"recorded": "cuda_graph", "compile": "compile"}
GOALS = (
    ("kdx", "tuned", "1.02"), ("kdx", "resident", ""), ("kdx", "timm", ""), ("stored", "alone", "1.03"),
    ("streams", "kdx", "0.90"), ("recorded", "kdx", ""), ("compile", "kdx", ""), ("whole", "kdx", ""),
    ("graphs", "tuned", ""),
)  # fmt: skip
"""The ratios that are shown where both were measured, with what they are to be at most."""


@dataclass(frozen=True)
class Task:
    """What all loops train, on what and how."""

    student: str
    teachers: tuple[str, ...]
    images: Tensor
    labels: Tensor
    batch: int
    device: torch.device
    precision: str
    small: bool

    def net(self, name: str, seed: int = 0) -> nn.Module:
        """A net of timm with random weights, the same each time."""
        import timm

        own: dict[str, Any] = {}
        if self.small:
            own = TINY_VIT if name.startswith("vit") else TINY_CNN
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made: nn.Module = timm.create_model(name, num_classes=CLASSES, **own)
        return made

    def placed(self, net: nn.Module) -> nn.Module:
        """On the device, kernels in channels-last layout."""
        return net.to(self.device).to(memory_format=torch.channels_last)

    @property
    def autocast(self) -> torch.autocast:
        """The context of forward passes; without effect in fp32."""
        dtype = DTYPES.get(self.precision)
        return torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def session_of(task: Task, folder: Path, case: str) -> Session:
    """The task as a config, ready to train."""
    names = [] if case == "alone" else [f"teacher_{i}" for i in range(len(task.teachers))]
    own: dict[str, Any] = {"backend": BACKENDS[case]} if case in BACKENDS else {}
    if case == "stored":
        own["cache"] = {"where": str(folder / "caches")}
    losses: dict[str, Any] = {"ce": {"use": "cross_entropy"}}
    if names:
        several = {"inputs": {"teacher": "all.logits"}} if len(names) > 1 else {}
        losses["kd"] = {"use": "kd", "temperature": TEMPERATURE, **several}
    config: dict[str, Any] = {
        "name": case,
        "out": str(folder),
        "baseline": False,
        "data": {"use": "tensors", "validation": 0},
        "student": {"use": "module"},
        "teachers": {name: {"use": "module", **own} for name in names},
        "targets": {"all": {"use": "mean", "temperature": TEMPERATURE}} if len(names) > 1 else {},
        "losses": losses,
        "train": {"updates": 10**6, "batch": task.batch, "lr": LR, "optimizer": {"use": "sgd", "momentum": 0.9}},
        "runtime": {"device": str(task.device), "precision": task.precision, "channels_last": True},
    }
    if case == "whole":
        config["runtime"]["compile"] = True
    nets = {"student": task.net(task.student)}
    nets |= {
        name: task.net(teacher, i + 1) for i, (name, teacher) in enumerate(zip(names, task.teachers, strict=False))
    }
    data = TensorDataset.from_tensors({"image": task.images, "label": task.labels}, classes=[*map(str, range(CLASSES))])
    options = Options(quiet=True, data=data, networks=nets)
    prepared = prepare(load_mapping(config), options)
    runtime = Runtime(prepared.spec.runtime)
    fill_caches(prepared, options, runtime)
    plan = build_plan(prepared, options, trained=True, device=runtime.device)
    session = make_session(prepared.spec, plan, prepared.dataset, prepared.splits, runtime)
    for line in decide(session, None):
        print(f"  {case}: {line}")
    if case == "streams":
        session.teachers.lane = Streams(task.device, len(session.teachers.live))
    return session


def kdx_update(task: Task, folder: Path, case: str) -> Update:
    def ignore(_: Any) -> None:
        pass

    steps = training(session_of(task, folder, case), Watchers(ignore, ignore, ignore, ignore))
    next(steps)
    return lambda: next(steps)


def batches(task: Task) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches on the device, gathered in pinned memory and copied on a stream of their own."""
    copies = torch.cuda.Stream(task.device) if task.device.type == "cuda" else None
    while True:
        for chosen in torch.randperm(len(task.images)).split(task.batch):
            images, labels = task.images.index_select(0, chosen), task.labels.index_select(0, chosen)
            if copies is not None:
                present = torch.cuda.current_stream(task.device)
                with torch.cuda.stream(copies):
                    images, labels = (one.pin_memory().to(task.device, non_blocking=True) for one in (images, labels))
                present.wait_stream(copies)
                images.record_stream(present)
                labels.record_stream(present)
            yield as_floats(images), labels


def resident_batches(task: Task) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches gathered on the device."""
    images, labels = task.images.to(task.device), task.labels.to(task.device)
    while True:
        for chosen in torch.randperm(len(images), device=task.device).split(task.batch):
            yield as_floats(images.index_select(0, chosen)), labels.index_select(0, chosen)


def as_floats(images: Tensor) -> Tensor:
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)


def tuned_update(task: Task, source: Iterator[tuple[Tensor, Tensor]], *, graphs: bool = False) -> Update:
    """The best loop that was found by hand."""
    student = task.placed(task.net(task.student)).train()
    teachers: list[Any] = [
        task.placed(task.net(name, i + 1)).eval().requires_grad_(False) for i, name in enumerate(task.teachers)
    ]
    if graphs:
        teachers = [torch.compile(teacher, mode="reduce-overhead") for teacher in teachers]
    optimizer = torch.optim.SGD(student.parameters(), lr=LR, momentum=0.9, fused=True)

    def update() -> Tensor:
        images, labels = next(source)
        with task.autocast:
            with torch.no_grad():
                answers = [F.softmax(teacher(images).float() / TEMPERATURE, 1) for teacher in teachers]
                p = answers[0] if len(answers) == 1 else torch.stack(answers).mean(0)
            logits = student(images).float()
        loss = F.cross_entropy(logits, labels) + TEMPERATURE**2 * F.cross_entropy(logits / TEMPERATURE, p)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return update


def timm_update(task: Task) -> Update:
    """One update of timm's own distillation, which takes one teacher."""
    from timm.task import LogitDistillationTask

    student, teacher = (task.placed(net) for net in (task.net(task.student), task.net(task.teachers[0], 1)))
    distillation = LogitDistillationTask(
        student, teacher, nn.CrossEntropyLoss(), distill_loss_weight=1.0, task_loss_weight=1.0,
        temperature=TEMPERATURE, device=task.device, verbose=False,
    )  # fmt: skip
    distillation.train()
    optimizer = torch.optim.SGD(student.parameters(), lr=LR, momentum=0.9, fused=True)
    source = batches(task)

    def update() -> None:
        images, labels = next(source)
        with task.autocast:
            found = distillation(images, labels)
        found["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def loops(task: Task, folder: Path, *, graphs: bool) -> dict[str, Update]:
    """All loops for a task, each with nets of its own."""
    found: dict[str, Update] = {"kdx": kdx_update(task, folder, "kdx")}
    if len(task.teachers) > 1 and task.device.type == "cuda":
        found["streams"] = kdx_update(task, folder, "streams")
    found["tuned"] = tuned_update(task, batches(task))
    found["resident"] = tuned_update(task, resident_batches(task))
    if len(task.teachers) == 1:
        found["timm"] = timm_update(task)
    found["stored"] = kdx_update(task, folder, "stored")
    found["alone"] = kdx_update(task, folder, "alone")
    if graphs:
        if task.device.type == "cuda":
            found["recorded"] = kdx_update(task, folder, "recorded")
        found["compile"] = kdx_update(task, folder, "compile")
        found["whole"] = kdx_update(task, folder, "whole")
        found["graphs"] = tuned_update(task, batches(task), graphs=True)
    return found


def in_turns(task: Task, updates: Mapping[str, Update], rounds: int, count: int) -> dict[str, list[float]]:
    """Seconds of one update of each loop, turn by turn; the order within a turn is another one each time."""
    found: dict[str, list[float]] = {name: [] for name in updates}
    names = list(updates)
    for turn in range(WARM_UP + rounds):
        names.append(names.pop(0))
        for name in names:
            task.wait()
            began = time.perf_counter()
            for _ in range(count):
                updates[name]()
            task.wait()
            if turn >= WARM_UP:
                found[name].append((time.perf_counter() - began) / count)
    return found


def operations(task: Task, *, teachers: bool) -> int:
    """The floating-point operations of an update by hand."""
    update = tuned_update(task, batches(task)) if teachers else student_update(task)
    with FlopCounterMode(display=False) as counter:
        update()
    return counter.get_total_flops()


def student_update(task: Task) -> Update:
    """The passes of the student that learns from labels."""
    student, source = task.placed(task.net(task.student)).train(), batches(task)

    def update() -> None:
        images, labels = next(source)
        with task.autocast:
            loss = F.cross_entropy(student(images), labels)
        loss.backward()

    return update


def matrix_rate(task: Task) -> float:
    """Operations in a second of a product of large matrices in the precision of the task."""
    side = 256 if task.small else 8192
    matrix = torch.rand(side, side, device=task.device, dtype=DTYPES.get(task.precision, torch.float32))
    times = []
    for _ in range(12):
        task.wait()
        began = time.perf_counter()
        matrix @ matrix
        task.wait()
        times.append(time.perf_counter() - began)
    return 2 * side**3 / statistics.median(times[2:])


def show(name: str, task: Task, found: Mapping[str, list[float]], rate: float) -> None:
    """The table of a pair, and its ratios."""
    print(
        f"{name}: {task.student} from {', '.join(task.teachers)}, {task.images.shape[-1]} px, batches of {task.batch}"
    )
    print(f"  {'loop':<10}{'ms of an update':>26}{'images/s':>12}{'of alone':>10}{'of matrix rate':>16}")
    full, own = operations(task, teachers=True), operations(task, teachers=False)
    for loop, seconds in found.items():
        middle = statistics.median(seconds)
        work = own if loop in ("alone", "stored") else full
        share = statistics.median(found["alone"]) / middle
        print(
            f"  {loop:<10}{spread(seconds):>26}{task.batch / middle:>12.0f}{share:>10.2f}{work / middle / rate:>15.1%}",
            flush=True,
        )
    for above, below, goal in GOALS:
        if above in found and below in found:
            print(f"  {above}/{below}: {ratio(found[above], found[below])}" + (f" (goal: {goal})" if goal else ""))


def made_task(name: str, options: argparse.Namespace) -> Task:
    student, teachers = PAIRS[name]
    side, count = (32, 8) if options.small else (224, 16)
    generator = torch.Generator().manual_seed(0)
    shape = (count * options.batch, 3, side, side)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    labels = torch.arange(len(images)) % CLASSES
    device = torch.device(options.device)
    return Task(student, teachers, images, labels, options.batch, device, options.precision, options.small)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", choices=[*PAIRS], default=[*PAIRS])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="bf16")
    parser.add_argument("--rounds", type=int, default=15, help="measured turns of each loop")
    parser.add_argument("--updates", type=int, default=10, help="updates in a turn")
    parser.add_argument("--threads", type=int, default=8, help="threads of torch, which gather the batches")
    parser.add_argument("--graphs", action="store_true", help="also compiled teachers, which takes minutes")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny nets at 32 pixels, to try the code")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"argument --rounds: found {options.rounds}, expected 2 or more, as quartiles are shown")
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(NOT_HERE)
    warnings.simplefilter("ignore")  # of other libraries
    torch.set_num_threads(options.threads)
    if options.device == "cuda":
        torch.backends.cudnn.benchmark = True
        print(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    else:
        print("on a CPU, to try the code: these are no figures of a GPU")
    print(f"{machine()}, timm {importlib.metadata.version('timm')}, {options.precision}")
    for order, name in enumerate(options.pairs):
        task = made_task(name, options)
        rate = matrix_rate(task)
        if order == 0:
            print(f"products of matrices: {rate / 1e12:.3g} TFLOP/s")
        with tempfile.TemporaryDirectory() as folder:
            updates = loops(task, Path(folder), graphs=options.graphs)
            show(name, task, in_turns(task, updates, options.rounds, options.updates), rate)


if __name__ == "__main__":
    main()
