"""One update of kdx beside the same update written by hand, and beside the student that learns from labels alone.

    python benchmarks/step.py [--net mlp convnet resnet] [--terms logits hint attention three four] [--rounds 60]

`plain` is a loop as tutorials have it: a loader with shuffling, whole teachers, the optimizer as torch gives it, losses
from `torch.nn.functional`, and one number read at every step. `tuned` is the best that was found by hand: batches
gathered by index, teachers that stop after what is read, the fused optimizer, the divergence as one cross-entropy with
soft targets, and no number read. `kdx` computes as a config does that says nothing of it, in eager calls as these two
do; `auto` has measured its layout, compilation and what computes the teachers, as `runtime: auto` does for a training
of some hours; with `--precision auto` the precision as well, which changes numbers by more than rounding. `alone` is
`plain` without a teacher. All train the same nets on the same numbers of samples and take turns within one process,
with a fixed number of threads, several updates at a time of the smaller nets; shown are medians of an update with their
quartiles, and the medians of the ratios of each turn. `--cpu` takes the processor's time in place of the wall clock's,
for a machine that others use as well.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from nets import NETS, Net
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kdx.builtin.tensor_data import TensorDataset as Data
from kdx.config import load_mapping
from kdx.loop import Session, Watchers, make_session, training
from kdx.plugins import compile_hook
from kdx.runs import Options, build_plan, prepare
from kdx.runtime import Runtime
from kdx.runtime_choice import choose
from kdx.sections import RuntimeOptions
from kdx.ways import decide

TEMPERATURE, LR = 4.0, 0.01
TERMS = ("logits", "hint", "attention", "three", "four")
WARM_UP = 5
TRIED = {"folded": 0.0, "onnxruntime": 0.0, "openvino": 0.0, "compile": math.inf}
"""Backends that a long training would try; compilation is left out, as it takes minutes."""
Update = Callable[[], object]


@dataclass(frozen=True)
class Task:
    """What all loops train: nets, terms, and the samples."""

    net: Net
    terms: str
    images: Tensor
    labels: Tensor

    @property
    def teachers(self) -> int:
        return {"three": 3, "four": 4}.get(self.terms, 1)

    def make_teachers(self) -> list[nn.Module]:
        """The teachers, of other weights each: an optimizing backend works out equal ones but once."""
        return [other(self.net.teacher(), number) for number in range(self.teachers)]

    @property
    def inner(self) -> bool:
        return self.terms in ("hint", "attention")


def other(net: nn.Module, number: int) -> nn.Module:
    """A net with other weights for each number."""
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_(1 + 0.01 * number)
    return net


def make_task(net: Net, terms: str, batches: int = 40) -> Task:
    """Random samples; epochs are long enough that what the engine does at their ends stays out of the medians."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batches * net.batch, *net.shape, generator=generator)
    return Task(net, terms, images, torch.arange(len(images)) % net.classes)


