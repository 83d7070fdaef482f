"""What reports show of a plan besides terms: the weights of teachers, temperatures, and whatever targets declare."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdx.calls import Call, Key, NodeCall, Values
from kdx.components import Many, Target
from kdx.errors import PlanError
from kdx.types import Batch, Clock, EvalReport, Shape

SPREAD = "/std"
"""Ends the name of a standard deviation over samples."""


@dataclass(frozen=True)
class Shown:
    """A tensor that reports show: [B], 0-d, or [B, M] with a name for each of its M `columns`."""

    key: Key
    columns: tuple[str, ...] = ()

    @property
    def owner(self) -> str:
        return self.key.partition(".")[0]

    @property
    def field(self) -> str:
        return self.key.partition(".")[2]

    def names(self, prefix: str) -> list[str]:
        """One name for each number of a sample."""
        return [f"{prefix}.{column}" for column in self.columns] if self.columns else [prefix]


def find_shown(calls: Sequence[Call], values: Values, shapes: Mapping[Key, Shape]) -> tuple[Shown, ...]:
    """The fields that targets show, and every knob that a node makes sample by sample; `values` are those of a probe.

    Raises `PlanError` for a field that a target declares but whose shape no report can show.
    """
    found: dict[Key, Shown] = {}
    for call in calls:
        if isinstance(call, NodeCall) and isinstance(call.module, Target):
            for field in call.module.shown:
                key = f"{call.name}.{field}"
                if key in shapes and (one := _field(call, key, shapes[key])) is not None:
                    found[key] = one
    for key in read_knobs(calls).values():
        if values[key].ndim and not key.startswith("batch."):
            found.setdefault(key, Shown(key))
    return tuple(found.values())


def read_knobs(calls: Iterable[Call]) -> dict[str, Key]:
    """The knobs that are refs, by config path."""
    found: dict[str, Key] = {}
    for call in calls:
        if isinstance(call, NodeCall):
            for name, key in call.knobs().items():
                path = f"{call.where}.{name}"
                if key != path:
                    found[path] = key
    return found


def _field(call: NodeCall, key: Key, shape: Shape) -> Shown | None:
    if not shape:
        return Shown(key)
    if len(shape) == 1:
        for name, kind in call.module.inputs.items():
            keys = call.arguments[name]
            if isinstance(kind, Many) and isinstance(keys, tuple) and len(keys) == shape[0]:
                return Shown(key, _columns(keys))
    if isinstance(call.module, Target) and call.module.shown == Target.shown:
        return None  # a field that has one of the usual names by chance
    if len(shape) == 1:
        return Shown(key, tuple(str(number) for number in range(1, shape[0] + 1)))
    raise PlanError(f"{call.label}: `shown` names {key}, of shape {list(shape)} per sample; expected [M] or one number")


def _columns(keys: Sequence[Key]) -> tuple[str, ...]:
    """What the refs are told apart by: their owners, else owner and field."""
    owners = [key.partition(".")[0] for key in keys]
    return tuple(owners if len(set(owners)) == len(owners) else (key.replace(".", ":") for key in keys))


@dataclass(frozen=True)
class Moments:
    """Count, mean [M] and summed squared deviations [M] of some samples."""

    count: float
    mean: Tensor
    deviations: Tensor

    def with_(self, other: Moments) -> Moments:
        """Those of both together, without the cancellation of a difference of squares (Chan et al., 1979)."""
        count = self.count + other.count
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        apart = shift.square() * (self.count * other.count / count)
        return Moments(count, mean, self.deviations + other.deviations + apart)

    def named(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Each mean and, after its name, the standard deviation over the samples; 0-d."""
        spread = (self.deviations / self.count).sqrt()
        for index, name in enumerate(names):
            yield name, self.mean[index]
            yield f"{name}{SPREAD}", spread[index]


