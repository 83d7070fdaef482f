"""Cross-entropy and soft targets as kdx computes them, beside the usual composition in PyTorch.

    python benchmarks/losses.py [--sizes 64x10 64x1000 512x32000] [--rounds 40]

The usual composition is `cross_entropy` and `kl_div(log_softmax(student / T), softmax(teacher / T)) * T^2`. Each way
computes value and gradient; the ways take turns within one process. Memory is the peak above what the process had
before, from a process of its own for each number (Linux, CPU). `largest difference` is that of the gradients, as a
part of the largest gradient.
"""

from __future__ import annotations

import argparse
import gc
import math
import multiprocessing
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from step import in_turns, machine, ratio
from torch import Tensor

from kdx.builtin.losses import cross_entropy
from kdx.fused import cross_entropy_and_divergence, log_mixture, soft_divergence

TEMPERATURE = torch.tensor(4.0)
Loss = Callable[[Tensor, list[Tensor], Tensor], Tensor]


def usual_ce(student: Tensor, teachers: list[Tensor], label: Tensor) -> Tensor:
    return F.cross_entropy(student, label, ignore_index=-1)


def our_ce(student: Tensor, teachers: list[Tensor], label: Tensor) -> Tensor:
    return cross_entropy(student, label, labelled=True)


def usual_kd(student: Tensor, teachers: list[Tensor], label: Tensor) -> Tensor:
    with torch.no_grad():
        p = torch.stack([F.softmax(z / TEMPERATURE, 1) for z in teachers]).mean(0) if len(teachers) > 1 else None
        p = F.softmax(teachers[0] / TEMPERATURE, 1) if p is None else p
    return F.kl_div(F.log_softmax(student / TEMPERATURE, 1), p, reduction="batchmean") * TEMPERATURE**2


def our_kd(student: Tensor, teachers: list[Tensor], label: Tensor) -> Tensor:
    teacher = teachers[0]
    if len(teachers) > 1:
        teacher = log_mixture(teachers, [-math.log(len(teachers))] * len(teachers), TEMPERATURE)
    return soft_divergence(student, teacher, TEMPERATURE).mean()


def usual_both(student: Tensor, teachers: list[Tensor], label: Tensor) -> Tensor:
    return usual_ce(student, teachers, label) + usual_kd(student, teachers, label)


def our_both(student: Tensor, teachers: list[Tensor], label: Tensor) -> Tensor:
    found = cross_entropy_and_divergence(student, label, teachers[0], TEMPERATURE, labelled=True)
    if found is None:
        return our_ce(student, teachers, label) + our_kd(student, teachers, label)
    return found[0] + found[1].mean()


CASES: dict[str, tuple[int, Loss, Loss]] = {
    "both": (1, usual_both, our_both),
    "cross-entropy": (1, usual_ce, our_ce),
    "kd": (1, usual_kd, our_kd),
    "kd of three": (3, usual_kd, our_kd),
}
"""Name -> the number of teachers, the usual way and that of kdx."""


def inputs(rows: int, classes: int, teachers: int) -> tuple[Tensor, list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = [3 * torch.randn(rows, classes, generator=generator) for _ in range(teachers + 1)]
    return logits[0].requires_grad_(), logits[1:], torch.arange(rows) % classes


def update(loss: Loss, rows: int, classes: int, teachers: int) -> Callable[[], Tensor]:
    student, answers, label = inputs(rows, classes, teachers)

    def step() -> Tensor:
        student.grad = None
        loss(student, answers, label).backward()  # type: ignore[no-untyped-call]
        assert student.grad is not None
        return student.grad

    return step


def peak(case: str, place: int, rows: int, classes: int, threads: int) -> float:
    """The peak memory of value and gradient, in MB above the inputs."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return float(pool.apply(_peak, (case, place, rows, classes, threads)))


def _peak(case: str, place: int, rows: int, classes: int, threads: int) -> float:
    torch.set_num_threads(threads)
    teachers, loss = CASES[case][0], CASES[case][place]
    step = update(loss, rows, classes, teachers)
    update(loss, 4, 100, teachers)()  # what every process needs, libraries included
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the process starts anew
    step()
    return (status("VmHWM") - before) * 1024 / 1e6


def status(name: str) -> int:
    """A figure of this process in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["64x10", "64x1000", "512x32000"])
    parser.add_argument("--cases", nargs="+", choices=[*CASES], default=[*CASES])
    parser.add_argument(
        "--rounds", type=int, default=5, help="measured turns of the largest size; more of smaller ones"
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"value and gradient; {machine()}")
    head = ("size", "loss", "usual ms", "kdx ms", "ratio", "usual MB", "kdx MB", "ratio", "largest difference")
    print("{:<10} {:<14} {:>9} {:>9} {:>6} {:>9} {:>9} {:>6} {:>19}".format(*head))
    for size in options.sizes:
        rows, classes = (int(part) for part in size.split("x"))
        for case in options.cases:
            teachers, usual, ours = CASES[case]
            steps = {"usual": update(usual, rows, classes, teachers), "kdx": update(ours, rows, classes, teachers)}
            expected, found = steps["usual"]().clone(), steps["kdx"]()
            apart = ((expected - found).abs().max() / expected.abs().max()).item()
            times = in_turns(steps, options.rounds if rows * classes > 1e6 else 60 * options.rounds)
            usual_ms, our_ms = (1e3 * statistics.median(times[name]) for name in steps)
            speed = ratio(times["kdx"], times["usual"])
            memory = [peak(case, place, rows, classes, options.threads) for place in (1, 2)] if classes >= 10**4 else []
            mb = [f"{memory[0]:.0f}", f"{memory[1]:.0f}", f"{memory[1] / memory[0]:.2f}"] if memory else ["-"] * 3
            print(
                f"{size:<10} {case:<14} {usual_ms:>9.2f} {our_ms:>9.2f} {speed:>6} {mb[0]:>9} {mb[1]:>9} {mb[2]:>6} "
                f"{apart:>19.1e}", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
