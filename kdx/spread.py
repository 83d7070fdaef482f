"""A plan over several processes: each runs the networks on its samples, and nodes see the samples that they need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdx.calls import Call, Key, ModelCall, NodeCall, Values, settings_of
from kdx.components import Node
from kdx.distributed import Processes
from kdx.errors import KdxError
from kdx.group import Group
from kdx.plan import Plan
from kdx.presence import ALWAYS
from kdx.reach import base_of
from kdx.recall import RecallTarget
from kdx.shards import is_spread, shard_frozen
from kdx.synced_norm import sync_norms

C = TypeVar("C", bound=Call)


@dataclass(frozen=True)
class WholeCall(NodeCall):
    """A node that sees the samples of all processes, and so gives on each what it would give on one.

    Of what it gives for each sample, a process goes on with that of its own samples.
    """

    group: Group = field(default_factory=Group)
    draws: bool = False
    """Whether it has layers that draw from torch's global random numbers, which differ between processes."""

    def run(self, values: Values) -> None:
        whole: Values = {key: self._of_all(key, values) for key in self.reads if key in values}
        if self.draws:
            with self.group.common():
                super().run(whole)
        else:
            super().run(whole)
        for key in self.gives:
            if key in whole:
                found: Tensor = whole[key]
                values[key] = self.group.slice(found) if found.ndim else found

    def _of_all(self, key: Key, values: Values) -> Tensor:
        """A tensor over all processes, gathered for the first node that reads it."""
        value: Tensor = values[key]
        if not value.ndim:
            return value
        gathered = f"{key} of all processes"
        if gathered not in values:
            values[gathered] = self.group.gather(value)
        found: Tensor = values[gathered]
        return found


def spread(plan: Plan, group: Group) -> Plan:
    """The plan as one of several processes carries it out; on one process the plan itself."""
    if not isinstance(group, Processes):
        return plan
    for call in plan.teacher_calls:
        if isinstance(call, ModelCall) and call.seat is not None and plan.spec.models[base_of(call.name)].engine.shard:
            shard_frozen(call.module.network.net)
            call.module.run_through()  # a pass that ends early would leave its weights whole
    for call in plan.learner_calls:
        if not _needs_all(call):
            sync_norms(call.module, group)
    for one in plan.loss_calls:
        if not _needs_all(one):
            sync_norms(one.module, group)
    for call in plan.calls:
        if isinstance(call, NodeCall) and not _needs_all(call):
            group.draws_alone(call.name, call.module.given.generator)

    def over_all(calls: tuple[C, ...]) -> tuple[C, ...]:
        return tuple(_whole(call, group) if _needs_all(call) else call for call in calls)  # type: ignore[misc,arg-type]

    return replace(
        plan,
        teacher_calls=over_all(plan.teacher_calls),
        learner_calls=over_all(plan.learner_calls),
        loss_calls=over_all(plan.loss_calls),
    )


def lends(plan: Plan) -> bool:
    """Whether nodes call parts of models by themselves."""
    return any(call.borrowed for call in plan.calls if isinstance(call, NodeCall))


def _needs_all(call: Call) -> bool:
    """Whether a node cannot work on the samples of one process: a mean over those present needs all of them."""
    if isinstance(call, RecallTarget):
        return False  # a target that is stored looks at no other sample
    return isinstance(call, NodeCall) and not (says_separable(type(call.module)) and call.presence == ALWAYS)


def says_separable(component: type[Node]) -> bool:
    """Whether a class says so itself: one that derives from it may compute something else."""
    return bool(vars(component).get("separable", False))


def _whole(call: NodeCall, group: Group) -> WholeCall:
    draws = any("Drop" in type(part).__name__ for part in call.module.modules())
    return WholeCall(**settings_of(call), group=group, draws=draws)


@torch.no_grad()
def check_alike(group: Group, modules: Mapping[str, nn.Module]) -> None:
    """Raise `KdxError` where the parameters or memories of a module are no longer the same on all processes.

    Waits for the device.
    """
    names = [name for name, module in modules.items() if _stored(module)]
    if not isinstance(group, Processes) or not names:
        return
    sums = torch.stack([torch.stack([_digest(one) for one in _stored(modules[name])]).sum() for name in names]).cpu()
    low, high = sums.clone(), sums.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    for name, least, most in zip(names, low.tolist(), high.tolist(), strict=True):
        if least != most:
            raise KdxError(
                f"{name}: what it has learnt or remembers differs between processes. A node that says `separable` may "
                "keep nothing of the samples that it sees; random numbers come from its own generator only"
            )


def _stored(module: nn.Module) -> Sequence[Tensor]:
    return [tensor for tensor in (*module.parameters(), *module.buffers()) if not is_spread(tensor)]


def _digest(tensor: Tensor) -> Tensor:
    """A number that changes with any value of a tensor."""
    values = tensor.detach().reshape(-1).double().nan_to_num(nan=0.5, posinf=2.0, neginf=-2.0)
    places = torch.arange(1, len(values) + 1, device=values.device, dtype=torch.float64)
    return (values * places.sin()).sum().cpu()