class Tally:
    """Adds up what is shown, on the device: over the parts of an update, and class by class over an epoch.

    Nothing waits for the device but `epoch`, which is called once per epoch.
    """

    def __init__(self, shown: Sequence[Shown], classes: Sequence[str]) -> None:
        self._shown = {one.key: one for one in shown}
        self._classes = tuple(classes)
        self._update: dict[Key, Moments] = {}
        self._epoch: dict[Key, Moments] = {}
        self._sums: dict[Key, Tensor] = {}
        self._members: dict[Key, Tensor] = {}

    @property
    def any(self) -> bool:
        """Whether there is anything to add up."""
        return bool(self._shown)

    def add(self, batch: Batch, values: Mapping[Key, Tensor]) -> None:
        """Take in the values for a batch or a part of one."""
        size = len(batch["index"])
        member = self._membership(batch)
        for key, one in self._shown.items():
            value = values[key].float()
            rows = (value if value.ndim else value.expand(size)).reshape(size, len(one.columns) or 1)
            mean = rows.mean(0)
            moments = Moments(float(size), mean, (rows - mean).square().sum(0))
            old = self._update.get(key)
            self._update[key] = moments if old is None else old.with_(moments)
            if member is not None:
                sums, members = member.T @ rows, member.sum(0)
                known = key in self._sums
                self._sums[key] = self._sums[key] + sums if known else sums
                self._members[key] = self._members[key] + members if known else members

    def update(self) -> dict[str, Tensor]:
        """Mean and spread over the samples of the update that has just ended, 0-d by name."""
        found: dict[str, Tensor] = {}
        for key, moments in self._update.items():
            one = self._shown[key]
            found.update(moments.named(one.names(key if one.columns else written(key))))
            self._epoch[key] = self._epoch[key].with_(moments) if key in self._epoch else moments
        self._update = {}
        return found

    def epoch(self, clock: Clock) -> list[EvalReport]:
        """Mean, spread and the mean of each class over the epoch, a report for each target; then begins anew."""
        names: dict[str, list[str]] = {}
        tensors: list[Tensor] = []
        for key, moments in self._epoch.items():
            one = self._shown[key]
            own = names.setdefault(one.owner, [])
            for name, number in moments.named(one.names(one.field)):
                own.append(name)
                tensors.append(number.reshape(1))
            if key in self._sums:
                own += [f"{name}[{kind}]" for name in one.names(one.field) for kind in self._classes]
                means = self._sums[key] / self._members[key].unsqueeze(1)  # nan for a class that did not occur
                tensors.append(means[:-1].T.flatten())
        numbers = iter(torch.cat(tensors).tolist() if tensors else ())
        self._epoch, self._sums, self._members = {}, {}, {}
        return [
            EvalReport(clock, "train", owner, {name: next(numbers) for name in own}) for owner, own in names.items()
        ]

    def state(self) -> dict[str, Any]:
        """What a resumed run needs in the middle of an epoch."""
        epoch = {key: (one.count, one.mean, one.deviations) for key, one in self._epoch.items()}
        return {"epoch": epoch, "sums": dict(self._sums), "members": dict(self._members)}

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take up `state`."""
        self._epoch = {
            key: Moments(count, mean.to(device), deviations.to(device))
            for key, (count, mean, deviations) in state["epoch"].items()
        }
        self._sums = {key: value.to(device) for key, value in state["sums"].items()}
        self._members = {key: value.to(device) for key, value in state["members"].items()}

    def _membership(self, batch: Batch) -> Tensor | None:
        """[B, K + 1]: 1 where a sample is of a class, the last column for those without a label."""
        label, count = batch.get("label"), len(self._classes)
        if label is None or label.ndim != 1 or label.is_floating_point() or not count:
            return None
        held = torch.where(label < 0, count, label)
        return (held.unsqueeze(1) == torch.arange(count + 1, device=label.device)).float()


def written(key: Key) -> str:
    """A key as a person writes it: `tau` for `tau.out`."""
    return key.removesuffix(".out")
