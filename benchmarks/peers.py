"""One update with a teacher's logits in kdx and in other libraries, each loop as the library's own pages show it.

    pip install "kdx[bench]"
    python benchmarks/peers.py [--net resnet convnet] [--rounds 30]

All train the same nets on batches of the same size with SGD and momentum, the divergence at temperature 4 and
cross-entropy, log nothing and save nothing. A library that owns its loop runs in a thread which stops whenever it asks
for a batch, so that all can take turns; a library that is not installed is left out. ModelOpt averages its terms where
the others add them, at the same price.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from nets import NETS
from step import LR, TEMPERATURE, Task, Update, in_turns, kdx_update, machine, make_task, plain_update, ratio, spread
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset


class Turns(IterableDataset[Any]):
    """Batches of a task, each given only when `step` is called; `step` returns when the next one is asked for."""

    def __init__(self, task: Task, run: Callable[[Task, Any], None]) -> None:
        self.task, self.run = task, run
        self.asked, self.go = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None
        self.threads = torch.get_num_threads()
        threading.Thread(target=self._work, daemon=True).start()
        self._wait()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        task = self.task
        while True:
            for chosen in torch.randperm(len(task.images)).split(task.net.batch):
                self.asked.release()
                self.go.acquire()
                yield task.images[chosen], task.labels[chosen]

    def step(self) -> None:
        self.go.release()
        self._wait()

    def _wait(self) -> None:
        self.asked.acquire()
        if self.error is not None:
            raise self.error

    def _work(self) -> None:
        torch.set_num_threads(self.threads)  # a number of each thread's own
        try:
            self.run(self.task, DataLoader(self, batch_size=None))
        except BaseException as error:
            self.error = error
            self.asked.release()


def losses(logits: Tensor, answers: Tensor, labels: Tensor) -> Tensor:
    log_q, p = F.log_softmax(logits / TEMPERATURE, 1), F.softmax(answers / TEMPERATURE, 1)
    return F.cross_entropy(logits, labels) + TEMPERATURE**2 * F.kl_div(log_q, p, reduction="batchmean")


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9)


def timm_task(task: Task, loader: Any) -> None:
    from timm.task import LogitDistillationTask

    nets = [task.net.student(), task.net.teacher()]
    for net in nets:  # what timm's own nets say of themselves
        about: Any = net
        about.num_classes, about.in_chans = task.net.classes, task.net.shape[0]
        about.pretrained_cfg = {"mean": (0.5,) * task.net.shape[0], "std": (0.5,) * task.net.shape[0]}
    distillation = LogitDistillationTask(
        nets[0], nets[1], nn.CrossEntropyLoss(), distill_loss_weight=1.0, task_loss_weight=1.0,
        temperature=TEMPERATURE, verbose=False,
    )  # fmt: skip
    distillation.train()
    optimizer = sgd(nets[0])
    for images, labels in loader:
        found = distillation(images, labels)
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()


def accelerate(task: Task, loader: Any) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    student, teacher = task.net.student(), task.net.teacher().eval()
    student, optimizer, loader = accelerator.prepare(student, sgd(student), loader)
    for images, labels in loader:
        optimizer.zero_grad()
        with torch.no_grad():
            answers = teacher(images)
        accelerator.backward(losses(student(images), answers, labels))
        optimizer.step()


def transformers(task: Task, loader: Any) -> None:
    from transformers import Trainer, TrainingArguments

    teacher = task.net.teacher().eval()

    class Distiller(Trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return loader

        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **rest: Any) -> Any:
            images, labels = inputs
            logits = model(images)
            with torch.no_grad():
                answers = teacher(images)
            loss = losses(logits, answers, labels)
            return (loss, logits) if return_outputs else loss

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=10**6, logging_strategy="no", save_strategy="no", report_to="none", use_cpu=True,
            lr_scheduler_type="constant", disable_tqdm=True, max_grad_norm=0.0,
        )  # fmt: skip
        student = task.net.student()
        Distiller(model=student, args=arguments, optimizers=(sgd(student), None)).train()


def lightning(task: Task, loader: Any) -> None:
    import lightning as library

    class Distiller(library.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = task.net.student(), task.net.teacher().eval()

        def training_step(self, batch: Any, number: int) -> Tensor:
            images, labels = batch
            with torch.no_grad():
                answers = self.teacher(images)
            return losses(self.student(images), answers, labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self.student)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = library.Trainer(
        max_steps=10**6, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Distiller(), loader)


def torchdistill(task: Task, loader: Any) -> None:
    from torchdistill.core.distillation import get_distillation_box

    logits = {f"{role}_module_{part}": value for role in ("student", "teacher")
              for part, value in (("path", "."), ("io", "output"))}  # fmt: skip
    divergence = {"key": "KDLoss", "kwargs": {**logits, "temperature": TEMPERATURE, "alpha": 1.0, "beta": 1.0}}
    config = {
        "num_epochs": 1,
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": {"lr": LR, "momentum": 0.9}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": divergence, "weight": 1.0}}},
        },
    }
    nets = {"teacher_model": task.net.teacher().eval(), "student_model": task.net.student()}
    box = get_distillation_box(
        **nets, dataset_dict={}, train_config=config, device=torch.device("cpu"), device_ids=None, distributed=False,
        lr_factor=1,
    )  # fmt: skip
    box.train_data_loader = loader  # a loader of its own would collate sample by sample, which no other one here does
    box.pre_epoch_process(epoch=0)
    for images, labels in box.train_data_loader:
        loss = box.forward_process(images, labels)
        box.post_forward_process(loss=loss)


def modelopt(task: Task, loader: Any) -> None:
    import modelopt.torch.distill as library

    class Student(nn.Module):
        """It adds modules to the net that it is given, which a net that calls all of its own in turn would call too."""

        def __init__(self) -> None:
            super().__init__()
            self.net = task.net.student()

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.net(images)
            return logits

    config = {
        "teacher_model": task.net.teacher(),
        "criterion": library.LogitsDistillationLoss(temperature=TEMPERATURE, reduction="batchmean"),
        "loss_balancer": library.StaticLossBalancer(),
    }
    student = library.convert(Student(), mode=[("kd_loss", config)])
    optimizer = sgd(student)
    for images, labels in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(student(images), labels)
        student.compute_kd_loss(student_loss=loss).backward()
        optimizer.step()


LOOPS = {
    "torchdistill": torchdistill, "timm": timm_task, "nvidia-modelopt": modelopt, "accelerate": accelerate,
    "transformers": transformers, "lightning": lightning,
}  # fmt: skip


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", nargs="+", choices=[*NETS], default=["mlp", "convnet", "resnet"])
    parser.add_argument("--rounds", type=int, default=30, help="measured turns of each loop")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu", action="store_true", help="measure processor time")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of other libraries
    torch.set_num_threads(options.threads)
    print(f"ms of one update, {'processor time' if options.cpu else 'wall clock'}, median (quartiles); {machine()}")
    for name in options.net:
        task = make_task(NETS[name], "logits")
        updates: dict[str, Update] = {"kdx": kdx_update(task), "by hand": plain_update(task)}
        versions: dict[str, str | None] = {"kdx": installed("kdx"), "by hand": ""}
        for library, run in LOOPS.items():
            versions[library] = installed(library)
            if versions[library]:
                updates[library] = Turns(task, run).step
        clock = time.process_time if options.cpu else time.perf_counter
        found = in_turns(updates, options.rounds, clock, burst=NETS[name].burst)
        for library, version in versions.items():
            if library not in found:
                print(f"{name:<8} {library:<24} not installed")
                continue
            share = ratio(found["kdx"], found[library])
            middle = statistics.median(found[library])
            text = f"kdx takes {share} of it" if middle else ""
            print(f"{name:<8} {library + ' ' + (version or ''):<24} {spread(found[library]):>24}   {text}", flush=True)


if __name__ == "__main__":
    main()