def kdx_session(
    task: Task,
    plugins: tuple[str, ...] = (),
    more: Mapping[str, Any] | None = None,
    *,
    measured: bool = False,
    precision: str = "fp32",
) -> Session:
    """The task as a config, with `more` losses, ready to train; with `measured` as `runtime: auto` has it."""
    names = [f"teacher_{i}" for i in range(1, task.teachers + 1)] if task.teachers > 1 else ["teacher"]
    taps = {"taps": {"mid": task.net.tap}} if task.inner else {}
    several = task.teachers > 1
    losses: dict[str, Any] = {"ce": {"use": "cross_entropy"}}
    losses["kd"] = {
        "use": "kd",
        "temperature": TEMPERATURE,
        **({"inputs": {"teacher": "all.logits"}} if several else {}),
    }
    config: dict[str, Any] = {
        "name": "step",
        "baseline": False,
        "plugins": list(plugins),
        "data": {"use": "tensors", "validation": 0},
        "student": {"use": "module", **taps},
        "teachers": {name: {"use": "module", **taps} for name in names},
        "losses": losses,
        "train": {"updates": 10**6, "batch": task.net.batch, "lr": LR, "optimizer": {"use": "sgd", "momentum": 0.9}},
        "runtime": {"device": "cpu", "threads": torch.get_num_threads(), "teacher_batching": "never"},
    }
    config["runtime"]["precision"] = precision
    if measured:
        config["runtime"] |= dict.fromkeys(("channels_last", "compile", "backend", "teacher_batching"), "auto")
    losses.update(more or {})
    if several:
        config["targets"] = {"all": {"use": "mean", "temperature": TEMPERATURE}}
    if task.terms == "hint":
        config["align"] = {"mid": {"use": task.net.aligner, "source": "student.mid", "like": "teacher.mid"}}
        losses["hint"] = {"use": "mse", "inputs": {"student": "mid", "teacher": "teacher.mid"}}
    if task.terms == "attention":
        losses["at"] = {"use": "at", "inputs": {"student": ["student.mid"], "teacher": ["teacher.mid"]}}
    nets = {"student": task.net.student(), **dict(zip(names, task.make_teachers(), strict=True))}
    options = Options(quiet=True, data=Data.from_tensors({"image": task.images, "label": task.labels}), networks=nets)
    prepared = prepare(load_mapping(config), options)

    def make(settings: RuntimeOptions) -> Session:
        spec, runtime = replace(prepared.spec, runtime=settings), Runtime(settings)
        plan = build_plan(replace(prepared, spec=spec), options, trained=True, device=runtime.device)
        return make_session(spec, plan, prepared.dataset, prepared.splits, runtime)

    if not measured:
        return make(prepared.spec.runtime)
    chosen = choose(prepared.spec, make)
    session = make(chosen.runtime)
    print("\n".join(f"  {line}" for line in chosen.lines))
    print("\n".join(f"  {line}" for line in decide(session, None, worth=TRIED)))
    return session


def kdx_update(
    task: Task, plugins: tuple[str, ...] = (), more: Mapping[str, Any] | None = None, **settings: Any
) -> Update:
    """One update of the engine, with the hook that watchers of a step are called by."""
    session = kdx_session(task, plugins, more, **settings)

    def ignore(_: Any) -> None:
        pass

    steps = training(session, Watchers(compile_hook(session.spec.registry, "kdx_step_end"), ignore, ignore, ignore))
    next(steps)
    return lambda: next(steps)


