"""What the engine itself costs: a further term, plugins that nothing uses, an early stop, memory, and the start.

    python benchmarks/engine.py [--parts terms plugins stop memory optimizers start]

`terms`: microseconds of the processor that one more loss adds to an update, above those of the same loss in a loop by
    hand: in each turn the slope over 0, 2, 6 and 10 more of them; the median over all turns with its 95 % interval.
`plugins`: an update with 20 registered plugins, each with a loss that nothing names and a hook on every step, against
    the same update without them.
`stop`: the time of a teacher whose last tensor is an inner one, as a part of that of the whole teacher, beside the
    part that the layers up to there take when they are run by hand.
`memory`: the peak of a process that trains with kdx, against one with the plain and one with the tuned loop of
    `step.py` (Linux, CPU). Freed blocks go back to the system at once, so that it is the peak of what is in use.
`optimizers`: a step of the plain, the `foreach` and the fused version.
`start`: seconds of `kdx --help` and `import kdx`; of a process up to its first update with the parts of kdx, and of
    `kdx run` up to its first update, against processes that import torch, timm and torchmetrics and those that do a
    first update by hand. All have their bytecode at hand, and take turns.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from losses import status
from nets import NETS
from scipy.stats import bootstrap
from step import (
    Task,
    Update,
    in_turns,
    kdx_update,
    machine,
    make_task,
    plain_update,
    ratio,
    spread,
    tuned_update,
)
from torch import nn

from kdx.components import Network
from kdx.taps import Tap, Tapped

TERMS, PLUGINS = (0, 2, 6, 10), 20
PLUGIN = """
    import kdx
    from torch import Tensor

    class Spare{i}(kdx.Loss):
        \"\"\"The mean square of the student's logits.\"\"\"

        name = "spare_{i}"
        inputs = {{"student": "student.logits"}}

        def forward(self, student: Tensor) -> Tensor:
            return student.square().mean(1)

    @kdx.hookimpl
    def kdx_losses() -> list[type[kdx.Loss]]:
        return [Spare{i}]

    @kdx.hookimpl
    def kdx_step_end(report: kdx.StepReport) -> None:
        pass
"""


def plugin_files(folder: Path, count: int) -> tuple[str, ...]:
    files = [folder / f"spare_{i}.py" for i in range(count)]
    for i, file in enumerate(files):
        file.write_text(textwrap.dedent(PLUGIN.format(i=i)))
    return tuple(str(file) for file in files)


def by_hand(terms: int) -> Update:
    """The plain loop of a small net with so many more terms."""
    task = make_task(NETS["mlp"], "logits")
    student = task.net.student()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, fused=True)
    images, labels = task.images[: task.net.batch], task.labels[: task.net.batch]

    def update() -> None:
        logits = student(images)
        loss = F.cross_entropy(logits, labels)
        for _ in range(terms):
            loss = loss + 0.1 * logits.square().mean(1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


def terms(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = plugin_files(Path(folder), max(TERMS))
        task = make_task(NETS["mlp"], "logits")
        more = [{f"spare_{i}": {"use": f"spare_{i}", "weight": 0.1} for i in range(count)} for count in TERMS]
        updates = {f"kdx {len(losses)}": kdx_update(task, files, losses) for losses in more}
        updates |= {f"hand {count}": by_hand(count) for count in TERMS}
        found = in_turns(updates, 4 * rounds, time.process_time, burst=task.net.burst)
    kdx, hand = (np.array([found[f"{way} {count}"] for count in TERMS]) * 1e6 for way in ("kdx", "hand"))
    for name, times in {"kdx": kdx, "by hand": hand, "the engine's part": kdx - hand}.items():
        slopes = np.polyfit(TERMS, times, 1)[0]
        sure = bootstrap((slopes,), np.median, method="percentile", random_state=0).confidence_interval
        print(f"one more term, {name}: {np.median(slopes):.1f} us ({sure.low:.1f} to {sure.high:.1f})")


def plugins(rounds: int) -> None:
    task = make_task(NETS["mlp"], "logits")
    with tempfile.TemporaryDirectory() as folder:
        updates = {"none": kdx_update(task), "many": kdx_update(task, plugin_files(Path(folder), PLUGINS))}
        found = in_turns(updates, 20 * rounds)
    print(f"{PLUGINS} plugins / none: {ratio(found['many'], found['none'])}; ms {spread(found['none'])}")


def stop(rounds: int) -> None:
    net = NETS["resnet"].teacher().eval()
    images = torch.randn(16, 3, 32, 32)

    def upto(layer: int) -> Callable[[], object]:
        tapped = Tapped(Network(net), ["mid"], {"mid": Tap(f"layer{layer}")}, "teacher").eval()
        return lambda: tapped({"image": images})

    def layers(layer: int) -> Callable[[], object]:
        names = ["conv1", "bn1", "act1", "maxpool", *(f"layer{i}" for i in range(1, layer + 1))]
        stem = nn.Sequential(*[net.get_submodule(name) for name in names])
        return lambda: stem(images)

    updates: dict[str, Callable[[], object]] = {"whole": lambda: net(images)}
    for layer in (1, 2, 3, 4):
        updates |= {f"tap {layer}": upto(layer), f"hand {layer}": layers(layer)}
    with torch.no_grad():
        found = in_turns(updates, rounds)
    for layer in (1, 2, 3, 4):
        shares = [ratio(found[f"{way} {layer}"], found["whole"]) for way in ("tap", "hand")]
        print(f"a teacher (resnet34) that ends at layer{layer}: {shares[0]} of the whole, by hand {shares[1]}")


MADE: dict[str, Callable[[Task], Update]] = {"kdx": kdx_update, "plain": plain_update, "tuned": tuned_update}


def memory(rounds: int) -> None:
    context = multiprocessing.get_context("spawn")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)
    for name in ("convnet", "resnet"):
        peaks = {}
        for way in MADE:
            with context.Pool(1) as pool:
                peaks[way] = float(pool.apply(_peak, (name, way, torch.get_num_threads())))
        shown = ", ".join(f"{way} {peak:.1f} MB" for way, peak in peaks.items())
        print(f"peak memory of {name}: {shown}; kdx / plain {peaks['kdx'] / peaks['plain']:.2f}")


def _peak(name: str, way: str, threads: int) -> float:
    torch.set_num_threads(threads)
    warm = make_task(NETS["mlp"], "hint", 2)
    for make in MADE.values():  # what every process needs, libraries included
        make(warm)()
    task = make_task(NETS[name], "hint", 8)
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    update = MADE[way](task)
    for _ in range(3):
        update()
    return (status("VmHWM") - before) * 1024 / 1e6


def optimizers(rounds: int) -> None:
    for name in ("SGD", "AdamW"):
        own: dict[str, Any] = {"momentum": 0.9} if name == "SGD" else {}
        steps: dict[str, Update] = {}
        for way in ({"foreach": False}, {"foreach": True}, {"fused": True}):
            weights = [*NETS["resnet"].student().parameters()]
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            label = next(iter(way)) if any(way.values()) else "plain"
            steps[label] = getattr(torch.optim, name)(weights, lr=1e-3, **own, **way).step
        found = in_turns(steps, rounds)
        foreach, fused = (ratio(found[way], found["plain"]) for way in ("foreach", "fused"))
        print(f"{name} of resnet18: plain {spread(found['plain'])} ms; foreach {foreach}, fused {fused} of it")


IMPORTS = "import torch, timm, torchmetrics"
PARTS_OF_KDX = "from step import *; kdx_update(make_task(NETS['{net}'], 'logits'))()"
BY_HAND = """
from nets import NETS
net = NETS["{net}"]
student, teacher = net.student(), net.teacher()
optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
images = torch.rand(net.batch, *net.shape)
loss = torch.nn.functional.cross_entropy(student(images), teacher(images).softmax(1))
loss.backward()
optimizer.step()
"""
CONFIG = """
name: first
baseline: false
out: {folder}/runs
plugins: [ends.py]
data: {{use: fashion_mnist}}
student: {{use: timm, model: resnet18}}
teachers: {{large: {{use: timm, model: resnet34}}}}
losses: {{ce: {{use: cross_entropy}}, kd: {{use: kd}}}}
train: {{updates: 10, batch: 128, lr: 0.1, optimizer: {{use: sgd, momentum: 0.9}}}}
runtime: {{device: cpu, threads: 1}}
"""
ENDS = """
import os
import kdx

