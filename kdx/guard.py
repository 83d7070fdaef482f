"""What happens when a frozen teacher answers with nan or inf: the run is refused, or the answer is left out.

Flags stay on the device; they are read every `EVERY` updates, and always before anything is kept as good.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdx.calls import Call, Key, ModelCall, Values
from kdx.errors import KdxError, PlanError
from kdx.taps import LOGITS
from kdx.types import Batch, Shape

CHOICES = ("refuse", "drop")
EVERY = 50
"""After so many updates the flags are read."""
NAMED = 8
"""How many samples a message names."""
_NO_INDEX = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Marks:
    """Which answers for a batch are bad, teachers by samples: `bad` [T, B] must be refused, `dropped` [T, B] was made
    good by those of other teachers.
    """

    bad: Tensor
    dropped: Tensor


@dataclass(frozen=True)
class Guarded:
    """The frozen teachers of a plan, and the keys of logits that may stand in for each other."""

    calls: tuple[ModelCall, ...] = ()
    groups: tuple[tuple[Key, ...], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(call.name for call in self.calls)

    def inspect(self, values: Values) -> Marks:
        """Mark answers that are not finite. In a group, such logits are replaced by the mean of the other teachers'
        logits for that sample, which leaves the teacher out of a mean; where all of them are bad, none is.
        """
        bad = {call.name: _not_finite([values[key] for key in call.gives]) for call in self.calls}
        dropped = {name: torch.zeros_like(found) for name, found in bad.items()}
        for keys in self.groups:
            logits = [values[key] for key in keys]
            good = torch.stack([~_not_finite([value]) for value in logits])  # [M, B]
            count = good.sum(0)
            shaped = [own.reshape(-1, *[1] * (value.ndim - 1)) for own, value in zip(good, logits, strict=True)]
            clean = [torch.where(own, value, 0) for own, value in zip(shaped, logits, strict=True)]
            mean = torch.stack(clean).sum(0) / count.clamp(min=1).reshape(shaped[0].shape)
            for key, own, good_here, value in zip(keys, good, shaped, logits, strict=True):
                name = key.rpartition(".")[0]
                values[key] = torch.where(good_here, value, mean.to(value.dtype))
                dropped[name] = ~own & (count > 0)
                rest = [values[other] for other in self._gives(name) if other != key]
                bad[name] = (~own & (count == 0)) | (_not_finite(rest) if rest else False)
        return Marks(torch.stack([*bad.values()]), torch.stack([*dropped.values()]))

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
        count = len(self.names)
        self._bad = torch.zeros(count, dtype=torch.int64, device=device)
        self._step = torch.full((count,), -1, dtype=torch.int64, device=device)
        self._indices = torch.full((count, NAMED), _NO_INDEX, dtype=torch.int64, device=device)
        self._dropped = torch.zeros(count, dtype=torch.int64, device=device)
        self._now = torch.zeros(count, dtype=torch.int64, device=device)

    def add(self, step: int, batch: Batch, marks: Marks | None) -> None:
        """Take in the marks for a batch, or a part of one, of the update `step`."""
        if marks is None:
            return
        found = marks.bad.sum(1)
        index = torch.where(marks.bad, batch["index"], _NO_INDEX).sort(1).values[:, :NAMED]
        new = (self._step < 0) & (found > 0)
        self._step = torch.where(new, step, self._step)
        self._indices[:, : index.shape[1]] = torch.where(new.unsqueeze(1), index, self._indices[:, : index.shape[1]])
        self._bad = self._bad + found
        if self._drops:
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
        if not self.names:
            return
        counts = self._bad.tolist()
        for place, count in enumerate(counts):
            if count:
                named = [str(index) for index in self._indices[place].tolist() if index != _NO_INDEX]
                more = ", ..." if len(named) == NAMED else ""
                advice = (
                    "no other teacher could stand in for it"
                    if self._drops
                    else "or leave such answers out with `on_bad_teacher: drop`"
                )
                raise KdxError(
                    f"teachers.{self.names[place]}: it gave nan or inf for {count} samples, first in update "
                    f"{int(self._step[place])} (batch.index {', '.join(named)}{more}); expected finite numbers: check "
                    f"its weights and its precision, {advice}"
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


def _not_finite(values: Sequence[Tensor]) -> Tensor:
    """[B], whether any number of a sample is nan or inf."""
    found: Tensor | None = None
    for value in values:
        low, high = value.reshape(len(value), -1).aminmax(dim=1)  # nan passes through both
        bad = ~(torch.isfinite(low) & torch.isfinite(high))
        found = bad if found is None else found | bad
    assert found is not None
    return found