def tap(net: nn.Module, path: str) -> list[Tensor]:
    """A list that holds the output of a module after each pass."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        kept[:] = [output]

    net.get_submodule(path).register_forward_hook(keep)
    return kept


def attention(features: Tensor) -> Tensor:
    return F.normalize(features.pow(2).mean(1).flatten(1))


def plain_update(task: Task, *, alone: bool = False) -> Update:
    """One update as tutorials write it."""
    student = task.net.student()
    teachers = [] if alone else [teacher.eval() for teacher in task.make_teachers()]
    ours = tap(student, task.net.tap) if task.inner and not alone else []
    theirs = tap(teachers[0], task.net.tap) if task.inner and not alone else []
    aligner = task.net.align() if task.terms == "hint" and not alone else nn.Identity()
    optimizer = torch.optim.SGD([*student.parameters(), *aligner.parameters()], lr=LR, momentum=0.9)
    loader = DataLoader(TensorDataset(task.images, task.labels), task.net.batch, shuffle=True, drop_last=True)
    batches: Iterator[Any] = itertools.chain.from_iterable(itertools.repeat(loader))
    running = 0.0

    def update() -> None:
        nonlocal running
        images, labels = next(batches)
        logits = student(images)
        loss = F.cross_entropy(logits, labels)
        if teachers:
            with torch.no_grad():
                p = torch.stack([F.softmax(teacher(images) / TEMPERATURE, 1) for teacher in teachers]).mean(0)
            log_q = F.log_softmax(logits / TEMPERATURE, 1)
            loss = loss + F.kl_div(log_q, p, reduction="batchmean") * TEMPERATURE**2
        if task.terms == "hint" and teachers:
            loss = loss + F.mse_loss(aligner(ours[0]), theirs[0])
        if task.terms == "attention" and teachers:
            loss = loss + (attention(ours[0]) - attention(theirs[0])).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        running += loss.item()

    return update


def tuned_update(task: Task) -> Update:
    """The best loop that was found by hand."""
    student = task.net.student()
    teachers = [teacher.eval().requires_grad_(False) for teacher in task.make_teachers()]
    ours = tap(student, task.net.tap) if task.inner else []
    theirs = tap(teachers[0], task.net.tap) if task.inner else []
    aligner = task.net.align() if task.terms == "hint" else nn.Identity()
    optimizer = torch.optim.SGD([*student.parameters(), *aligner.parameters()], lr=LR, momentum=0.9, fused=True)
    samples, size = len(task.images), task.net.batch

    def orders() -> Iterator[Tensor]:
        while True:
            yield from torch.randperm(samples).split(size)

    order = orders()

    def update() -> Tensor:
        chosen = next(order)
        images, labels = task.images.index_select(0, chosen), task.labels.index_select(0, chosen)
        with torch.no_grad():
            answers = [F.softmax(teacher(images) / TEMPERATURE, 1) for teacher in teachers]
            p = answers[0] if len(answers) == 1 else torch.stack(answers).mean(0)
        logits = student(images)
        loss = F.cross_entropy(logits, labels) + TEMPERATURE**2 * F.cross_entropy(logits / TEMPERATURE, p)
        if task.terms == "hint":
            loss = loss + F.mse_loss(aligner(ours[0]), theirs[0])
        if task.terms == "attention":
            loss = loss + (attention(ours[0]) - attention(theirs[0])).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return update


LOOPS: dict[str, Callable[[Task, str], Update]] = {
    "kdx": lambda task, precision: kdx_update(task),
    "auto": lambda task, precision: kdx_update(task, measured=True, precision=precision),
    "plain": lambda task, precision: plain_update(task),
    "tuned": lambda task, precision: tuned_update(task),
    "alone": lambda task, precision: plain_update(task, alone=True),
}
"""How each is made, for the precision that is asked of `auto`."""
PAIRS = (("kdx", "plain"), ("kdx", "tuned"), ("auto", "plain"), ("auto", "tuned"))
"""The ratios that are shown."""


def in_turns(
    updates: Mapping[str, Update], rounds: int, clock: Callable[[], float] = time.perf_counter, *, burst: int = 1
) -> dict[str, list[float]]:
    """Seconds of an update of each kind, which take turns; the order within a turn is another one each time.

    A turn is a `burst` of updates, of which the mean counts: a fast update among those of other loops would find the
    processor's caches full of what is theirs, which it never does in a training. The first one of a burst is not timed.
    """
    found: dict[str, list[float]] = {name: [] for name in updates}
    names = list(updates)
    for turn in range(WARM_UP + rounds):
        names.append(names.pop(0))
        for name in names:
            update = updates[name]
            if burst > 1:
                update()
            began = clock()
            for _ in range(burst):
                update()
            if turn >= WARM_UP:
                found[name].append((clock() - began) / burst)
    return found


def spread(values: list[float], scale: float = 1e3, digits: int = 2) -> str:
    low, middle, high = (f"{scale * value:.{digits}f}" for value in statistics.quantiles(values, n=4))
    return f"{middle} ({low} to {high})"


def ratio(above: list[float], below: list[float]) -> str:
    return f"{statistics.median(a / b for a, b in zip(above, below, strict=True)):.2f}"


def machine() -> str:
    """What the figures were measured on."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} thread(s), {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", nargs="+", choices=[*NETS], default=[*NETS])
    parser.add_argument("--terms", nargs="+", choices=TERMS, default=[*TERMS])
    parser.add_argument("--rounds", type=int, default=60, help="measured turns of each loop")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--precision", choices=("fp32", "auto"), default="fp32", help="of the loop `auto`")
    parser.add_argument("--cpu", action="store_true", help="measure processor time")
    options = parser.parse_args()
    clock = time.process_time if options.cpu else time.perf_counter
    torch.set_num_threads(options.threads)
    print(f"ms of one update, {'processor time' if options.cpu else 'wall clock'}, median (quartiles); {machine()}")
    print(f"{'net':<8} {'terms':<10}", *(f"{loop:>22}" for loop in LOOPS), *(f"{'/'.join(pair):>11}" for pair in PAIRS))
    for name, terms in itertools.product(options.net, options.terms):
        net = NETS[name]
        if terms == "attention" and not net.has_maps:
            continue
        task = make_task(net, terms)
        updates = {loop: make(task, options.precision) for loop, make in LOOPS.items()}
        found = in_turns(updates, options.rounds, clock, burst=net.burst)
        ratios = (f"{ratio(found[ours], found[theirs]):>11}" for ours, theirs in PAIRS)
        print(f"{name:<8} {terms:<10}", *(f"{spread(found[loop]):>22}" for loop in LOOPS), *ratios, flush=True)


if __name__ == "__main__":
    main()
