"""What a network costs: parameters, multiply-adds, size on disk and time on one CPU core."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kdx.components import Network
from kdx.types import Batch

WARM_UP = 5


@dataclass(frozen=True)
class Size:
    """The cost of one network: multiply-adds and latency are those of one sample, bytes those of its weight file."""

    parameters: int
    multiply_adds: int
    file_bytes: int
    latency_ms: float


def measure(module: Network, batch: Batch, path: Path, *, runs: int = 30) -> Size:
    """The size of a network whose weights are stored at `path`; the first sample of `batch` is its input."""
    return Size(
        parameters(module), multiply_adds(module, batch), file_bytes(path), latency_ms(module, batch, runs=runs)
    )


def parameters(module: nn.Module) -> int:
    """The number of parameters; shared ones count once, buffers do not count."""
    return sum(parameter.numel() for parameter in module.parameters())


def multiply_adds(module: Network, batch: Batch) -> int:
    """Multiply-adds of one forward pass of one sample: half of what torch's FLOP counter finds.

    Matrix products, convolutions and attention count; normalisation, activations and resizing do not.
    """
    network, streams = _on_cpu(module, batch)
    with _plain_attention(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*streams)
    return int(counter.get_total_flops()) // 2


def latency_ms(module: Network, batch: Batch, *, runs: int = 30) -> float:
    """The median time in ms of `runs` forward passes of one sample on one CPU thread, its preparation included."""
    if runs < 1:
        raise ValueError(f"runs: found {runs}, expected at least 1")
    network, streams = _on_cpu(module, batch)
    times: list[float] = []
    with _one_thread(), torch.inference_mode():
        for _ in range(WARM_UP):
            network(*streams)
        for _ in range(runs):
            start = time.perf_counter()
            network(*streams)
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def file_bytes(path: Path) -> int:
    """The size of a file in bytes."""
    return path.stat().st_size


def _on_cpu(module: Network, batch: Batch) -> tuple[Network, list[Tensor]]:
    # A copy, so that the device and the mode of the caller's network stay as they are.
    network = copy.deepcopy(module).cpu().eval()
    return network, [batch[stream][:1].cpu() for stream in module.streams]


@contextmanager
def _plain_attention() -> Iterator[None]:
    # The FLOP counter sees neither the fused path that nn.MultiheadAttention takes in evaluation mode nor the CPU's
    # flash kernel.
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
