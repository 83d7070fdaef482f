"""How several processes come to the same weights: torch's DDP and FSDP2, and averages by hand for the rest."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from kdx.components import Network
from kdx.devices import pick_device
from kdx.distributed import Processes, local_rank, world_size
from kdx.errors import ConfigError, did_you_mean
from kdx.group import Group
from kdx.shards import Mirror, is_spread, local, shard_learner
from kdx.types import Losses

WAYS = ("auto", "ddp", "fsdp")


_BUFFERS_ALONE: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers": False
}  # fmt: skip
"""Tells DDP that buffers are the same anyhow; torch 2.14 has renamed the option."""


class _Held(nn.Module):
    """A learner, and a weight that nothing reaches: DDP warns where it has none of these to look for."""

    def __init__(self, learner: nn.Module) -> None:
        super().__init__()
        self.learner = learner
        self.spare = nn.Parameter(next(learner.parameters()).new_zeros(1))

    def forward(self, *inputs: Any) -> Any:
        return self.learner(*inputs)


class Parallel:
    """Keeps what a learner learns the same on all processes of a group."""

    def __init__(self, group: Group, way: str) -> None:
        if way not in WAYS:
            raise ConfigError(f"runtime.parallel: found {way!r}, {did_you_mean(way, WAYS)}")
        self._group = group
        self._several = isinstance(group, Processes)
        self._fsdp = self._several and way == "fsdp"
        self._ddp: DistributedDataParallel | None = None
        self._shards: list[FSDPModule] = []
        self._mirror: Mirror | None = None

    def mirror(self, network: Network) -> Network:
        """The network that is evaluated: a copy with whole weights where those of `network` will be spread."""
        if not self._fsdp:
            return network
        self._mirror = Mirror(network)
        return self._mirror.network

    def refresh(self) -> None:
        """Let the network that is evaluated have the present weights."""
        if self._mirror is not None:
            self._mirror.refresh()

    def join(self, learner: nn.Module, by_hand: bool, lent: bool) -> Callable[..., Losses]:
        """What runs the learner. With `by_hand` gradients are averaged when the update is made; `lent` says that parts
        of what it trains are called by others.
        """
        if not self._several:
            return learner
        self._group.spread(learner)
        if self._fsdp and by_hand:
            raise ConfigError(
                "runtime.parallel: found 'fsdp', but the updater takes the step apart, which spread weights do not "
                "allow; expected ddp"
            )
        if self._fsdp:
            self._shards = shard_learner(learner, blocks=not lent)
            return learner
        if by_hand:
            return learner
        # A loss may leave weights out, and which ones may change from update to update.
        self._ddp = DistributedDataParallel(
            _Held(learner), find_unused_parameters=True, gradient_as_bucket_view=True, **_BUFFERS_ALONE
        )
        return self._ddp

    def left_over(self, learner: nn.Module, own: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """The weights whose gradients are averaged by hand; `own` are those of the updater."""
        if not self._several:
            return []
        found = [*own] if self._ddp is not None else [*learner.parameters(), *own]
        return [weight for weight in found if weight.requires_grad and not is_spread(weight)]

    def syncing(self, last: bool) -> AbstractContextManager[object]:
        """The context of the passes of a micro-batch."""
        for part in self._shards[-1:]:
            part.set_requires_gradient_sync(last)  # of all parts within, too
        return nullcontext() if last or self._ddp is None else self._ddp.no_sync()

    def share(self, weights: Sequence[nn.Parameter]) -> None:
        """Average the gradients of these weights."""
        if weights:
            found = self.averaged([weight.grad for weight in weights], weights)
            for weight, gradient in zip(weights, found, strict=True):
                weight.grad = gradient

    def clip(self, weights: Sequence[nn.Parameter], limit: float) -> None:
        """Scale gradients so that the norm of all of them is at most `limit`."""
        if not self._shards:
            torch.nn.utils.clip_grad_norm_(weights, limit)
            return
        reached = [weight.grad for weight in weights if weight.grad is not None]
        parts, kept = ([local(one) for one in reached if is_spread(one) is spread] for spread in (True, False))
        squares = torch.stack([one.square().sum() for one in parts]).sum()
        self._group.average([squares])
        squares = squares * self._group.size + sum(one.square().sum() for one in kept)
        torch._foreach_mul_([*parts, *kept], (limit / (squares.sqrt() + 1e-6)).clamp(max=1.0))

    def averaged(self, gradients: Sequence[Tensor | None], weights: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients averaged over the processes; None for a weight that none of them reaches."""
        reached = self._group.any([gradient is not None for gradient in gradients])
        found = [
            torch.zeros_like(weight) if gradient is None and here else gradient
            for gradient, weight, here in zip(gradients, weights, reached, strict=True)
        ]
        self._group.average([gradient for gradient in found if gradient is not None])
        return found


def pick_own_device(name: str | None) -> torch.device:
    """The device of this process: that of the config or, of several GPUs, the one whose turn it is.

    Raises `ConfigError` where two processes would share a GPU.
    """
    device = pick_device(name)
    if world_size() == 1 or device.type != "cuda":
        return device
    if ":" in (name or ""):
        raise ConfigError(f"runtime.device: found {name!r}, but each process has its own GPU; expected cuda or auto")
    if local_rank() >= torch.cuda.device_count():
        raise ConfigError(
            f"runtime.device: this machine has {torch.cuda.device_count()} GPUs, too few for its processes; start "
            "fewer with --nproc-per-node"
        )
    return torch.device("cuda", local_rank())
