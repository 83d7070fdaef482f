"""Where a frozen teacher computes if it is not beside the student: another device, main memory, another precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from kdx.devices import DTYPES, check_precision, pick_device
from kdx.sections import ModelOptions
from kdx.types import Batch

T = TypeVar("T")


@dataclass(frozen=True)
class Seat:
    """A frozen model computes on `device` and hands its tensors over on `home`, where the run computes.

    With `offload` its weights lie in main memory and are on the device only while the model runs. `precision` is that
    of the model alone; its tensors are then handed over in float32.
    """

    device: torch.device
    home: torch.device
    offload: bool = False
    precision: str | None = None

    @property
    def rest(self) -> torch.device:
        """Where the weights lie between two passes."""
        return torch.device("cpu") if self.offload else self.device

    @property
    def elsewhere(self) -> bool:
        """Whether the weights are not where the run computes."""
        return self.rest != self.home

    def settle(self, network: nn.Module) -> None:
        """Put the weights where they rest; in pinned memory where a GPU is to fetch them."""
        network.to(self.rest)
        if self.offload and self.device.type == "cuda":
            for stored in _stored(network):
                stored.data = stored.data.pin_memory()

    def use(self, network: nn.Module, batch: Batch, run: Callable[[Batch], T]) -> T:
        """What `run` gives for the batch on the device, the weights being there too."""
        wait = self.device.type == "cpu"  # the host would read what a GPU has not written yet
        moved = {name: value.to(self.device, non_blocking=not wait) for name, value in batch.items()}
        with self._present(network), self._autocast():
            return run(moved)

    def hand_over(self, value: Tensor) -> Tensor:
        """A tensor of the model where and as the run reads it."""
        if self.precision is not None and value.is_floating_point():
            value = value.float()
        return value.to(self.home)

    @contextmanager
    def _present(self, network: nn.Module) -> Iterator[None]:
        """The weights are on the device within the block. What lies in main memory stays there: a frozen model changes
        nothing, so nothing has to be copied back.
        """
        if not self.offload:
            yield
            return
        resting = [(stored, stored.data) for stored in _stored(network)]
        try:
            for stored, data in resting:
                stored.data = data.to(self.device, non_blocking=True)
            yield
        finally:
            for stored, data in resting:
                stored.data = data

    def _autocast(self) -> AbstractContextManager[object]:
        if self.precision is None:
            return nullcontext()
        dtype = DTYPES.get(self.precision)
        return torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def seat_of(options: ModelOptions, home: torch.device | None, where: str) -> Seat | None:
    """The seat that a teacher's section asks for; None where it sits with the run.

    Without `home` nothing is to be computed but shapes: the seat is then in main memory, on any machine. Raises
    `ConfigError` for a device or a precision that the machine does not have.
    """
    if options.device is None and options.offload is None and options.precision is None and not options.shard:
        return None
    if home is None:
        return Seat(torch.device("cpu"), torch.device("cpu"), options.offload is not None)
    device = home if options.device is None else pick_device(options.device, f"{where}.device")
    if options.precision is not None:
        check_precision(options.precision, device, f"{where}.precision")
    return Seat(device, home, options.offload is not None, options.precision)


def _stored(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()
