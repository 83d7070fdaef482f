"""The processes of a run, which `torchrun` starts: which samples are whose, and all that they tell each other."""

from __future__ import annotations

import atexit
import functools
import gc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from types import FunctionType, ModuleType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdx.errors import ConfigError, KdxError
from kdx.group import Group
from kdx.randomness import derive_seed
from kdx.stopping import Stopped
from kdx.types import Batch, Losses

T = TypeVar("T")

PATIENCE = timedelta(hours=24)
"""How long processes wait for each other: the first one may be copying or converting data."""
_NO_HOLDERS = (type, ModuleType, FunctionType, Tensor)
"""What leads to no metric of one evaluation, but on to whole modules."""


def gather(x: Tensor) -> Tensor:
    """The rows of all processes for a tensor `[b, ...]` of the present batch, in the order of the batch, `[B, ...]`.

    Differentiable: the gradient of a row is the sum of those that all processes have for it. On one process `x` itself.
    The only call by which a plugin may reach other processes; all of them must make it.
    """
    return the_group().gather(x)


def leave_out_exchange(metric: object) -> None:
    """Let the metrics of torchmetrics that an object keeps anywhere say nothing to other processes: each is given the
    answers of all, which they would count once for every process.
    """
    waiting, seen = [metric], set[int]()
    while waiting:
        found: Any = waiting.pop()
        if id(found) in seen or isinstance(found, _NO_HOLDERS):
            continue
        seen.add(id(found))
        if isinstance(found, nn.Module) and hasattr(found, "sync_on_compute"):  # loading torchmetrics takes a second
            for name in ("sync_on_compute", "dist_sync_on_step", "_to_sync"):
                setattr(found, name, False)
        waiting += filter(gc.is_tracked, gc.get_referents(found))


