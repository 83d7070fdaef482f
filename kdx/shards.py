"""Weights that are spread over the processes of a run (FSDP2), and their way to and from whole tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from kdx.components import Network

FORWARDS = ("forward_intermediates", "forward_features", "forward_head", "predict")
"""The methods by which a net may be entered besides `forward`."""


def shard_learner(learner: nn.Module, *, blocks: bool) -> list[FSDPModule]:
    """Spread the networks that a learner trains, block by block if the blocks are only ever called whole.

    The weights of nodes stay on every process, as nodes may read them at any time, and so do single numbers.
    """
    models = {weight for weight in learner.get_submodule("models").parameters() if weight.ndim}
    kept = {*learner.parameters()} - models
    parts, mesh = [*_blocks(learner)] if blocks else [], _mesh(learner)
    found = [fully_shard(part, mesh=mesh, ignored_params=kept) for part in (*parts, learner)]
    register_fsdp_forward_method(learner, "calibrate")
    return found


def shard_frozen(net: nn.Module) -> None:
    """Spread a frozen net, of which only one block at a time is then whole on a process; once, if asked again."""
    if isinstance(net, FSDPModule):
        return
    kept = {weight for weight in net.parameters() if not weight.ndim}
    for part in (*_blocks(net), net):
        fully_shard(part, mesh=_mesh(net), reshard_after_forward=True, ignored_params=kept)
    for name in FORWARDS:
        if hasattr(net, name):
            register_fsdp_forward_method(net, name)


def _mesh(module: nn.Module) -> DeviceMesh:
    """All processes in a row, with what computes where the module is."""
    return init_device_mesh(next(module.parameters()).device.type, (dist.get_world_size(),))


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The blocks that nets are made of: composite members of a list or a sequence, none inside of another."""
    for child in module.children():
        found = [*child.children()] if isinstance(child, (nn.Sequential, nn.ModuleList)) else []
        if found and all([*block.children()] for block in found):
            yield from (block for block in found if any(weight.ndim for weight in block.parameters()))
        else:
            yield from _blocks(child)


def is_spread(tensor: object) -> bool:
    """Whether a tensor is a part of one that is spread."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(state: Any) -> Any:
    """A state dict with every spread tensor made whole; all processes must ask for it."""
    if isinstance(state, DTensor):
        return state.full_tensor()
    if isinstance(state, Mapping):
        return {key: whole(value) for key, value in state.items()}
    return [whole(value) for value in state] if isinstance(state, list) else state


def spread_like(value: Tensor, like: Tensor) -> Tensor:
    """The part of this process of a whole tensor, where `like` is spread; else the tensor itself."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def spread_state(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """A whole state dict as a module with spread weights takes it."""
    own = dict(module.named_parameters())
    return {name: spread_like(value, own[name]) if name in own else value for name, value in state.items()}


def spread_optimizer(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A whole state of an optimizer as an optimizer of spread weights takes it."""
    weights = dict(
        zip(
            [place for group in state["param_groups"] for place in group["params"]],
            [weight for group in optimizer.param_groups for weight in group["params"]],
            strict=True,
        )
    )
    found = {
        place: {
            key: spread_like(value, weights[place]) if isinstance(value, Tensor) else value
            for key, value in of_one.items()
        }
        for place, of_one in state["state"].items()
    }
    groups = [
        {
            **group,
            **{key: own[key] for key in ("fused", "foreach") if key in own},
        }  # not every kernel takes spread weights
        for group, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    return {**state, "state": found, "param_groups": groups}


class Mirror:
    """A copy of a network with whole weights, for evaluation and export. It is made before the network is spread."""

    def __init__(self, network: Network) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self._source = network

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the present weights; all processes must do so."""
        for weight, spread in zip(self.network.parameters(), self._source.parameters(), strict=True):
            weight.copy_(whole(spread.detach()))
        for mine, theirs in zip(self.network.buffers(), self._source.buffers(), strict=True):
            mine.copy_(theirs)
