"""In which way the teachers of a step run: one after another, or each on a stream of a GPU of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from kdx.calls import Values


class Runs(Protocol):
    """A call of a teacher, or what stands in for some: it leaves in `values` what it gives."""

    def run(self, values: Values) -> None: ...


Lane = Callable[[Sequence[Runs], Values], None]
"""Runs all teachers of a step on the values of a batch."""


def in_turn(teachers: Sequence[Runs], values: Values) -> None:
    """One after another."""
    for teacher in teachers:
        teacher.run(values)


class Streams:
    """Each teacher on a CUDA stream of its own, so that what is too small to fill a GPU runs beside other work.

    The kernels are those that run one after another, so no number changes; the memory that teachers take while they
    run is taken by all of them at once.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self._device = device
        self._streams = [torch.cuda.Stream(device) for _ in range(count)]  # type: ignore[no-untyped-call]

    def __call__(self, teachers: Sequence[Runs], values: Values) -> None:
        present = torch.cuda.current_stream(self._device)
        before = set(values)
        for stream, teacher in zip(self._streams, teachers, strict=True):
            stream.wait_stream(present)  # until the batch is there
            with torch.cuda.stream(stream):
                teacher.run(values)
        for stream in self._streams:
            present.wait_stream(stream)
        for key in values.keys() - before:
            values[key].record_stream(present)  # its memory is that of another stream, which must not take it back