class Processes(Group):
    """One process of several, or one that a person wants to work like one of several."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._sizes: tuple[int, ...] = ()
        self._batch = 0
        self._apart = True  # but for the passes of a batch that all of them work at
        self._seed = self._drawn = 0
        self._generators: dict[str, torch.Generator] = {}

    def own(self, indices: list[int], parts: int) -> list[int]:
        mine: list[int] = []
        for first, sizes in self._layout(len(indices), parts):
            start = first + sum(sizes[: self.rank])
            mine += indices[start : start + sizes[self.rank]]
        return mine

    def expect(self, batch: int, parts: int) -> None:
        least = min(min(sizes) for _, sizes in self._layout(batch, parts))
        if least < 1:
            raise ConfigError(
                f"train.batch: a batch of {batch} samples in {parts} parts leaves some of {self.size} processes "
                f"without a sample; expected at least {self.size * parts}, or fewer processes"
            )
        self._batch = batch

    def parts(self, batch: Batch, count: int) -> Iterator[tuple[Batch, float, bool]]:
        layout = [*self._layout(self._batch, count)]
        first = 0
        try:
            for place, (_, sizes) in enumerate(layout, 1):
                own = sizes[self.rank]
                self._sizes, self._apart = sizes, False
                part = {name: value[first : first + own] for name, value in batch.items()}
                yield part, sum(sizes) / self._batch, place == len(layout)
                first += own
        finally:
            self._apart = True

    def samples(self, batch: Batch) -> int:
        return self._batch

    def begin(self, seed: int, step: int) -> None:
        # Of (seed, update, process) and nothing else, so no process has to save the state of its random numbers.
        torch.manual_seed(derive_seed(seed, "training", step, self.rank))
        self._seed, self._drawn = derive_seed(seed, "training", step), 0
        for name, generator in self._generators.items():
            generator.manual_seed(derive_seed(seed, "generator", name, step, self.rank))

    def gather(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        if self._apart:
            return x
        sizes = self._sizes if sizes is None else tuple(sizes)
        if len(x) != sizes[self.rank]:
            raise KdxError(f"gather: found {len(x)} rows, expected the {sizes[self.rank]} that this process has")
        gathered: Tensor = _Gather.apply(x, tuple(sizes), self.rank)
        return gathered

    def slice(self, x: Tensor) -> Tensor:
        if self._apart:
            return x
        start = sum(self._sizes[: self.rank])
        return x[start : start + self._sizes[self.rank]]

    def over_all(self, losses: Losses) -> Losses:
        names = {
            **{f"part {name}": value for name, value in losses.parts.items()},
            **{f"term {name}": value for name, value in losses.means.items()},
            **{f"knob {name}": value.float().mean() for name, value in losses.knobs.items()},
        }
        total, *rest = self._means([losses.total, *names.values()])
        found = dict(zip(names, rest, strict=True))
        return replace(
            losses,
            total=total,
            parts={name: found[f"part {name}"] for name in losses.parts},
            terms=(means := {name: found[f"term {name}"] for name in losses.means}),
            means=means,
            knobs={name: found[f"knob {name}"] for name in losses.knobs},
        )

    def _means(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The means over the present batch of means over the samples of each process. The graph of each leads to what
        this process had a part in, for gradients that are then averaged over the processes.
        """
        weight = self._sizes[self.rank] * self.size / sum(self._sizes)  # 1 where all have equally many samples
        own = [value * weight for value in values]
        stacked = torch.stack([value.detach() for value in own])
        dist.all_reduce(stacked)
        whole = (stacked / self.size).unbind()
        return [
            value + (mean - value.detach()) if value.requires_grad else mean
            for value, mean in zip(own, whole, strict=True)
        ]

    def seen(self, part: Batch, values: Mapping[T, Tensor]) -> tuple[Batch, Mapping[T, Tensor]]:
        if not values:
            return part, values
        batch: Batch = {name: self.gather(part[name]) for name in part if name in ("label", "index")}
        return batch, {key: self.gather(value) if value.ndim else value for key, value in values.items()}

    def stop(self, asked: Callable[[], bool]) -> Callable[[], bool]:
        return StopTogether(self, asked)

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for same in kinds.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in same])
            dist.all_reduce(flat)
            flat /= self.size
            for tensor, mean in zip(same, _pieces(flat, same), strict=True):
                tensor.copy_(mean.view(tensor.shape))

    def any(self, flags: Sequence[bool]) -> list[bool]:
        told = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in told.tolist()]

    def agreed(self, value: T) -> T:
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        found: T = box[0]
        return found

    def wait(self) -> None:
        self.any([True])  # among the hosts: a barrier of GPUs would need one of them to be chosen

    @torch.no_grad()
    def spread(self, module: nn.Module) -> None:
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.numel():
                whole = tensor.detach().contiguous()
                dist.broadcast(whole, src=0)
                if whole.data_ptr() != tensor.data_ptr():
                    tensor.copy_(whole)

    @property
    def is_apart(self) -> bool:
        return self._apart

    def draws_alone(self, name: str, generator: torch.Generator) -> None:
        self._generators[name] = generator

    @contextmanager
    def common(self) -> Iterator[None]:
        self._drawn += 1
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(self._seed, self._drawn))
            yield

    def share(self, indices: list[int]) -> list[int]:
        return indices if len(indices) < self.size else self.own(indices, 1)

    def over(self, batches: Iterable[Batch], count: int, size: int) -> Iterator[Batch]:
        try:
            for first, batch in zip(range(0, count, size), batches, strict=True):
                together = min(size, count - first)
                self._sizes, self._apart = cut(together, self.size), together < self.size
                yield batch
        finally:
            self._apart = True

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        if not self.leads:
            if stopped := self.agreed(""):
                raise Stopped(stopped)
            yield
            return
        try:
            yield
        except Stopped as reason:  # the others, who wait, would else go through the block
            self.agreed(str(reason))
            raise
        self.agreed("")

    def _layout(self, count: int, parts: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """For each micro-batch of a batch its first sample, and how many of its samples each process has."""
        length = -(-count // parts)  # as torch.chunk does
        for first in range(0, count, length):
            yield first, cut(min(length, count - first), self.size)


def _pieces(flat: Tensor, like: Sequence[Tensor]) -> Iterator[Tensor]:
    """A flat tensor in pieces of these sizes."""
    first = 0
    for tensor in like:
        yield flat[first : first + tensor.numel()]
        first += tensor.numel()


class _Gather(torch.autograd.Function):
    """Rows of all processes; both ways can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...], rank: int) -> Tensor:
        ctx.sizes, ctx.rank = sizes, rank
        most = max(sizes)
        sent = x.contiguous()
        if x.dtype is torch.bool:
            sent = sent.to(torch.uint8)
        if len(x) < most:
            sent = torch.cat([sent, sent.new_zeros(most - len(x), *x.shape[1:])])
        found = sent.new_empty(len(sizes) * most, *x.shape[1:])
        dist.all_gather([*found.chunk(len(sizes))], sent)
        if min(sizes) < most:
            found = torch.cat([found[place * most :][:own] for place, own in enumerate(sizes)])
        return found.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        whole: Tensor = _Sum.apply(gradients[0])
        start = sum(ctx.sizes[: ctx.rank])
        return whole[start : start + ctx.sizes[ctx.rank]], None, None


class _Sum(torch.autograd.Function):
    """The sum over all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        whole = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        whole: Tensor = _Sum.apply(gradients[0])
        return whole


class StopTogether:
    """A wish to stop that all processes follow at the same update: they ask each other at every `every`-th call."""

    def __init__(self, group: Group, stop: Callable[[], bool], every: int = 10) -> None:
        self._group = group
        self._stop = stop
        self._every = every
        self._calls = 0
        self._asked = False

    def __call__(self) -> bool:
        self._calls += 1
        if not self._asked and self._calls % self._every == 0:
            self._asked = self._group.any([self._stop()])[0]
        return self._asked


def cut(count: int, pieces: int) -> tuple[int, ...]:
    """A number in `pieces` nearly equal parts, the larger ones first."""
    whole, rest = divmod(count, pieces)
    return tuple(whole + (place < rest) for place in range(pieces))


def world_size() -> int:
    """How many processes `torchrun` has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """The place of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@functools.cache
def the_group() -> Group:
    """The group of this process. Joins the others when it is first asked for."""
    if world_size() == 1:
        return Group()
    backend = "gloo"
    if torch.cuda.is_available():
        here, there = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if local_rank() < there:
            torch.cuda.set_device(local_rank())
        backend = "cpu:gloo,cuda:nccl" if here <= there else "gloo"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        rank = _number("RANK")
        dist.init_process_group(backend, store=_store(), rank=rank, world_size=world_size(), timeout=PATIENCE)
    else:
        dist.init_process_group(backend, timeout=PATIENCE)
    atexit.register(_leave)
    return Processes()


def _store() -> Any:
    """Where processes find each other. torchrun keeps it when it starts them again, and with it the addresses of those
    that are gone, so each start has names of its own.
    """
    host, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT")
    kept = dist.TCPStore(host, port, world_size(), is_master=False)  # type: ignore[attr-defined]
    attempt = _number("TORCHELASTIC_RESTART_COUNT")
    return dist.PrefixStore(f"kdx/{attempt}", kept)  # type: ignore[attr-defined]


def _number(name: str) -> int:
    return int(os.environ[name])


def _leave() -> None:
    if dist.is_initialized():
        gc.collect()  # modules that hold the group; what is left to the end of the interpreter may abort it
        dist.destroy_process_group()
