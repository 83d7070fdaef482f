"""The one place that knows devices and precision."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kdx.components import Network
from kdx.devices import DTYPES, check_precision
from kdx.distributed import the_group
from kdx.errors import ConfigError, PluginError
from kdx.nonfinite import Faults
from kdx.one_graph import OneGraph, can_be_one, compiler_of
from kdx.optim import bare_step
from kdx.parallel import Parallel, pick_own_device
from kdx.sections import RuntimeOptions
from kdx.shards import local
from kdx.types import Batch, Losses
from kdx.updater import Engine

FOLD_EVERY = 64
"""After so many spans on a GPU those that are over are added up."""


class Runtime(Engine):
    """Places modules and batches, and does backward and update in the precision of the run."""

    optimizer: torch.optim.Optimizer

    def __init__(self, options: RuntimeOptions) -> None:
        self.options = options
        self.group = the_group()
        self.device = pick_own_device(options.device)
        self.precision = options.precision
        check_precision(self.precision, self.device)
        self.stopwatch = Stopwatch(self.device)
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._dtype = DTYPES.get(self.precision)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self._clip: float | None = None
        self._graph: OneGraph | None = None
        self._parallel = Parallel(self.group, options.parallel)
        self._stepped = self._lazy = False
        self.faults = Faults(self.device, self.group.average if self.group.size > 1 else None)
        if options.threads is not None:
            torch.set_num_threads(options.threads)

    def mirror(self, network: Network) -> Network:
        """The network that is evaluated and kept in place of `network`, before `join`."""
        return self._parallel.mirror(network)

    def refresh(self) -> None:
        """Let the network that is evaluated have the present weights."""
        self._parallel.refresh()

    def join(self, learner: nn.Module, *, by_hand: bool, by_total: bool, lent: bool) -> Callable[..., Losses]:
        """What runs the learner so that all processes learn the same; before the optimizer is made.

        `by_hand` is for updaters that take the backward pass apart, `by_total` for those that only follow the total;
        `lent` says whether nodes call parts of models.
        """
        self._lazy = not by_hand
        alone = self.group.size == 1 and not self._scaler.is_enabled()
        if self.options.compile and by_total and alone and can_be_one():
            self._graph = OneGraph(learner, compiler_of(self.device))
            return self._graph
        return self._parallel.join(learner, by_hand, lent)

    def syncing(self, last: bool) -> AbstractContextManager[object]:
        """The context of the passes of a micro-batch: gradients are shared with the last one of an update."""
        return self._parallel.syncing(last)

    def prepare(
        self,
        learner: nn.Module,
        optimizer: torch.optim.Optimizer,
        clip: float | None,
        own: Sequence[nn.Parameter] = (),
    ) -> None:
        """Take charge of what is trained: the learner, and the updater's own parameters."""
        self._named = {name: weight for name, weight in learner.named_parameters() if weight.requires_grad}
        self._trained = [*self._named.values(), *(weight for weight in own if weight.requires_grad)]
        self._by_dtype = [
            [weight for weight in self._trained if weight.dtype == dtype]
            for dtype in {weight.dtype: None for weight in self._trained}
        ]
        self._shared = self._parallel.left_over(learner, [*own])
        self.optimizer = optimizer
        self._step = bare_step(optimizer)
        self._clip = clip
        self._decides = getattr(optimizer, "_step_supports_amp_scaling", False) and not self._scaler.is_enabled()
        if self._decides:  # a fused optimizer reads on the device whether it is to do nothing
            optimizer.grad_scale, optimizer.found_inf = None, self.faults.found  # type: ignore[attr-defined]

    def place(self, module: nn.Module) -> None:
        """Move a module to the device, in channels-last layout and compiled if the run says so."""
        module.to(self.device)
        if self.options.channels_last:
            module.to(memory_format=torch.channels_last)
        if self.options.compile:
            module.compile(**compiler_of(self.device))

    def move(self, batch: Batch) -> Batch:
        """A batch on the device.

        The host is ahead of a GPU: what it copies on a stream of its own arrives while updates before are computed.
        """
        if self._copies is not None:
            present = torch.cuda.current_stream(self.device)
            with torch.cuda.stream(self._copies):
                moved = {name: value.pin_memory().to(self.device, non_blocking=True) for name, value in batch.items()}
            present.wait_stream(self._copies)
            for value in moved.values():
                value.record_stream(present)  # its memory is that of the stream that copies
            return moved
        if self.device.type == "cpu":
            return batch
        return {name: value.to(self.device) for name, value in batch.items()}

    def wait(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def autocast(self) -> AbstractContextManager[object]:
        """The context of forward passes; without effect in fp32."""
        return nullcontext() if self._dtype is None else torch.autocast(self.device.type, self._dtype)

    def backward(self, value: Tensor, share: float = 1.0) -> None:
        if self._graph is not None and (found := self._graph.take(value)) is not None:
            for weight, gradient in found:
                if share != 1:
                    gradient.mul_(share)
                weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
            return
        value = value if share == 1 else value * share
        (self._scaler.scale(value) if self._scaler.is_enabled() else value).backward()  # type: ignore[no-untyped-call]

    def update(self) -> None:
        self._parallel.share(self._shared)
        if self._scaler.is_enabled():
            self._scaler.unscale_(self.optimizer)
            (overflown,) = self._scaler._found_inf_per_device(self.optimizer).values()
            scale = self._scaler._get_scale_async()
            assert scale is not None
            self.faults.judge_scaled(overflown, scale)
        else:
            self.faults.judge(
                [[local(weight.grad) for weight in group if weight.grad is not None] for group in self._by_dtype]
            )
        if self._clip is not None:
            self._parallel.clip(self._trained, self._clip)
        if self._scaler.is_enabled():
            if self._may_step(overflown):
                self._scaler.step(self.optimizer)
                self._stepped = True
            self._scaler.update()
        elif self._may_step(self.faults.found):
            with torch.no_grad():
                self._step()
            self._stepped = True
        for weight in self._trained:  # as `zero_grad` does, without its record for profilers
            weight.grad = None

    def _may_step(self, found: Tensor) -> bool:
        """Whether to call the optimizer, for an update that is to be left out where `found` is not 0.

        Waits for a device that cannot skip an update by itself where that must be known: for the first update, in which
        the state of an optimizer is made (a fused one leaves it undefined if it then does nothing), and where faults
        are skipped.
        """
        begun = self._stepped or bool(self.optimizer.state)
        if begun and (self._decides or self._scaler.is_enabled()):
            return True
        must_know = self.device.type == "cpu" or self.faults.skip or not begun
        return not (must_know and found.item())

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(self._trained)

    def gradients(
        self, value: Tensor, weights: Sequence[Tensor] | None = None, *, retain: bool = True
    ) -> list[Tensor | None]:
        self._check_eager("gradients")
        if self.options.compile:
            raise ConfigError(
                "runtime.compile: the updater takes the losses apart, which a compiled step does not allow"
            )
        chosen = self._trained if weights is None else [*weights]
        if not value.requires_grad or not chosen:
            return self._parallel.averaged([None] * len(chosen), chosen)
        if not self._scaler.is_enabled():
            found = torch.autograd.grad(value, chosen, retain_graph=retain, allow_unused=True)
            return self._parallel.averaged(found, chosen)
        scaled = torch.autograd.grad(self._scaler.scale(value), chosen, retain_graph=retain, allow_unused=True)
        inverse = 1 / self._scaler.scale(torch.ones((), device=self.device))
        true = [None if gradient is None else gradient * inverse for gradient in scaled]
        return self._parallel.averaged(true, chosen)

    @torch.no_grad()
    def add(self, gradients: Sequence[Tensor | None]) -> None:
        scale = self._scaler.scale(torch.ones((), device=self.device)) if self._scaler.is_enabled() else None
        for weight, gradient in zip(self._trained, gradients, strict=True):
            if gradient is not None:
                gradient = gradient if scale is None else gradient * scale
                if weight.grad is None:
                    weight.grad = torch.empty_like(weight).copy_(gradient)  # in the layout of the weight
                else:
                    weight.grad.add_(gradient)

    def look(
        self, batch: Batch, evaluate: Callable[[Mapping[str, Tensor], Batch | None], Losses] | None = None
    ) -> None:
        """Take the micro-batch that the updater sees next, and what evaluates the learner on it if it looks ahead."""
        self._batch, self._evaluate = batch, evaluate

    @property
    def batch(self) -> Batch:
        return self._batch

    def weights(self, owner: str | None = None) -> dict[str, nn.Parameter]:
        if owner is None:
            return dict(self._named)
        model, _, part = owner.partition(".")
        net = f"models.model/{model}.network.net.{part}".rstrip(".") + "."
        own = (f"nodes.{owner.replace('.', '/', 1)}.", net)
        return {name: weight for name, weight in self._named.items() if name.startswith(own)}

    def losses(self, weights: Mapping[str, Tensor], batch: Batch | None = None) -> Losses:
        if self.options.compile:
            raise ConfigError("runtime.compile: the updater looks ahead, which a compiled step does not allow")
        if batch is not None and self.group.size > 1:
            raise ConfigError(
                f"train.updater: it tries the learner on other samples than those of the update, which "
                f"{self.group.size} processes do not allow; start kdx without torchrun"
            )
        if self._evaluate is None:
            self._check_eager("losses")
            raise PluginError(
                "train.updater: it asks for `engine.losses` after the update, expected in `backward`, `step`"
            )
        return self.group.over_all(self._evaluate(weights, batch))

    def _check_eager(self, asked: str) -> None:
        """Raise `PluginError` for an updater for which the engine did not make itself ready."""
        if self._lazy:
            raise PluginError(f"train.updater: it asks for `engine.{asked}`, but its class does not say `eager = True`")

    def state(self) -> dict[str, object]:
        """What a resumed run needs."""
        return {"scaler": self._scaler.state_dict()}

    def load_state(self, state: dict[str, object]) -> None:
        """Take up `state`."""
        scaler = state["scaler"]
        if isinstance(scaler, dict) and scaler:
            self._scaler.load_state_dict(scaler)


class _Phase:
    """Adds the time of a block to a phase; made once, as it is entered several times in every update."""

    def __init__(self, watch: Stopwatch, name: str) -> None:
        self._watch = watch
        self._name = name
        self._began = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._watch.add(self._name, time.perf_counter() - self._began)


class _CudaPhase:
    """The same for a GPU, by events on the stream that is in use."""

    def __init__(self, watch: Stopwatch, name: str, device: torch.device) -> None:
        self._watch = watch
        self._name = name
        self._device = device

    def __enter__(self) -> None:
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._stream = torch.cuda.current_stream(self._device)  # not that of the first GPU
        self._start.record(self._stream)

    def __exit__(self, *error: object) -> None:
        self._end.record(self._stream)
        self._watch.spans.append(self._name, self._start, self._end)


class Stopwatch:
    """Seconds spent in named phases; on a GPU by events, which do not make the host wait."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._phases: dict[str, _Phase | _CudaPhase] = {}
        self.spans = Spans(self.add)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Add the time of the block to `name`; a phase is not entered within itself."""
        found = self._phases.get(name)
        if found is None:
            found = _CudaPhase(self, name, self._device) if self._cuda else _Phase(self, name)
            self._phases[name] = found
        return found

    def add(self, name: str, seconds: float) -> None:
        """Add seconds measured elsewhere."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        """The seconds by phase so far. Waits for the device."""
        if self.spans:
            torch.cuda.synchronize(self._device)
            self.spans.fold()
        return dict(self._seconds)


class Moment(Protocol):
    """A point in the work of a device, as `torch.cuda.Event` is one."""

    def query(self) -> bool: ...

    def elapsed_time(self, end_event: Any) -> float: ...


class Spans:
    """Spans between moments of a device. Now and then those that are over become seconds, so that a run of many updates
    does not keep the moments of all; the host never waits for it.
    """

    def __init__(self, add: Callable[[str, float], None]) -> None:
        self._add = add
        self._spans: deque[tuple[str, Moment, Moment]] = deque()
        self._since = 0

    def __len__(self) -> int:
        return len(self._spans)

    def append(self, name: str, start: Moment, end: Moment) -> None:
        """Take one more span of a phase, from `start` to `end` on the same stream."""
        self._spans.append((name, start, end))
        self._since += 1
        if self._since == FOLD_EVERY:
            self._since = 0
            self.fold()

    def fold(self) -> None:
        """Add the seconds of the first spans, up to one that the device has not come to the end of."""
        while self._spans and self._spans[0][2].query():
            name, start, end = self._spans.popleft()
            self._add(name, start.elapsed_time(end) / 1000.0)
