"""The one place that knows devices and precision."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from kdx.devices import DTYPES, pick_device, pick_precision
from kdx.errors import ConfigError
from kdx.sections import RuntimeOptions
from kdx.types import Batch, Losses
from kdx.updater import Engine


class Runtime(Engine):
    """Places modules and batches, and does backward and update in the precision of the run."""

    optimizer: torch.optim.Optimizer

    def __init__(self, options: RuntimeOptions) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("WORLD_SIZE: a run uses one process; start kdx without torchrun")
        self.options = options
        self.device = pick_device(options.device)
        self.precision = pick_precision(options.precision, self.device)
        self.stopwatch = Stopwatch(self.device)
        self._dtype = DTYPES.get(self.precision)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self._clip: float | None = None
        if options.threads is not None:
            torch.set_num_threads(options.threads)

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
        self.optimizer = optimizer
        self._clip = clip

    def place(self, module: nn.Module) -> None:
        """Move a module to the device, in channels-last layout and compiled if the run says so."""
        module.to(self.device)
        if self.options.channels_last:
            module.to(memory_format=torch.channels_last)
        if self.options.compile:
            module.compile()

    def move(self, batch: Batch) -> Batch:
        """A batch on the device."""
        if self.device.type == "cuda":
            return {name: value.pin_memory().to(self.device, non_blocking=True) for name, value in batch.items()}
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

    def backward(self, value: Tensor) -> None:
        (self._scaler.scale(value) if self._scaler.is_enabled() else value).backward()  # type: ignore[no-untyped-call]

    def update(self) -> None:
        if self._clip is not None:
            self._scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self._trained, self._clip)
        if self._scaler.is_enabled():
            self._scaler.step(self.optimizer)
            self._scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(self._trained)

    def gradients(
        self, value: Tensor, weights: Sequence[Tensor] | None = None, *, retain: bool = True
    ) -> list[Tensor | None]:
        if self.options.compile:
            raise ConfigError(
                "runtime.compile: the updater takes the losses apart, which a compiled step does not allow"
            )
        chosen = self._trained if weights is None else [*weights]
        if not value.requires_grad or not chosen:
            return [None] * len(chosen)
        if not self._scaler.is_enabled():
            return [*torch.autograd.grad(value, chosen, retain_graph=retain, allow_unused=True)]
        scaled = torch.autograd.grad(self._scaler.scale(value), chosen, retain_graph=retain, allow_unused=True)
        inverse = 1 / self._scaler.scale(torch.ones((), device=self.device))
        return [None if gradient is None else gradient * inverse for gradient in scaled]

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

    def look(self, batch: Batch, evaluate: Callable[[Mapping[str, Tensor], Batch | None], Losses]) -> None:
        """Take the micro-batch that the updater sees next, and what evaluates the learner on it."""
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
        return self._evaluate(weights, batch)

    def state(self) -> dict[str, object]:
        """What a resumed run needs."""
        return {"scaler": self._scaler.state_dict()}

    def load_state(self, state: dict[str, object]) -> None:
        """Take up `state`."""
        scaler = state["scaler"]
        if isinstance(scaler, dict) and scaler:
            self._scaler.load_state_dict(scaler)


class Stopwatch:
    """Seconds spent in named phases; on a GPU by events, which do not make the host wait."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`."""
        if self._cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            stream = torch.cuda.current_stream(self._device)  # not that of the first GPU
            start.record(stream)
            yield
            end.record(stream)
            self._events.append((name, start, end))
            return
        began = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - began)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds measured elsewhere."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        """The seconds by phase so far. Waits for the device."""
        if self._events:
            torch.cuda.synchronize(self._device)
            for name, start, end in self._events:
                self.add(name, start.elapsed_time(end) / 1000.0)
            self._events.clear()
        return dict(self._seconds)
