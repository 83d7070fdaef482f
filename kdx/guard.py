"""What happens when a frozen teacher answers with nan or inf: the run is refused, or the answer is left out.

Flags stay on the device; they are read every `EVERY` updates, and always before anything is kept as good.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kdx.calls import Call, Key, ModelCall, Values
from kdx.errors import KdxError, PlanError
from kdx.formats import counted
from kdx.presence import ALWAYS, blank, held
from kdx.taps import LOGITS
from kdx.types import Batch, Shape

CHOICES = ("refuse", "drop")
EVERY = 50
"""After so many updates the flags are read."""
NAMED = 8
"""How many samples a message names."""
_WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Marks:
    """Which answers for a batch are bad, teacher by teacher: where the trace [B] of one of its fields is not finite the
    answer must be refused, where `dropped` [T, B] is true it was made good by those of other teachers. None where there
    is no such group.
    """

    traces: Sequence[Sequence[Tensor]]
    dropped: Tensor | None = None


@dataclass(frozen=True)
class Guarded:
    """The frozen teachers of a plan, and the keys of logits that may stand in for each other."""

    calls: tuple[ModelCall, ...] = ()
    groups: tuple[tuple[Key, ...], ...] = ()
    _gappy: tuple[ModelCall, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_gappy", tuple(call for call in self.calls if call.presence != ALWAYS))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(call.name for call in self.calls)

    def without(self, names: Container[str]) -> Guarded:
        """The others, and what of them may stand in for each other."""
        calls = tuple(call for call in self.calls if call.name not in names)
        groups = [tuple(key for key in keys if key.rpartition(".")[0] not in names) for keys in self.groups]
        return Guarded(calls, tuple(keys for keys in groups if len(keys) > 1))

    def inspect(self, values: Values) -> Marks:
        """Mark answers that are not finite. In a group, such logits are replaced by the mean of the other teachers'
        logits for that sample, which leaves the teacher out of a mean; where all of them are bad, none is.

        Before, what a teacher gives for a sample that lacks what it reads is replaced by 0: neither bad nor good.
        """
        present = {call.name: held(call.presence, values) for call in self._gappy}
        for call in self._gappy:
            values.update({key: blank(values[key], present[call.name]) for key in call.gives})
        if not self.groups:
            return Marks([[_trace(values[key]) for key in call.gives] for call in self.calls])
        bad = {call.name: _not_finite([values[key] for key in call.gives]) for call in self.calls}
        dropped = {name: torch.zeros_like(found) for name, found in bad.items()}
        for keys in self.groups:
            logits = [values[key] for key in keys]
            good = torch.stack([~_not_finite([value]) for value in logits])  # [M, B]
            owners = [key.rpartition(".")[0] for key in keys]
            asked = torch.stack(
                [present.get(name, torch.ones_like(own)) for name, own in zip(owners, good, strict=True)]
            )
            count = (good & asked).sum(0)
            shaped = [own.reshape(-1, *[1] * (value.ndim - 1)) for own, value in zip(good, logits, strict=True)]
            clean = [blank(value, own) for own, value in zip(good & asked, logits, strict=True)]
            mean = torch.stack(clean).sum(0) / count.clamp(min=1).reshape(shaped[0].shape)
            for key, name, own, good_here, value in zip(keys, owners, good, shaped, logits, strict=True):
                values[key] = torch.where(good_here, value, mean.to(value.dtype))
                dropped[name] = ~own & (count > 0)
                rest = [values[other] for other in self._gives(name) if other != key]
                bad[name] = (~own & (count == 0)) | (_not_finite(rest) if rest else False)
        traces = [[torch.where(found, torch.nan, 0.0)] for found in bad.values()]
        return Marks(traces, torch.stack([*dropped.values()]))

    def _gives(self, name: str) -> tuple[Key, ...]:
        return next(call.gives for call in self.calls if call.name == name)


def guarded(
    calls: Sequence[Call],
    shapes: Mapping[Key, Shape],
    on_bad_teacher: str,
    classes: Mapping[str, tuple[str, ...]] | None = None,
) -> Guarded:
    """The models among the teacher-side `calls`. With `drop`, logits of one shape on one view stand in for each other,
    unless `classes` says that their teachers tell other classes apart.

    Raises `PlanError` where `drop` finds no two teachers for that.
    """
    models = tuple(call for call in calls if isinstance(call, ModelCall))
    groups: dict[tuple[str, Shape, tuple[str, ...] | None], list[Key]] = {}
    if on_bad_teacher == "drop":
        for call in models:
            for key in call.gives:
                name, _, view = call.name.partition("@")
                if key.endswith(f".{LOGITS}"):
                    groups.setdefault((view, shapes[key], (classes or {}).get(name)), []).append(key)
    several = tuple(tuple(keys) for keys in groups.values() if len(keys) > 1)
    if models and on_bad_teacher == "drop" and not several:
        raise PlanError(
            f"on_bad_teacher: found 'drop', but no two of the teachers ({', '.join(call.name for call in models)}) "
            "give logits over the same classes, so none can stand in for another; expected refuse"
        )
    return Guarded(models, several)


class Guard:
    """Keeps count of bad answers on the device, from update to update."""

    def __init__(self, guarded: Guarded, device: torch.device) -> None:
        self.names = guarded.names
        self._drops = bool(guarded.groups)
        self._waiting: list[tuple[int, Tensor, Marks]] = []
        count = len(self.names)
        self._dropped = torch.zeros(count, dtype=torch.int64, device=device)
        self._now = torch.zeros(count, dtype=torch.int64, device=device)

    def add(self, step: int, batch: Batch, marks: Marks | None) -> None:
        """Take in the marks for a batch, or a part of one, of the update `step`. They wait for `check` as they are."""
        if marks is None:
            return
        self._waiting.append((step, batch["index"], marks))
        if marks.dropped is not None:
            self._now = self._now + marks.dropped.sum(1)

    def update(self) -> dict[str, Tensor]:
        """How many answers of each teacher were left out in the update that has just ended, where any may be."""
        if not self._drops:
            return {}
        self._dropped = self._dropped + self._now
        now, self._now = self._now, torch.zeros_like(self._now)
        return {f"{name}.dropped": count for name, count in zip(self.names, now.unbind(), strict=True)}

    def check(self) -> None:
        """Refuse bad answers so far. Waits for the device."""
        waiting, self._waiting = self._waiting, []
        traces = [trace for _, _, marks in waiting for own in marks.traces for trace in own]
        if not traces or torch.cat(traces).isfinite().all():
            return
        bad = [torch.cat([_is_bad(marks.traces[place]) for _, _, marks in waiting]) for place in range(len(self.names))]
        counts = torch.stack(bad).sum(1).tolist()
        for place, count in enumerate(counts):
            if count:
                found = ((step, index[_is_bad(marks.traces[place])].tolist()) for step, index, marks in waiting)
                step, samples = next((step, samples) for step, samples in found if samples)
                named = [str(sample) for sample in sorted(samples)]
                more = ", ..." if len(named) >= NAMED else ""
                advice = (
                    "no other teacher could stand in for it"
                    if self._drops
                    else "or leave such answers out with `on_bad_teacher: drop`"
                )
                raise KdxError(
                    f"teachers.{self.names[place]}: it gave nan or inf for {counted(count, 'sample')}, first in update "
                    f"{step} (batch.index {', '.join(named[:NAMED])}{more}); expected finite numbers: check its "
                    f"weights and its precision, {advice}"
                )

    def dropped(self) -> dict[str, int]:
        """How many answers of each teacher were left out over training, where any might have been."""
        return dict(zip(self.names, self._dropped.tolist(), strict=True)) if self._drops else {}

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"dropped": self._dropped}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up `state`."""
        self._dropped = state["dropped"].to(self._dropped.device)


def _trace(value: Tensor) -> Tensor:
    """[B], finite where all numbers of a sample are, in one operation if it can be: it runs in every update.

    A sum is in float32 at least, whose range no sum of answers of half precision leaves.
    """
    if value.ndim != 2:
        value = value.reshape(len(value), -1)
    return value.sum(1) if value.dtype in _WIDE else value.sum(1, dtype=torch.float32)


def _is_bad(traces: Sequence[Tensor]) -> Tensor:
    """[B], whether one of the fields of a teacher is not finite."""
    return ~torch.stack([*traces]).isfinite().all(0)


def _not_finite(values: Sequence[Tensor]) -> Tensor:
    """[B], whether any number of a sample is nan or inf."""
    found: Tensor | None = None
    for value in values:
        low, high = value.reshape(len(value), -1).aminmax(dim=1)  # nan passes through both
        bad = low.mul(0).add_(high.mul(0)) != 0  # inf times 0 is nan, which differs from everything
        found = bad if found is None else found | bad
    assert found is not None
    return found