@kdx.hookimpl
def kdx_step_end(report: kdx.StepReport) -> None:
    os._exit(0)
"""


def start(rounds: int) -> None:
    here = Path(__file__).parent
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def run(*command: str) -> tuple[float, float]:
        """Seconds of the wall clock and of the processor."""
        wall, before = time.perf_counter(), os.times()
        subprocess.run([sys.executable, *command], check=True, cwd=here, env=kept, stdout=subprocess.DEVNULL)
        after = os.times()
        used = after.children_user - before.children_user + after.children_system - before.children_system
        return time.perf_counter() - wall, used

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "ends.py").write_text(ENDS)
        (Path(folder) / "first.yaml").write_text(CONFIG.format(folder=folder))
        ways = {
            "python alone": ("-c", "pass"),
            "import kdx, without torch": ("-c", "import sys, kdx; sys.exit('torch' in sys.modules)"),
            "kdx --help": ("-m", "kdx", "--help"),
            IMPORTS: ("-c", IMPORTS),
            "first update of convnet by hand": ("-c", "import torch" + BY_HAND.format(net="convnet")),
            "first update of convnet, parts of kdx": ("-c", PARTS_OF_KDX.format(net="convnet")),
            "first update of resnet by hand": ("-c", IMPORTS + BY_HAND.format(net="resnet")),
            "first update of resnet, kdx run": ("-m", "kdx", "run", "--fresh", "--quiet", f"{folder}/first.yaml"),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for turn in range(1 + max(3, rounds // 10)):
            for name, command in ways.items():
                took = run(*command)
                if turn:  # the first one writes bytecode
                    found[name].append(took)
    for name, seconds in found.items():
        wall, used = (statistics.median(one[place] for one in seconds) for place in (0, 1))
        print(f"{name}: {wall:.2f} s, of the processor {used:.2f} s")
    processor = {name: [one[1] for one in seconds] for name, seconds in found.items()}
    for net, way in (("convnet", "parts of kdx"), ("resnet", "kdx run")):
        ours = processor[f"first update of {net}, {way}"]
        shares = [ratio(ours, processor[name]) for name in (IMPORTS, f"first update of {net} by hand")]
        print(f"first update of {net}, {way}, processor: {shares[0]} of the imports, {shares[1]} of that by hand")


PARTS = {
    "terms": terms, "plugins": plugins, "stop": stop, "memory": memory, "optimizers": optimizers, "start": start,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine())
    for part in options.parts:
        PARTS[part](options.rounds)


if __name__ == "__main__":
    main()
