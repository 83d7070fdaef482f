"""The one place that knows devices and precision."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from kdx.components import Engine
from kdx.errors import ConfigError
from kdx.sections import RuntimeOptions
from kdx.types import Batch

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


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
        self._dtype = _DTYPES.get(self.precision)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self._clip: float | None = None
        if options.threads is not None:
            torch.set_num_threads(options.threads)

    def prepare(self, learner: nn.Module, optimizer: torch.optim.Optimizer, clip: float | None) -> None:
        """Take charge of what is trained."""
        self._trained = [parameter for parameter in learner.parameters() if parameter.requires_grad]
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
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`."""
        if self._cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            yield
            end.record()
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
            torch.cuda.synchronize()
            for name, start, end in self._events:
                self.add(name, start.elapsed_time(end) / 1000.0)
            self._events.clear()
        return dict(self._seconds)


def pick_device(name: str) -> torch.device:
    """The device that a config names; `auto` is a GPU where there is one. Raises `ConfigError` for an absent one."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"runtime.device: found {name!r}, expected auto, cpu, cuda, cuda:0 or mps") from error
    absent = (device.type == "cuda" and not cuda) or (device.type == "mps" and not mps)
    if absent or device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(
            f"runtime.device: found {name!r}, but this machine has no such device; auto takes what is there"
        )
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ConfigError(f"runtime.device: found {name!r}, but there are {torch.cuda.device_count()} GPUs")
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """The precision of forward passes: `auto` is bf16 (else fp16) on a GPU and fp32 elsewhere.

    A CPU without bf16 units is more than ten times slower in bf16, so `auto` never takes it there.
    """
    if name == "auto":
        if device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if name == "fp16" and device.type == "cpu":
        raise ConfigError("runtime.precision: fp16 needs a GPU; a CPU computes in fp32 or bf16")
    return name
